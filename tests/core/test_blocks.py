"""Block tables: what a builder writes is what a reader sees, and damage gives ImageError and nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.layer.blocks import (
    BLOCK_BYTES,
    MAX_DEVICE_BYTES,
    PAGE_BYTES,
    BlockTable,
    BlockTableBuilder,
    pack_table,
    page_align,
    unpack_table,
)
from lazyfs.errors import ImageError

HEADER_BYTES = 32


@dataclass
class Layout:
    """A table, and the (address, tar_offset, length) of each block in it."""

    table: bytes
    blocks: list[tuple[int, int, int]]


@st.composite
def layouts(draw: st.DrawFn, max_files: int = 8) -> Layout:
    """Files with data and holes, as a layer's scan gives them."""
    builder = BlockTableBuilder()
    blocks: list[tuple[int, int, int]] = []
    tar = 0
    for _ in range(draw(st.integers(0, max_files))):
        stretches = draw(
            st.lists(st.tuples(st.sampled_from([0, 1, 4096, 100_000]), st.integers(1, 600_000)), max_size=3)
        )
        size = sum(gap + data for gap, data in stretches) + draw(st.sampled_from([0, 1, 1 << 33]))
        if not size:
            continue
        address = builder.place(size)
        tar += 512
        for gap, data in stretches:
            address += gap
            while data:
                length = min(data, BLOCK_BYTES)
                builder.add(address, tar, length, hashlib.sha256(b"%d" % tar).digest())
                blocks.append((address, tar, length))
                address, tar, data = address + length, tar + length, data - length
    return Layout(builder.finish(tar + 1024), blocks)


@given(layouts(), st.data())
def test_lookup_finds_exactly_the_blocks_that_share_a_byte(layout: Layout, data: st.DataObject) -> None:
    table = BlockTable(layout.table)
    for place, starts, limit in (
        (table.overlapping, [block[0] for block in layout.blocks], table.device_bytes),
        (
            lambda start, size: table.from_tar(start, start + size),
            [b[1] for b in layout.blocks],
            table.tar_bytes,
        ),
    ):
        start = data.draw(st.integers(0, limit))
        if starts:
            start = data.draw(st.sampled_from(starts)) + data.draw(st.integers(-2, BLOCK_BYTES))
        start = max(0, start)
        size = data.draw(st.integers(1, 3 * BLOCK_BYTES))
        expected = [
            number
            for number, (at, block) in enumerate(zip(starts, layout.blocks, strict=True))
            if at < start + size and start < at + block[2]
        ]
        assert list(place(start, size)) == expected


@given(layouts())
def test_packed_form_gives_the_same_bytes_back(layout: Layout) -> None:
    packed = pack_table(layout.table)
    assert len(packed) == len(layout.table)
    assert unpack_table(packed) == layout.table
    table = BlockTable(layout.table)
    assert [
        (table.addresses[n], table.tar_offsets[n], table.lengths[n]) for n in range(table.count)
    ] == layout.blocks
    assert table.content_root == hashlib.sha256(layout.table).hexdigest()
    for number, (_, tar, _) in enumerate(layout.blocks):
        assert table.digest(number) == hashlib.sha256(b"%d" % tar).digest()


@given(layouts(), st.data())
def test_damage_gives_an_image_error_or_a_table_whose_blocks_lie_inside(
    layout: Layout, data: st.DataObject
) -> None:
    damaged = bytearray(layout.table)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))
    for decode in (bytes, unpack_table):
        try:
            table = BlockTable(decode(bytes(damaged[:end])))
        except ImageError:
            continue
        ends = [0, 0]
        for number in range(table.count):
            assert ends[0] <= table.addresses[number] and ends[1] <= table.tar_offsets[number]
            assert 1 <= table.lengths[number] <= BLOCK_BYTES
            ends = [start[number] + table.lengths[number] for start in (table.addresses, table.tar_offsets)]
        assert ends[0] <= table.device_bytes <= MAX_DEVICE_BYTES and ends[1] <= table.tar_bytes
        assert table.device_bytes % PAGE_BYTES == 0


@given(st.binary(max_size=300))
def test_noise_gives_an_image_error(noise: bytes) -> None:
    for decode in (BlockTable, unpack_table, pack_table):
        with pytest.raises(ImageError):
            decode(noise)


def test_a_table_of_another_version_is_refused() -> None:
    table = BlockTableBuilder().finish(1024)
    with pytest.raises(ImageError, match="known version"):
        BlockTable(table.replace(b"LZFSBT01", b"LZFSBT02"))


def test_files_start_on_pages_and_huge_ones_are_refused() -> None:
    builder = BlockTableBuilder()
    assert [builder.place(size) for size in (1, 4096, 4097)] == [0, 4096, 8192]
    assert page_align(0) == 0 and page_align(4097) == 8192
    with pytest.raises(ImageError, match="8 TiB"):
        builder.place(MAX_DEVICE_BYTES)
