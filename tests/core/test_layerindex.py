"""The index of a layer: what goes in comes out, each part alone; anything else gives ImageError and nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.index.entries import decode_entries, encode_entries
from lazyfs.core.index.layerindex import LayerHead
from lazyfs.core.index.layerscan import LayerScan, encode_layer, entries_of
from lazyfs.core.layer.blocks import BLOCK_BYTES, BlockTable, BlockTableBuilder
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.reader import TarEntry
from lazyfs.core.tar.tree import LayerEntry
from lazyfs.errors import ImageError
from tests.core.indexes import (
    LAYER,
    NO_JSON,
    SCAN,
    TAR_BYTES,
    file_entry,
    make_scan,
    with_header,
    with_header_text,
)

ids = st.integers(0, 2**32 - 2)


@st.composite
def tar_entries(draw: st.DrawFn) -> TarEntry:
    kind = draw(st.sampled_from(Kind))
    return TarEntry(
        path=draw(st.binary(max_size=40)).replace(b"\0", b"/"),
        kind=kind,
        mode=draw(st.integers(0, 0o7777)),
        uid=draw(ids),
        gid=draw(ids),
        size=draw(st.integers(0, 2**20)) if kind is Kind.FILE else 0,
        mtime_s=draw(st.integers(-(2**63), 2**63 - 1)),
        mtime_ns=draw(st.integers(0, 10**9 - 1)),
        target=draw(st.binary(max_size=40)),
        rdev_major=draw(st.integers(0, 4095)),
        rdev_minor=draw(st.integers(0, 2**20 - 1)),
        xattrs=draw(st.dictionaries(st.binary(max_size=10), st.binary(max_size=40), max_size=3)),
    )


def read_all(blob: bytes) -> LayerScan:
    head = LayerHead(blob)
    groups = [blob[group.offset : group.offset + group.length] for group in head.windows]
    for group, stored in zip(head.windows, groups, strict=True):
        group.unpack(stored)
    return LayerScan(head.record, entries_of(head), head.table(), head.spans(), groups)


@given(st.lists(tar_entries(), max_size=6), st.integers(0, 20))
def test_what_goes_in_comes_out(entries: list[TarEntry], windows: int) -> None:
    scan = make_scan(entries, windows)
    blob = encode_layer(scan)
    assert read_all(blob) == scan
    assert encode_layer(scan) == blob


def test_the_head_alone_has_what_a_mount_needs() -> None:
    whole = LayerHead(LAYER)
    for end in (whole.head_bytes, whole.head_bytes + 1, len(LAYER) - 1):
        head = LayerHead(LAYER[:end])
        assert (head.table(), head.spans(), head.windows) == (SCAN.table, SCAN.span_records, whole.windows)
        with pytest.raises(ImageError):
            entries_of(head)
    for length in (whole.head_bytes - 1, 0, 15, 16, 40):
        with pytest.raises(ImageError):
            LayerHead(LAYER[:length])


def test_segments_are_not_kept() -> None:
    entry = TarEntry(b"sparse", Kind.FILE, 0o644, 0, 0, 100, 2, 3, segments=((0, 512, 100),))
    (kept,) = entries_of(LayerHead(encode_layer(make_scan([entry]))))
    assert kept == LayerEntry(dataclasses.replace(entry, segments=()), 0)


def test_numbers_out_of_range_are_an_image_error() -> None:
    for change in ({"mtime_s": 1 << 63}, {"uid": 1 << 32}, {"rdev_major": 1 << 16}, {"mode": -1}):
        entry = dataclasses.replace(TarEntry(b"a", Kind.FIFO, 0, 0, 0, 0, 0, 0), **change)  # type: ignore[arg-type]
        with pytest.raises(ImageError, match="out of range"):
            encode_entries([LayerEntry(entry, 0)], TABLE)


@given(st.integers(0, len(LAYER) - 1), st.integers(1, 255))
def test_a_flipped_byte_changes_nothing_or_is_noticed(at: int, mask: int) -> None:
    damaged = bytearray(LAYER)
    damaged[at] ^= mask
    # A few bits of a zstd frame's header mean nothing; then all that is read is right.
    with contextlib.suppress(ImageError):
        assert read_all(bytes(damaged)) == SCAN
    head = LayerHead(LAYER)
    if head.head_bytes <= at:
        assert LayerHead(bytes(damaged)).table() == SCAN.table
        with pytest.raises(ImageError):
            read_all(bytes(damaged))


@given(st.binary(max_size=200), st.booleans())
def test_noise_gives_an_image_error(noise: bytes, led: bool) -> None:
    with pytest.raises(ImageError):
        read_all(b"LZFSLYR3" + noise if led else noise)


HOSTILE: list[Callable[[dict[str, Any]], object]] = [
    lambda h: h.update(version=2),
    lambda h: h.update(version=4),
    lambda h: h.pop("version"),
    lambda h: h.pop("layer"),
    lambda h: h.update(layer=5),
    lambda h: h["layer"].update(digest="sha256:../../etc"),
    lambda h: h["layer"].update(content_root="a" * 64),
    lambda h: h["layer"].update(device_bytes=4096),
    lambda h: h["layer"].update(device_bytes=5),
    lambda h: h["layer"].update(compression="brotli"),
    lambda h: h.update(table=[1 << 62, 1]),
    lambda h: h["table"].__setitem__(1, 1 << 31),
    lambda h: h["table"].__setitem__(1, 10),
    lambda h: h.update(table=[1]),
    lambda h: h["spans"].__setitem__(0, -1),
    lambda h: h.update(windows=[1 << 29]),
    lambda h: h.update(windows=7),
    lambda h: h["windows"].append(1),
    lambda h: h["windows"].append([1, "0" * 64]),
    lambda h: h["windows"][0].__setitem__(1, "0" * 64),
    lambda h: h["windows"][0].__setitem__(1, "0" * 63),
    lambda h: h["windows"][0].append(1),
    lambda h: h.update(entries_sha256="0" * 64),
    lambda h: h.update(entries=[True, 1]),
    lambda h: h["entries"].__setitem__(1, 1 << 31),
    lambda h: [h],
    lambda h: 7,
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_header_gives_an_image_error(number: int) -> None:
    with pytest.raises(ImageError):
        read_all(with_header(LAYER, HOSTILE[number]))


@pytest.mark.parametrize("text", NO_JSON)
def test_a_header_that_is_no_json_gives_an_image_error(text: bytes) -> None:
    with pytest.raises(ImageError):
        LayerHead(with_header_text(LAYER, text))


def test_unknown_keys_are_ignored() -> None:
    assert read_all(with_header(LAYER, lambda h: h.update(later=[1]))) == SCAN


def test_a_bomb_in_a_header_stays_small() -> None:
    stored = zstd.compress(bytes(200 << 20))
    with pytest.raises(ImageError, match="longer"):
        LayerHead(LAYER[:8] + len(stored).to_bytes(8, "little") + stored)


TABLE = BlockTable(SCAN.table)
RAW = encode_entries(SCAN.entries, TABLE)


@given(st.integers(0, len(RAW) - 1), st.integers(1, 255))
def test_damaged_entries_give_an_image_error_or_entries(at: int, mask: int) -> None:
    """As a checksum would not show: who forges an index makes that right, too."""
    damaged = bytearray(RAW)
    damaged[at] ^= mask
    with contextlib.suppress(ImageError):
        for item in decode_entries(bytes(damaged), TABLE):
            assert item.address + item.entry.size <= TABLE.device_bytes


@given(st.integers(0, len(RAW) - 1), st.binary(max_size=100))
def test_entries_of_the_wrong_length_are_refused(length: int, noise: bytes) -> None:
    for raw in (RAW[:length], noise):
        with pytest.raises(ImageError):
            decode_entries(raw, TABLE)


def test_entries_of_another_layer_are_refused() -> None:
    with pytest.raises(ImageError, match="do not fit"):
        decode_entries(RAW, BlockTable(make_scan([file_entry(b"a", 5000), file_entry(b"b", 5000)]).table))


def test_files_of_any_layout_of_blocks_keep_their_sizes() -> None:
    """Those that are as large as their blocks, and sparse ones, whose holes may be anywhere."""
    entries, builder = [], BlockTableBuilder()
    tar_offset = 512
    for number, (size, pieces) in enumerate(
        [
            (1, [(0, 1)]),
            (BLOCK_BYTES, [(0, BLOCK_BYTES)]),
            (BLOCK_BYTES, [(0, BLOCK_BYTES)]),  # at the next address, but not at once in the tar
            (BLOCK_BYTES + 1, [(0, BLOCK_BYTES), (BLOCK_BYTES, 1)]),
            (3 * BLOCK_BYTES, [(0, BLOCK_BYTES)]),  # a hole at the end
            (9000, [(8192, 808)]),  # and before
            (9000, []),  # and nothing else
            (2 * BLOCK_BYTES, [(0, BLOCK_BYTES), (BLOCK_BYTES, BLOCK_BYTES)]),
            (0, []),
            (5, [(0, 5)]),
        ]
    ):
        entries.append(LayerEntry(file_entry(b"%d" % number, size), builder.place(size) if size else 0))
        for at, length in pieces:
            builder.add(entries[-1].address + at, tar_offset, length, bytes(32))
            tar_offset += length
        tar_offset += 512 + -tar_offset % 512
    table = BlockTable(builder.finish(TAR_BYTES))
    assert decode_entries(encode_entries(entries, table), table) == entries


def test_paths_share_what_they_have_in_common_with_the_one_before() -> None:
    paths = [b"", b"a", b"a/b", b"a/bc", b"a/bd", b"b", b"b" * 4096, b"b" * 4095 + b"c", b"c"]
    items = [LayerEntry(TarEntry(path, Kind.DIR, 0, 0, 0, 0, 0, 0), 0) for path in paths]
    table = BlockTable(BlockTableBuilder().finish(0))
    raw = encode_entries(items, table)
    assert decode_entries(raw, table) == items
    assert len(raw) < 4096 + 1000
