"""Damaged EROFS metadata is an ImageError, never anything else."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.core.erofs.format import SUPER_OFFSET, superblock_checksum
from lazyfs.core.erofs.reader import ErofsReader
from lazyfs.core.erofs.writer import write_erofs
from lazyfs.core.tar.kinds import Kind
from lazyfs.errors import ImageError
from tests.core.namespaces import BLOCK, DEVICES, count_links, directory, node, small_tree


def resealed(image: bytes | bytearray) -> bytes:
    """With a right checksum, as whoever forges an image would have."""
    sealed = bytearray(image)
    struct.pack_into("<I", sealed, SUPER_OFFSET + 4, superblock_checksum(sealed[:BLOCK]))
    return bytes(sealed)


def use(image: bytes) -> None:
    """Everything the reader can do, on whatever nids the image itself and its surroundings offer."""
    with contextlib.suppress(ImageError):
        reader = ErofsReader(image)
        for walk_all in (reader.check, reader.tree):
            with contextlib.suppress(ImageError):
                walk_all()
        actions: list[Callable[[int], object]] = [
            reader.inode,
            lambda nid: list(reader.entries(nid)),
            lambda nid: reader.lookup(nid, b"n0300"),
            lambda nid: reader.lookup(nid, b"top"),
            reader.readlink,
            reader.xattrs,
        ]
        for nid in (-1, 2**64 - 1, *range(len(image) // 32 + 1)):
            for action in actions:
                with contextlib.suppress(ImageError):
                    action(nid)


SMALL = write_erofs(small_tree(), DEVICES)
VALUES = st.one_of(st.integers(0, 255), st.sampled_from([0, 255]))
EDITS = st.lists(st.tuples(st.integers(SUPER_OFFSET, len(SMALL) - 1), VALUES), min_size=1, max_size=12)
# Most edits should hit the structures: superblock, device slots, inodes, the first dirents.
NEAR = st.lists(st.tuples(st.integers(SUPER_OFFSET, 2048), st.integers(0, 255)), min_size=1, max_size=3)


@settings(deadline=None, max_examples=150)
@given(st.one_of(EDITS, NEAR))
def test_damage_is_an_image_error(edits: list[tuple[int, int]]) -> None:
    image = bytearray(SMALL)
    for position, value in edits:
        image[position] = value
    use(resealed(image))
    if image[:BLOCK] != SMALL[:BLOCK]:
        with pytest.raises(ImageError):
            ErofsReader(bytes(image))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, len(SMALL) - 1), st.binary(max_size=64))
def test_truncated_and_foreign_buffers(length: int, garbage: bytes) -> None:
    with pytest.raises(ImageError):
        ErofsReader(SMALL[:length])
    with pytest.raises(ImageError):
        ErofsReader(garbage * 64)
    with pytest.raises(ImageError):
        ErofsReader(SMALL + bytes(BLOCK))


def patched(position: int, form: str, value: int) -> bytes:
    image = bytearray(SMALL)
    struct.pack_into("<" + form, image, position, value)
    return resealed(image)


@pytest.mark.parametrize(
    ("field", "form", "value"),
    [(0, "I", 1), (12, "B", 9), (13, "B", 1), (14, "H", 0), (14, "H", 0xFFFF), (36, "I", 1), (40, "I", 1),
     (80, "I", 0xD), (80, "I", 8), (80, "I", 4), (80, "I", 0), (84, "H", 1), (86, "H", 0),
     (86, "H", 0xFFFF), (88, "H", 0), (90, "B", 1), (128 + 64, "I", 0xFFFFFFFF), (128 + 68, "I", 1)],
)  # fmt: skip
def test_superblock_outside_the_profile(field: int, form: str, value: int) -> None:
    with pytest.raises(ImageError):
        ErofsReader(patched(SUPER_OFFSET + field, form, value))


def rejected_by_check(image: bytes) -> None:
    reader = ErofsReader(resealed(image))
    with pytest.raises(ImageError):
        reader.check()


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"dirA", b"d/rA"), (b"dirA", b"d\0rA"), (b"dirA", b"zzzz"), (b"n0300", b"n0299"), (b"n0300", b"n9999"),
     (b"../top", b"..\0top")],
)  # fmt: skip
def test_check_finds_bad_names(old: bytes, new: bytes) -> None:
    assert SMALL.count(old) == 1
    rejected_by_check(SMALL.replace(old, new))


def inode_position(*path: bytes) -> int:
    reader = ErofsReader(SMALL)
    nid: int | None = reader.root_nid
    for name in path:
        assert nid is not None
        nid = reader.lookup(nid, name)
    assert nid is not None
    return nid * 32


TOP, INNER, NULL, MANY, LINKED = (b"top",), (b"dirA",), (b"null",), (b"many",), (b"dirA", b"link")
EMPTY, CHUNK = (b"empty",), 64 + 20 + 4  # the chunk index in TOP's record, behind attributes and padding


@pytest.mark.parametrize(
    ("path", "field", "form", "value"),
    [(TOP, 0, "H", 0), (TOP, 2, "H", 1), (TOP, 2, "H", 0xFFFF), (TOP, 4, "H", 0o040644), (TOP, 6, "H", 1),
     (TOP, 8, "Q", 2**63), (TOP, 8, "Q", 3 * BLOCK), (TOP, 16, "I", 1), (TOP, 16, "I", 0xFFFFFFFE),
     (TOP, 24, "I", 2**32 - 1), (TOP, 40, "I", 10**9), (TOP, 44, "I", 3), (INNER, 44, "I", 3),
     (NULL, 44, "I", 0), (NULL, 8, "Q", 1), (MANY, 8, "Q", 12), (MANY, 8, "Q", 2**63),
     (MANY, 16, "I", 0xFFFF), (LINKED, 8, "Q", 4096),
     (TOP, 0, "H", 1), (TOP, 0, "H", 5), (TOP, 16, "I", 0x1F), (TOP, 16, "I", 0x3E), (TOP, 16, "I", 0x7F),
     (TOP, 16, "I", 0x1003F), (TOP, CHUNK, "H", 1), (TOP, CHUNK + 2, "H", 0), (TOP, CHUNK + 2, "H", 2),
     (TOP, CHUNK + 2, "H", 4), (TOP, CHUNK + 2, "H", 0xFFFF), (TOP, CHUNK + 4, "I", 2),
     (TOP, CHUNK + 4, "I", 0xFFFFFFFF), (EMPTY, 0, "H", 9), (EMPTY, 8, "Q", 1), (INNER, 0, "H", 9),
     (MANY, 0, "H", 9), (LINKED, 0, "H", 9), (NULL, 0, "H", 9)],
)  # fmt: skip
def test_check_finds_bad_inodes(path: tuple[bytes, ...], field: int, form: str, value: int) -> None:
    rejected_by_check(patched(inode_position(*path) + field, form, value))


def test_check_finds_cycles_and_wrong_parents() -> None:
    root, inner, many = (inode_position(*path) // 32 for path in ((), (b"dirA",), (b"many",)))
    # Every place that names one directory names another instead.
    for old, new in ((inner, root), (inner, many), (many, inner), (root, inner)):
        rejected_by_check(SMALL.replace(struct.pack("<Q", old), struct.pack("<Q", new)))


def test_check_bounds_its_own_work() -> None:
    """Directories that share their blocks, each large: refused after about one image's length."""
    children = {b"!%03d" % number: node(Kind.FIFO) for number in range(700)}
    root = directory({b"d%03d" % number: directory(dict(children)) for number in range(8)})
    for name, child in (root.children or {}).items():
        if name != b"d000":
            child.children = {b"!x": node(Kind.FIFO)}
    count_links(root)
    image = bytearray(write_erofs(root, ()))
    reader = ErofsReader(bytes(image))
    first = reader.lookup(reader.root_nid, b"d000")
    assert first is not None
    fields = image[first * 32 + 8 : first * 32 + 20]
    for name in list(root.children or {})[1:]:
        nid = reader.lookup(reader.root_nid, name)
        assert nid is not None
        image[nid * 32 + 8 : nid * 32 + 20] = fields
    rejected_by_check(bytes(image))
