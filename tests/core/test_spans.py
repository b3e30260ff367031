"""Span tables: every uncompressed byte lies in exactly one span; damage gives ImageError and nothing else."""

from __future__ import annotations

import struct
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.layer.spans import (
    MAX_POINTS,
    PLAIN_SPAN_BYTES,
    Compression,
    Point,
    PointKind,
    SpanTable,
    detect_compression,
    encode_points,
)
from lazyfs.errors import ImageError

TAR_BYTES = BLOB_BYTES = 1 << 30
FIRST = Point(10, 0, 0, PointKind.ENTRY)


@st.composite
def layers(draw: st.DrawFn) -> list[Point]:
    """The points of a layer, entries and milestones mixed."""
    blobs = sorted(draw(st.lists(st.integers(11, BLOB_BYTES - 1), unique=True, max_size=12)))
    tars = sorted(draw(st.lists(st.integers(1, TAR_BYTES - 1), unique=True, max_size=12)))
    kinds = st.sampled_from(PointKind)
    places = zip(blobs, tars, strict=False)
    return [FIRST, *[Point(blob, tar, draw(st.integers(0, 7)), draw(kinds)) for blob, tar in places]]


def table_of(points: list[Point]) -> SpanTable:
    return SpanTable(Compression.GZIP, BLOB_BYTES, TAR_BYTES, encode_points(points))


@given(layers(), st.integers(0, TAR_BYTES - 1), st.integers(1, 5 << 20))
def test_spans_tile_the_layer_and_covering_finds_them(points: list[Point], start: int, size: int) -> None:
    table = table_of(points)
    spans = [table[number] for number in range(len(table))]
    entries = [point for point in points if point.kind is not PointKind.MILESTONE]
    assert [(s.blob_start, s.tar_start, s.shift) for s in spans] == [point[:3] for point in entries]
    assert [s.window is not None for s in spans] == [p.kind is PointKind.ENTRY_WITH_WINDOW for p in entries]
    assert [s.tar_end for s in spans] == [*[s.tar_start for s in spans[1:]], TAR_BYTES]
    for span, after in pairwise(spans):
        assert span.blob_end == after.blob_start + (after.shift > 0)
    assert spans[-1].blob_end == BLOB_BYTES
    assert [s.window for s in spans if s.window is not None] == list(range(table.windows))
    end = min(start + size, TAR_BYTES)
    assert list(table.covering(start, end)) == [
        s.number for s in spans if s.tar_start < end and start < s.tar_end
    ]


@given(layers(), st.data())
def test_a_part_of_a_span_ends_at_the_first_point_behind_it(points: list[Point], data: st.DataObject) -> None:
    table = table_of(points)
    span = table[data.draw(st.integers(0, len(table) - 1))]
    ends = [p.tar for p in points if span.tar_start < p.tar < span.tar_end]
    tar_end = data.draw(st.one_of(st.integers(span.tar_start + 1, TAR_BYTES), st.sampled_from([*ends, span.tar_end])))
    stops = [p.blob + (p.shift > 0) for p in points if tar_end <= p.tar < span.tar_end]
    assert table.blob_end_for(span, tar_end) == min([*stops, span.blob_end])
    assert span.blob_start < table.blob_end_for(span, tar_end) <= span.blob_end


@given(st.integers(0, 3 << 20), st.data())
def test_an_uncompressed_layer_is_cut_anywhere(tar_bytes: int, data: st.DataObject) -> None:
    table = SpanTable(Compression.PLAIN, tar_bytes, tar_bytes)
    spans = [table[number] for number in range(len(table))]
    assert b"".join(bytes(s.blob_end - s.blob_start) for s in spans) == bytes(tar_bytes)
    assert all(s.blob_start == s.tar_start and s.blob_end == s.tar_end and s.window is None for s in spans)
    assert table.windows == 0
    if tar_bytes:
        start = data.draw(st.integers(0, tar_bytes - 1))
        end = data.draw(st.integers(start + 1, tar_bytes))
        expected = [s.number for s in spans if s.tar_start < end and start < s.tar_end]
        assert list(table.covering(start, end)) == expected
        span = spans[expected[0]]
        assert table.blob_end_for(span, end) == min(end, span.blob_end)
    assert all(s.tar_end - s.tar_start <= PLAIN_SPAN_BYTES for s in spans)


