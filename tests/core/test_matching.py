"""A profile of one image, and the blocks of another that it names."""

from __future__ import annotations

import hashlib
import random

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.erofs.metadata import Metadata
from lazyfs.core.erofs.writer import Device, write_erofs
from lazyfs.core.layer.blocks import BLOCK_BYTES, BlockTable, BlockTableBuilder
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.core.starts.matching import Match, find_file, match
from lazyfs.core.starts.profile import Profile, Touch
from lazyfs.core.starts.recording import FileData
from lazyfs.core.tar.kinds import Kind
from tests.core.namespaces import count_links, directory, node

MANY = 1 << 40


class Layer:
    """Files by name; a file is a list of contents, one for each of its blocks."""

    def __init__(self, files: dict[bytes, list[bytes]]) -> None:
        builder, at = BlockTableBuilder(), 0
        self.places: dict[bytes, tuple[int, int]] = {}
        for path, contents in files.items():
            size = BLOCK_BYTES * (len(contents) - 1) + 4096
            address, at = builder.place(size), at + 512
            self.places[path] = address, size
            for number, content in enumerate(contents):
                length = BLOCK_BYTES if number < len(contents) - 1 else 4096
                builder.add(address + number * BLOCK_BYTES, at, length, hashlib.sha256(content).digest())
                at += length
        self.table = BlockTable(builder.finish(at + 1024))
        self.root = self.table.content_root

    def block(self, path: bytes, part: int = 0) -> int:
        return self.table.overlapping(self.places[path][0] + part * BLOCK_BYTES, 1)[0]


class Image:
    """Layers; a file is that of the last layer which has it."""

    def __init__(self, *layers: Layer) -> None:
        self.tables = [(layer.root, layer.table) for layer in layers]
        self._found = {
            path: FileData(path, number, *place)
            for number, layer in enumerate(layers)
            for path, place in layer.places.items()
        }

    def match(self, profile: Profile, most_bytes: int = MANY) -> Match:
        return match(profile, self.tables, self._found.get, most_bytes)


def profile(*touched: tuple[Layer, bytes, int], starts: int = 1, seldom: int = 1 << 30) -> Profile:
    """Touched in this order; `starts` of as many starts, but one of them only from number `seldom` on."""
    layers = list(dict.fromkeys(layer.root for layer, _, _ in touched))
    touches = [
        Touch(
            layers.index(layer.root),
            (block := layer.block(path, part)),
            number,
            1 if number >= seldom else starts,
            layer.table.digest(block)[:8],
            path,
            part,
            layer.table.lengths[block],
        )
        for number, (layer, path, part) in enumerate(touched)
    ]
    return Profile(tuple(layers), starts, tuple(touches))


BASE = Layer({b"lib/libc": [b"c0", b"c1", b"c2"], b"bin/sh": [b"sh"]})
APP = Layer({b"app/main": [b"m0", b"m1"], b"app/data": [b"d0", b"d1"], b"app/old": [b"o"]})
LEARNT = profile(
    (BASE, b"bin/sh", 0), (APP, b"app/main", 1), (BASE, b"lib/libc", 2), (APP, b"app/data", 0), (APP, b"app/old", 0)
)


def test_of_the_same_image_each_block_is_that_block_in_the_order_of_need() -> None:
    found = Image(BASE, APP).match(LEARNT)
    assert found.blocks == (
        (0, BASE.block(b"bin/sh")), (1, APP.block(b"app/main", 1)), (0, BASE.block(b"lib/libc", 2)),
        (1, APP.block(b"app/data")), (1, APP.block(b"app/old")),
    )  # fmt: skip
    assert (found.same, found.moved, found.changed) == (5, 0, 0)


def test_of_a_new_version_blocks_are_found_by_content_and_changed_files_by_name() -> None:
    new = Layer({b"new": [b"n"], b"srv/main": [b"x", b"m1"], b"app/data": [b"d0 changed", b"d1"]})
    found = Image(BASE, new).match(LEARNT)
    assert found.blocks == (
        (0, BASE.block(b"bin/sh")), (1, new.block(b"srv/main", 1)), (0, BASE.block(b"lib/libc", 2)),
        (1, new.block(b"app/data")),
    )  # fmt: skip
    assert (found.same, found.moved, found.changed) == (2, 1, 1)


