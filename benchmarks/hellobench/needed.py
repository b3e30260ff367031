"""What a start really needs: the file pages that it touches, whatever fetches them.

Measured without lazyfs: the image is unpacked on an ext4 file system of its own whose device reads nothing ahead,
the workload starts there with an empty page cache, and the kernel tells which pages are present then (mincore(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import stat
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.host import run
from tests.layout import Layout

ROOT_BYTES = 6 << 30  # sparse
PAGE_BYTES = mmap.PAGESIZE
# As the layers are compressed by default (gzip(1)).
GZIP_LEVEL = 6

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_MAP_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True)
class Needed:
    """The bytes of the pages that a start touched: all, those of each layer (bottom first), and all together as
    gzip makes them. `files`: how many files they lie in."""

    plain_bytes: int
    compressed_bytes: int
    layer_bytes: tuple[int, ...]
    files: int


@contextlib.contextmanager
def unpacked(layout: Path, tag: str, directory: Path) -> Iterator[Path]:
    """The image's root, unpacked by umoci on ext4 without read-ahead, in `directory`, which is made."""
    directory.mkdir()
    image, mountpoint = directory / "ext4.img", directory / "ext4"
    mountpoint.mkdir()
    with image.open("wb") as file:
        file.truncate(ROOT_BYTES)
    run("mkfs.ext4", "-q", "-F", image)
    run("mount", "-o", "loop", image, mountpoint)
    try:
        device = os.stat(mountpoint).st_dev
        Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb").write_text("0")
        run("umoci", "unpack", "--image", f"{layout}:{tag}", mountpoint / "bundle")
        yield mountpoint / "bundle/rootfs"
    finally:
        run("umount", mountpoint)
        image.unlink()


def touched(root: Path, layers: Sequence[frozenset[str]]) -> Needed:
    """What the page cache holds of the files below `root` now. `layers`: the paths that each layer has, bottom
    first."""
    plain, files = 0, 0
    compressor, compressed = zlib.compressobj(GZIP_LEVEL), 0
    layer_bytes = [0] * len(layers)
    seen: set[int] = set()
    for path in regular_files(root):
        with path.open("rb", buffering=0) as file:
            facts = os.fstat(file.fileno())
            if facts.st_size == 0 or facts.st_ino in seen:
                continue
            seen.add(facts.st_ino)
            pages = present_pages(file.fileno(), facts.st_size)
            if not any(pages):
                continue
            # All of them at once: what is read here brings more pages in.
            size = 0
            for number in (n for n, present in enumerate(pages) if present):
                data = os.pread(file.fileno(), PAGE_BYTES, number * PAGE_BYTES)
                size += len(data)
                compressed += len(compressor.compress(data))
        files += 1
        plain += size
        name = str(path.relative_to(root))
        for number in reversed(range(len(layers))):
            if name in layers[number]:
                layer_bytes[number] += size
                break
    compressed += len(compressor.flush())
    return Needed(plain, compressed, tuple(layer_bytes), files)


def present_pages(descriptor: int, size_bytes: int) -> list[bool]:
    """For each page of a file whether it is in the page cache. mincore(2) does not bring it there."""
    address = _libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), "mmap")
    try:
        count = -(-size_bytes // PAGE_BYTES)
        present = ctypes.create_string_buffer(count)
        if _libc.mincore(address, size_bytes, present) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
        return [bool(byte & 1) for byte in present.raw]
    finally:
        _libc.munmap(address, size_bytes)


def regular_files(root: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            if stat.S_ISREG(path.lstat().st_mode):
                yield path


@functools.lru_cache(maxsize=64)
def paths_of_layer(blob: Path) -> frozenset[str]:
    """The paths of the regular files that a gzip'ed layer has."""
    with tarfile.open(blob, "r|gz") as tar:
        return frozenset(os.path.normpath(m.name) for m in tar if m.isreg() or m.islnk())


def layers_of(layout: Layout, tag: str) -> list[frozenset[str]]:
    """The paths that each layer of an image has, bottom first."""
    manifest = layout.document(layout.resolve(tag))
    return [paths_of_layer(layout.blob_path(layer["digest"])) for layer in manifest["layers"]]
