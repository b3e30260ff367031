"""The image of the fault tests, the truth about it, and ways to read and compare.

Each of the first layers has a directory of its own, so a test that needs data which nobody fetched yet takes
the next layer. "bulk" is a layer of many files for load.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.layertar import LayerTar
from tests.layout import GZIP, PLAIN, ZSTD, ZSTD_FRAMES, Layout, push

LAYERS = 20
COMPRESSIONS = (GZIP, ZSTD_FRAMES, PLAIN, GZIP, ZSTD)
BULK_FILES = 60
BLOBS = "/blobs/"
# A read ends before its deadline; this much later it must have ended on any loaded machine.
GRACE_S = 4.0
_READER_DEADLINE_S = 60


@dataclass
class World:
    """`repository` at a registry, with an index attached; `truth`: path below the root -> content."""

    repository: str
    truth: Mapping[str, bytes]
    layout: Path
    digests: list[str]  # of the layers' blobs
    bulk: list[str]
    plain: str  # a repository with the same image and no index
    other: str  # repository of another, small image, with the file "other"
    other_content: bytes

    def image(self, host: str) -> str:
        return f"{host}/{self.repository}:v1"

    def with_another_config(self, reference: str) -> str:
        """Pushes another image of the same layers; returns its reference."""
        layout = Layout(self.layout)
        manifest = layout.document(layout.resolve("v1"))
        diff_ids = layout.document(manifest["config"])["rootfs"]["diff_ids"]
        layers = list(zip(manifest["layers"], diff_ids, strict=True))
        layout.tag("again", layout.add_image(layers, {"Cmd": ["/again"]}))
        push(self.layout, "again", reference)
        return reference

    def manifest(self) -> bytes:
        layout = Layout(self.layout)
        return layout.blob_path(layout.resolve("v1")["digest"]).read_bytes()


def _content(rng: random.Random, size: int) -> bytes:
    """Half of it compresses, so that spans differ in length and copies go back across their borders."""
    phrases = [rng.randbytes(600) for _ in range(8)]
    pieces = bytearray()
    while len(pieces) < size:
        pieces += rng.randbytes(500) + rng.choice(phrases)
    return bytes(pieces[:size])


def build(directory: Path) -> World:
    """Writes the image as an OCI layout in `directory`."""
    rng = random.Random(20261124)
    truth: dict[str, bytes] = {}
    layout = Layout(directory)
    layers = []

    def add(tar: LayerTar, path: str, size: int) -> None:
        truth[path] = _content(rng, size)
        tar.file(path, truth[path])

    for number in range(LAYERS):
        tar = LayerTar().dir(f"l{number}")
        for name, size in (("large", 700_000), ("small", 5_000), ("medium", 300_001), ("empty", 0)):
            add(tar, f"l{number}/{name}", size)
        layers.append(layout.add_layer(tar.data(), COMPRESSIONS[number % len(COMPRESSIONS)]))
    tar = LayerTar().dir("bulk")
    for number in range(BULK_FILES):
        add(tar, f"bulk/{number}", rng.choice((100, 4096, 70_000, 400_000, 900_000)))
    layers.append(layout.add_layer(tar.data(), GZIP))
    layout.tag("v1", layout.add_image(layers, {"Cmd": ["/bin/sh"]}))
    digests = [descriptor["digest"] for descriptor, _ in layers]
    other = _content(rng, 300_000)
    tar = LayerTar().file("other", other)
    layout.tag("other", layout.add_image([layout.add_layer(tar.data(), GZIP)]))
    bulk = [path for path in truth if path.startswith("bulk/")]
    return World("faults", truth, directory, digests, bulk, "plain", "other", other)


def upload(world: World, host: str) -> None:
    push(world.layout, "v1", world.image(host))
    push(world.layout, "v1", f"{host}/{world.plain}:v1")
    push(world.layout, "other", f"{host}/{world.other}:v1")


@dataclass
class Outcome:
    """Of reading one file whole: its bytes, or an errno."""

    data: bytes | None
    error: int
    seconds: float


def read(path: Path) -> Outcome:
    """Reads a file in a process of its own, so that a read that hangs cannot take the test with it."""
    program = (
        "import sys\n"
        "try: data = open(sys.argv[1], 'rb').read()\n"
        "except OSError as error: sys.exit(error.errno)\n"
        "sys.stdout.buffer.write(data)"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-S", "-c", program, str(path)], capture_output=True, timeout=_READER_DEADLINE_S
    )
    seconds = time.monotonic() - started
    return Outcome(done.stdout if done.returncode == 0 else None, done.returncode, seconds)


def assert_right(world: World, target: Path, *paths: str) -> None:
    """Every byte of these files (default: all) is as in the image."""
    for path in paths or world.truth:
        assert (target / path).read_bytes() == world.truth[path], f"{path} differs"


def assert_io_error(path: Path, within_s: float) -> None:
    """EIO: no bytes, no zeros, and not late."""
    outcome = read(path)
    assert outcome.data is None, f"{path} could be read"
    assert outcome.error == errno.EIO, os.strerror(outcome.error)
    assert outcome.seconds < within_s, f"EIO only after {outcome.seconds:.1f} s"
