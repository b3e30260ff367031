"""The mounted tree is what `umoci unpack` makes of the same image: whatever the layers, on both backends, with
an index and without."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazyfs.core.erofs.reader import ErofsReader
from tests.conftest import Lazyfs
from tests.servers import RegistryServer
from tests.whole import oddities
from tests.whole.conftest import Pushed
from tests.whole.mounting import BACKENDS, Host, host
from tests.whole.trees import Tree, differences

ROUTES = ("indexed", "streamed")
VARIANTS = [
    *((name, tag) for name in ("debian", "odd") for tag in ("gzip", "zstd", "zstd-frames", "none")),
    ("busybox", "docker"),
    ("busybox", "platforms"),
]
# Debian's five layers take a while to compare: there, one route for each compression but the usual one.
LONG = {("debian", "zstd"): "indexed", ("debian", "zstd-frames"): "streamed", ("debian", "none"): "indexed"}
CASES = [(*variant, route) for variant in VARIANTS for route in ROUTES if LONG.get(variant, route) == route]


@pytest.mark.parametrize(("name", "tag", "route"), CASES, ids=["-".join(case) for case in CASES])
def test_the_mount_equals_the_unpacked_image(
    machine: Host,
    pushed: Pushed,
    registry: RegistryServer,
    trees: Callable[[str], Tree],
    name: str,
    tag: str,
    route: str,
) -> None:
    image = f"{registry.host}/{pushed(name, tag, route == 'indexed')}"
    target = machine.mount(image)
    assert differences(target, trees(name)) == []
    check_namespaces(machine.cache)


def check_namespaces(cache: Path) -> None:
    """fsck.erofs accepts the metadata of every image in the cache."""
    files = list((cache / "indexes").glob("*/namespace.erofs"))
    assert files
    for file in files:
        devices = [device.tag.decode() for device in ErofsReader(file.read_bytes()).devices]
        options = [f"--device={cache / 'layers' / device / 'data'}" for device in devices]
        done = subprocess.run(["fsck.erofs", *options, str(file)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_another_platform_is_another_image(machine: Host, pushed: Pushed, registry: RegistryServer) -> None:
    image = f"{registry.host}/{pushed('busybox', 'platforms', False)}"
    target = machine.mount(image, options="platform=linux/arm64/v8")
    assert os.listdir(target) == ["other-platform"]
    code, message = machine.refused(image, options="platform=linux/s390x")
    assert code == 32 and "linux/s390x" in message and "linux/arm64/v8" in message


@pytest.fixture(scope="module", params=BACKENDS)
def strange(
    request: pytest.FixtureRequest, lazyfs: Lazyfs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A mount of the image that umoci cannot read, straight from a layout directory."""
    directory = tmp_path_factory.mktemp(f"strange-{request.param}")
    layout = oddities.stranger(directory / "layout", directory / "scratch")
    with host(lazyfs, directory, request.param) as machine:
        yield machine.mount(f"oci:{layout.path}:stranger")
        check_namespaces(machine.cache)


@pytest.mark.parametrize("version", ["old", "0.0", "0.1", "1.0"])
def test_sparse_files_of_every_format(strange: Path, version: str) -> None:
    assert (strange / f"sparse-{version}").read_bytes() == oddities.sparse_content()


def test_a_time_far_away(strange: Path) -> None:
    assert (strange / "far").stat().st_mtime_ns == oddities.FAR_NS


def test_types_that_count_as_files(strange: Path) -> None:
    assert (strange / "contiguous").read_bytes() == b"c"
    assert (strange / "unknown").read_bytes() == b"u"


def test_a_file_of_five_gibibytes(strange: Path) -> None:
    """At its pieces, beside them, and in its holes."""
    with (strange / "huge").open("rb", buffering=0) as file:
        assert os.fstat(file.fileno()).st_size == oddities.HUGE_BYTES
        for offset, piece in oddities.HUGE_PIECES:
            assert os.pread(file.fileno(), len(piece), offset) == piece
            before, after = max(0, offset - 10_000), offset + len(piece)
            assert not any(os.pread(file.fileno(), offset - before, before))
            assert not any(os.pread(file.fileno(), 10_000, after))
        for hole in (1 << 30, (1 << 32) + (1 << 20)):
            assert os.pread(file.fileno(), 1 << 20, hole) == bytes(1 << 20)
        assert os.pread(file.fileno(), 1, oddities.HUGE_BYTES) == b""
