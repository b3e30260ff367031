"""The images that are measured: built from Debian packages, kept as OCI layouts like the tests' images."""

from __future__ import annotations

import random
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.layertar import MTIME_S
from tests.layout import CHUNK_BYTES, GZIP, PLAIN, Layout
from tests.realimages import BUILD_DEADLINE_S, ENVIRONMENT, bootstrap, built

__all__ = ["BUILD_DEADLINE_S", "BenchmarkImage", "interpreters", "large_file"]

TAG = "latest"
LARGE_FILE_BYTES = 500_000_000
LARGE_FILE_NAME = "data.bin"


@dataclass(frozen=True)
class BenchmarkImage:
    """An image in an OCI layout, and its numbers. `root_tar`: the same root as one plain tar."""

    layout: Path
    compressed_bytes: int
    tar_bytes: int
    entries: int

    @property
    def root_tar(self) -> Path:
        return self.layout / "root.tar"


def interpreters() -> BenchmarkImage:
    """Debian with python3 and nodejs: about 300 MB and 10,000 inodes in one gzip layer."""
    return _measured(built("python3-nodejs", _build_interpreters, sources=[__file__]))


def large_file() -> BenchmarkImage:
    """One file of 500 MB that does not compress, in a plain tar layer, for sequential reads."""
    return _measured(built("large-file", _build_large_file, sources=[__file__]))


def _build_interpreters(directory: Path) -> None:
    tar = directory / "root.tar"
    bootstrap(tar, "--include=python3,nodejs", reproducible=False)
    config = {"Env": [*ENVIRONMENT, "LANG=C.UTF-8"], "Cmd": ["python3"]}
    layout = Layout(directory)
    layout.tag(TAG, layout.add_image([layout.add_layer(tar, GZIP)], config))


def _build_large_file(directory: Path) -> None:
    with tempfile.TemporaryFile(dir=directory) as data:
        for piece in _noise(LARGE_FILE_BYTES):
            data.write(piece)
        data.seek(0)
        info = tarfile.TarInfo(LARGE_FILE_NAME)
        info.size, info.mtime, info.mode = LARGE_FILE_BYTES, MTIME_S, 0o644
        with tarfile.open(directory / "root.tar", "w") as tar:
            tar.addfile(info, data)
    layout = Layout(directory)
    layout.tag(TAG, layout.add_image([layout.add_layer(directory / "root.tar", PLAIN)], {}))


def _noise(size: int) -> Iterator[bytes]:
    source = random.Random(1)  # the same bytes on every machine
    for start in range(0, size, CHUNK_BYTES):
        yield source.randbytes(min(CHUNK_BYTES, size - start))


def _measured(path: Path) -> BenchmarkImage:
    layout = Layout(path)
    layers = layout.document(layout.resolve(TAG))["layers"]
    with tarfile.open(path / "root.tar") as tar:
        entries = sum(1 for _ in tar)
    return BenchmarkImage(path, sum(x["size"] for x in layers), (path / "root.tar").stat().st_size, entries)
