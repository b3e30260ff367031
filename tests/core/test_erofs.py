"""EROFS metadata: what is written is read back, and the same tree gives the same bytes."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.core.erofs.reader import ErofsReader
from lazyfs.core.erofs.writer import write_erofs
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import Node
from tests.core.namespaces import BLOCK, DEVICES, compare, directory, node, small_tree, trees, walk


@settings(deadline=None, max_examples=200)
@given(trees())
def test_round_trip(root: Node) -> None:
    image = write_erofs(root, DEVICES, b"0123456789abcdef")
    assert len(image) % BLOCK == 0
    reader = ErofsReader(image)
    assert reader.devices == DEVICES
    compare(reader, root)
    reader.check()


@settings(deadline=None, max_examples=10)
@given(trees(), st.randoms(use_true_random=False))
def test_insertion_order_does_not_matter(root: Node, random: object) -> None:
    image = write_erofs(root, DEVICES)
    for _, found in walk(root):
        for mapping in (found.children, found.xattrs):
            items: list[tuple[bytes, object]] = list((mapping or {}).items())
            random.shuffle(items)  # type: ignore[attr-defined]
            if mapping is not None:
                mapping.clear()
                mapping.update(items)  # type: ignore[arg-type]
    assert write_erofs(root, DEVICES) == image


GOLDEN = "1689136104fc"


def test_bytes_stay_the_same() -> None:
    """Indexes are addressed by content: the same tree must give the same bytes in every release."""
    image = write_erofs(small_tree(), DEVICES)
    assert hashlib.sha256(image).hexdigest().startswith(GOLDEN)


@pytest.mark.parametrize("length", [*range(3900, 4100, 7), *range(4024, 4036), 8100, 8190, 8191, 8192, 12288])
def test_directory_blocks_of_every_fill(length: int) -> None:
    """Around the sizes where a directory stops fitting behind its inode, or a block is exactly full."""
    left = length - 27  # "." and ".." with their dirents
    names: list[bytes] = []
    while left:
        size = left if left <= 267 else min(267, left - 13)
        names.append(
            b"%05d" % len(names) + b"x" * (size - 17) if size >= 17 else b"%c" % len(names) * (size - 12)
        )
        left -= size
    root = directory({name: node(Kind.FIFO) for name in names})
    reader = ErofsReader(write_erofs(root, ()))
    compare(reader, root)
    reader.check()


@pytest.mark.parametrize("size", [0, 1, 3900, 4000, 4016, 4017, 4096, 65535])
def test_attributes_of_every_length(size: int) -> None:
    attributes = {b"user.a": b"x" * size, b"security.capability": b"y" * 20, b"trusted." + b"n" * 255: b""}
    target = b"t" * 4000
    root = directory(
        {
            b"file": node(Kind.FILE, xattrs=attributes),
            b"dir": directory({b"x" * 255: node(Kind.FIFO)}, xattrs=attributes),
            b"link": node(Kind.SYMLINK, target=target, xattrs={b"security.x": b"z" * size}),
        },
        xattrs=attributes,
    )
    reader = ErofsReader(write_erofs(root, ()))
    compare(reader, root)
    reader.check()