@given(layers(), st.data())
def test_damage_gives_an_image_error_or_an_ordered_table(points: list[Point], data: st.DataObject) -> None:
    records = bytearray(encode_points(points))
    for _ in range(data.draw(st.integers(1, 3))):
        records[data.draw(st.integers(0, len(records) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(records)), st.integers(0, len(records))))
    try:
        table = SpanTable(Compression.GZIP, BLOB_BYTES, TAR_BYTES, bytes(records[:end]))
    except ImageError:
        return
    for number in range(len(table)):
        span = table[number]
        assert 0 <= span.blob_start < span.blob_end <= BLOB_BYTES
        assert 0 <= span.tar_start < span.tar_end <= TAR_BYTES
        assert span.blob_start < table.blob_end_for(span, span.tar_start + 1) <= span.blob_end


@given(st.binary(max_size=100))
def test_noise_gives_an_image_error_or_a_table(noise: bytes) -> None:
    for compression in Compression:
        try:
            SpanTable(compression, 4096, 4096, noise)
        except ImageError:
            continue


def record(blob: int, tar: int, shift: int = 0, kind: int = 0, reserved: int = 0) -> bytes:
    return struct.pack("<QQBBH", blob, tar, shift, kind, reserved)


@pytest.mark.parametrize(
    "records",
    [
        record(0, 0, shift=8),
        record(0, 0, kind=3),
        record(0, 0, kind=255),
        record(0, 0, reserved=1),
        record(0, 0, reserved=256),
        record(0, 1),
        record(4096, 0),
        record(0, 0) + record(4095, 4096),
        record(0, 0) + record((1 << 64) - 1, 4000, shift=1),  # a byte further is no 64-bit number
        record(0, 0) + record(9, (1 << 64) - 1),
        record(0, 0) + record(0, 10),
        record(0, 0) + record(10, 0),
        record(0, 0) + record(20, 20, kind=2) + record(20, 30),
        record(0, 0) + record(20, 20) + record(10, 30, kind=2),
        record(0, 0, kind=2),  # milestones only
        record(0, 0, kind=2) + record(10, 10),
        record(0, 0)[:-1],
        record(0, 0) * (MAX_POINTS + 1),
        b"",
    ],
)
def test_records_out_of_range_are_refused(records: bytes) -> None:
    with pytest.raises(ImageError):
        SpanTable(Compression.ZSTD, 4096, 4096, records)


def test_an_empty_layer_has_no_points() -> None:
    assert len(SpanTable(Compression.GZIP, 20, 0)) == 0
    with pytest.raises(ImageError):
        SpanTable(Compression.GZIP, 20, 0, record(0, 0))
    with pytest.raises(ImageError):
        SpanTable(Compression.PLAIN, 20, 20, record(0, 0))
    with pytest.raises(ImageError):
        SpanTable(Compression.PLAIN, 20, 21)


def test_many_points_stay_small_in_memory() -> None:
    count = 150_000
    head = record(0, 0)
    points = b"".join(record(100 * n, 65536 * n, kind=2) for n in range(1, count))
    tracemalloc.start()
    try:
        table = SpanTable(Compression.GZIP, 100 * count, 65536 * count, head + points)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(table) == 1 and table.blob_end_for(table[0], 65536 * 10 - 5) == 1000
    assert peak < 4 * len(points)


def test_same_as_compares_what_a_request_depends_on() -> None:
    points = [
        Point(0, 0, 0, PointKind.ENTRY),
        Point(30, 60, 0, PointKind.MILESTONE),
        Point(50, 100, 3, PointKind.ENTRY_WITH_WINDOW),
    ]
    table = SpanTable(Compression.GZIP, 100, 200, encode_points(points))
    assert table.same_as(SpanTable(Compression.GZIP, 100, 200, encode_points(points)))
    assert not table.same_as(SpanTable(Compression.ZSTD, 100, 200, encode_points(points)))
    for others in (points[:1], points[::2], [points[0], points[1]._replace(shift=1), points[2]]):
        assert not table.same_as(SpanTable(Compression.GZIP, 100, 200, encode_points(others)))
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
