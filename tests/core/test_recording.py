"""From first touches to a profile: digests from the tables, names from the namespace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given

from lazyfs.core.erofs.metadata import Metadata
from lazyfs.core.erofs.writer import Device, write_erofs
from lazyfs.core.layer.blocks import BLOCK_BYTES
from lazyfs.core.starts.profile import Profile, Touch
from lazyfs.core.starts.recording import FileData, files, record
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import Node
from lazyfs.errors import ImageError
from tests.cache.cachelayers import make_layer
from tests.core.namespaces import DEVICES, count_links, directory, node, trees, walk

ONE, TWO = make_layer([3 * BLOCK_BYTES, 100, 5000], 1), make_layer([4096, 4096], 2)
LAYERS = [(ONE.content_root, ONE.blocks), (TWO.content_root, TWO.blocks)]


def file_of(layer: int, number: int, size: int) -> Node:
    """The file number `number` of a layer."""
    starts = [[0, 3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 4096], [0, 4096]]
    return node(Kind.FILE, layer=layer, address=starts[layer][number], size=size)


def namespace() -> Metadata:
    large = file_of(0, 0, 3 * BLOCK_BYTES)
    root = directory(
        {
            b"bin": directory({b"sh": large, b"sh2": large}),
            b"etc": directory({b"a": directory({b"b": file_of(1, 1, 4096)}), b"z": file_of(0, 2, 5000)}),
            b"empty": node(Kind.FILE),
            b"link": node(Kind.SYMLINK, target=b"bin/sh"),
        }
    )  # fmt: skip
    count_links(root)
    devices = tuple(Device(root.encode(), table.device_bytes) for root, table in LAYERS)
    return Metadata(write_erofs(root, devices))


def test_a_block_has_its_file_and_its_place_in_it() -> None:
    first = {(1, 1): 0, (0, 2): 7, (0, 0): 7, (0, 3): 9, (0, 4): 30}
    found = record(LAYERS, first, files(namespace()))
    assert found.layers == (TWO.content_root, ONE.content_root) and found.starts == 1

    def touch(layer: int, block: int, at_ms: int, path: bytes, part: int, length: int) -> Touch:
        table = (TWO, ONE)[layer].blocks
        return Touch(layer, block, at_ms, 1, table.digest(block)[:8], path, part, length)

    assert found.touches == (
        touch(0, 1, 0, b"etc/a/b", 0, 4096),
        touch(1, 2, 7, b"bin/sh", 2, BLOCK_BYTES),
        touch(1, 0, 7, b"bin/sh", 0, BLOCK_BYTES),
        touch(1, 3, 9, b"", 0, 100),  # of a file that is not in the root
        touch(1, 4, 30, b"etc/z", 0, 5000),
    )
    assert Profile.decode(found.encode()) == found


def test_the_tree_is_not_walked_for_what_is_known() -> None:
    known = record(LAYERS, {(0, 1): 5, (1, 1): 6}, files(namespace()))

    def refuse() -> FileData:
        raise AssertionError("walked")

    again = record(LAYERS, {(0, 1): 0}, iter(refuse, None), known)
    assert [(one.path, one.part) for one in again.touches] == [(b"bin/sh", 1)]
    with pytest.raises(AssertionError):
        record(LAYERS, {(0, 2): 0}, iter(refuse, None), known)


def test_damaged_metadata_costs_names_only() -> None:
    def damaged() -> Iterator[FileData]:
        yield FileData(b"bin/sh", 0, 0, 3 * BLOCK_BYTES)
        raise ImageError("damaged")

    found = record(LAYERS, {(0, 1): 0, (1, 0): 1}, damaged())
    assert [one.path for one in found.touches] == [b"bin/sh", b""]


def test_nothing_touched_is_an_empty_profile() -> None:
    assert record(LAYERS, {}) == Profile((), 1, ())


@given(trees())
def test_the_walk_finds_each_file_once(root: Node) -> None:
    found = list(files(Metadata(write_erofs(root, DEVICES))))
    names: dict[Node, set[bytes]] = {}
    for path, one in walk(root):
        if one.kind is Kind.FILE and one.size:
            names.setdefault(one, set()).add(b"/".join(path))
    owner = {path: one for one, paths in names.items() for path in paths}
    assert {owner[file.path] for file in found} == set(names) and len(found) == len(names)
    for file in found:
        one = owner[file.path]
        assert file[1:] == (one.layer, one.address, one.size)