def test_of_an_image_with_the_same_base_the_base_is_matched() -> None:
    other = Layer({b"usr/bin/node": [b"node"]})
    assert Image(BASE, other).match(LEARNT).blocks == ((0, BASE.block(b"bin/sh")), (0, BASE.block(b"lib/libc", 2)))
    assert Image(other).match(LEARNT).blocks == ()


def test_of_several_blocks_with_one_content_that_of_the_name_is_taken_and_each_once() -> None:
    learnt = profile((APP, b"app/main", 0), (APP, b"app/data", 0))
    new = Layer({b"copy": [b"m0"], b"app/main": [b"m0"], b"a": [b"d0"], b"b": [b"d0"]})
    assert Image(new).match(learnt).blocks == ((0, new.block(b"app/main")), (0, new.block(b"a")))
    twins = Layer({b"one": [b"t"], b"two": [b"t"]})
    moved = Layer({b"x": [b"t"], b"y": [b"t"]})
    found = Image(moved).match(profile((twins, b"one", 0), (twins, b"two", 0)))
    assert found.blocks == ((0, moved.block(b"x")), (0, moved.block(b"y")))


def test_what_few_starts_touched_is_left_out_and_the_bytes_are_bounded() -> None:
    touched = [(BASE, b"lib/libc", part) for part in range(3)]
    seldom = profile(*touched, starts=9, seldom=2)
    assert Image(BASE).match(seldom).blocks == ((0, 0), (0, 1))
    assert Image(BASE).match(profile(*touched, starts=8, seldom=2)).blocks == ((0, 0), (0, 1), (0, 2))
    assert Image(BASE).match(profile(*touched), 2 * BLOCK_BYTES).blocks == ((0, 0), (0, 1))
    assert Image(BASE).match(profile(*touched), 100).blocks == ()


digests = st.binary(min_size=8, max_size=8) | st.sampled_from([BASE.table.digest(0)[:8], APP.table.digest(1)[:8]])
hostile_touches = st.builds(
    Touch, st.integers(0, 1), st.integers(0, 1 << 26), st.integers(0, 9), st.integers(1, 9), digests,
    st.sampled_from([b"", b"/", b"app/data", b"app/data/x", b"x" * 4096, b"..", b"app//main"]), st.integers(0, 1 << 26),
)  # fmt: skip


@given(st.lists(hostile_touches, max_size=20), st.integers(0, 1 << 20))
def test_a_hostile_profile_names_blocks_of_the_image_or_none_and_never_more_than_the_bytes(
    touches: list[Touch], most_bytes: int
) -> None:
    image = Image(BASE, APP)
    strange = Profile((BASE.root, ContentRoot("f" * 64)), 9, tuple(touches))
    found = image.match(strange, most_bytes)
    assert len(set(found.blocks)) == len(found.blocks) == found.same + found.moved + found.changed
    assert sum(image.tables[layer][1].lengths[block] for layer, block in found.blocks) <= most_bytes


def test_a_profile_of_many_versions_is_matched_in_any_order_of_layers() -> None:
    contents = [b"%d" % number for number in range(200)]
    old = Layer({b"%d" % number: [content] for number, content in enumerate(contents)})
    random.Random(1).shuffle(contents)
    new = [Layer({b"n%d" % number: [content] for number, content in enumerate(contents[at::3])}) for at in range(3)]
    found = Image(*new).match(profile(*[(old, b"%d" % number, 0) for number in range(200)]))
    assert found.moved == 200
    for number, (layer, block) in enumerate(found.blocks):
        assert new[layer].table.digest(block) == old.table.digest(number)


def test_a_file_is_found_by_its_name() -> None:
    file = node(Kind.FILE, layer=0, address=4096, size=5000)
    root = directory({b"a": directory({b"b": file, b"c": directory(), b"e": node(Kind.FILE)}), b"l": file})
    count_links(root)
    namespace = Metadata(write_erofs(root, (Device(BASE.root.encode(), BASE.table.device_bytes),)))
    assert find_file(namespace, b"a/b") == FileData(b"a/b", 0, 4096, 5000)
    assert find_file(namespace, b"l") == FileData(b"l", 0, 4096, 5000)
    for path in (b"a", b"a/c", b"a/e", b"a/x", b"a/b/c", b"", b"a//b", b"/a/b", b"x" * 4096, b"a/" * 2048):
        assert find_file(namespace, path) is None
