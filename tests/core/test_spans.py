"""Span tables: every uncompressed byte lies in exactly one span; damage gives ImageError and nothing else."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.spans import PLAIN_SPAN_BYTES, Compression, SpanTable, detect_compression, encode_spans
from lazyfs.errors import ImageError

TAR_BYTES = BLOB_BYTES = 1 << 30


@st.composite
def starts(draw: st.DrawFn) -> list[tuple[int, int, int, bool]]:
    places = st.lists(st.integers(1, TAR_BYTES - 1), unique=True, max_size=8)
    blobs, tars = sorted(draw(places)), sorted(draw(places))
    entries = [
        (b, t, draw(st.integers(0, 7)), draw(st.booleans())) for b, t in zip(blobs, tars, strict=False)
    ]
    return [(10, 0, 0, False), *[entry for entry in entries if entry[0] > 10]]


@given(starts(), st.integers(0, TAR_BYTES - 1), st.integers(1, 5 << 20))
def test_spans_tile_the_layer_and_covering_finds_them(
    entries: list[tuple[int, int, int, bool]], start: int, size: int
) -> None:
    table = SpanTable(Compression.GZIP, BLOB_BYTES, TAR_BYTES, encode_spans(entries))
    spans = [table[number] for number in range(len(table))]
    assert [(s.blob_start, s.tar_start, s.shift, s.window is not None) for s in spans] == entries
    assert [s.tar_end for s in spans] == [*[s.tar_start for s in spans[1:]], TAR_BYTES]
    for span, after in pairwise(spans):
        assert span.blob_end == after.blob_start + (after.shift > 0)
    assert [s.window for s in spans if s.window is not None] == list(range(table.windows))
    end = min(start + size, TAR_BYTES)
    assert list(table.covering(start, end)) == [
        s.number for s in spans if s.tar_start < end and start < s.tar_end
    ]


@given(st.integers(0, 3 << 20), st.data())
def test_an_uncompressed_layer_is_cut_anywhere(tar_bytes: int, data: st.DataObject) -> None:
    table = SpanTable(Compression.PLAIN, tar_bytes, tar_bytes)
    spans = [table[number] for number in range(len(table))]
    assert b"".join(bytes(s.blob_end - s.blob_start) for s in spans) == bytes(tar_bytes)
    assert all(s.blob_start == s.tar_start and s.blob_end == s.tar_end and s.window is None for s in spans)
    if tar_bytes:
        start = data.draw(st.integers(0, tar_bytes - 1))
        end = data.draw(st.integers(start + 1, tar_bytes))
        expected = [s.number for s in spans if s.tar_start < end and start < s.tar_end]
        assert list(table.covering(start, end)) == expected
    assert all(s.tar_end - s.tar_start <= PLAIN_SPAN_BYTES for s in spans)


@given(starts(), st.data())
def test_damage_gives_an_image_error_or_an_ordered_table(
    entries: list[tuple[int, int, int, bool]], data: st.DataObject
) -> None:
    records = bytearray(encode_spans(entries))
    records[data.draw(st.integers(0, len(records) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(records)), st.integers(0, len(records))))
    try:
        table = SpanTable(Compression.GZIP, BLOB_BYTES, TAR_BYTES, bytes(records[:end]))
    except ImageError:
        return
    for number in range(len(table)):
        span = table[number]
        assert 0 <= span.blob_start < span.blob_end <= BLOB_BYTES + 1
        assert 0 <= span.tar_start < span.tar_end <= TAR_BYTES


@given(st.binary(max_size=100))
def test_noise_gives_an_image_error_or_a_table(noise: bytes) -> None:
    for compression in Compression:
        try:
            SpanTable(compression, 4096, 4096, noise)
        except ImageError:
            continue


@pytest.mark.parametrize(
    "record",
    [
        struct.pack("<QQBBH", 0, 0, 8, 0, 0),
        struct.pack("<QQBBH", 0, 0, 0, 2, 0),
        struct.pack("<QQBBH", 0, 0, 0, 0, 1),
        struct.pack("<QQBBH", 0, 1, 0, 0, 0),
        struct.pack("<QQBBH", 4096, 0, 0, 0, 0),
        b"",
    ],
)
def test_records_out_of_range_are_refused(record: bytes) -> None:
    with pytest.raises(ImageError):
        SpanTable(Compression.ZSTD, 4096, 4096, record)


def test_same_as_compares_what_a_request_depends_on() -> None:
    records = encode_spans([(0, 0, 0, False), (50, 100, 3, True)])
    table = SpanTable(Compression.GZIP, 100, 200, records)
    assert table.same_as(SpanTable(Compression.GZIP, 100, 200, records))
    assert not table.same_as(SpanTable(Compression.ZSTD, 100, 200, records))
    assert not table.same_as(SpanTable(Compression.GZIP, 100, 200, encode_spans([(0, 0, 0, False)])))
    assert SpanTable(Compression.PLAIN, 9, 9).same_as(SpanTable(Compression.PLAIN, 9, 9))
    assert not SpanTable(Compression.PLAIN, 9, 9).same_as(table)
    with pytest.raises(IndexError):
        table[2]


def test_compression_is_told_by_the_first_bytes() -> None:
    assert detect_compression(b"\x1f\x8b\x08\x00") is Compression.GZIP
    assert detect_compression(b"\x28\xb5\x2f\xfd") is Compression.ZSTD
    assert detect_compression(b"\x5a\x2a\x4d\x18") is Compression.ZSTD  # a skippable frame leads
    assert detect_compression(b"etc/") is Compression.PLAIN
    assert detect_compression(b"") is Compression.PLAIN
