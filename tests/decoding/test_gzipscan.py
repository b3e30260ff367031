"""Where a gzip layer gets its entry points and milestones: few windows, bounded spans, the same ones each time."""

from __future__ import annotations

import functools
import gzip
import random
import zlib
from itertools import pairwise

import pytest

from lazyfs.core.index.windows import unpack_windows
from lazyfs.core.layer.deflate import WINDOW_BYTES
from lazyfs.core.layer.spans import (
    FRAME_SPAN_BYTES,
    MAX_SPAN_BYTES,
    MILESTONE_BYTES,
    MIN_SPAN_BYTES,
    Compression,
    Point,
    PointKind,
    SpanTable,
    encode_points,
)
from lazyfs.decoding import gzipscan, zstream
from lazyfs.decoding.gzipscan import CHUNK_BYTES, GzipInflater
from lazyfs.decoding.span import SpanDecoder

BLOCK_BYTES = 256 * 1024  # no block of zlib's is longer than this for text


@functools.cache
def text(size_bytes: int, seed: int = 1) -> bytes:
    source = random.Random(seed)
    words = [source.randbytes(source.randint(2, 9)).hex().encode() for _ in range(2000)]
    out = bytearray()
    while len(out) < size_bytes:
        out += b" ".join(source.choices(words, k=3000))
    return bytes(out[:size_bytes])


def scan(blob: bytes, chunk_bytes: int = CHUNK_BYTES) -> tuple[GzipInflater, bytes]:
    inflater = GzipInflater()
    try:
        out = [raw for at in range(0, len(blob), chunk_bytes) for raw in inflater.feed(blob[at : at + chunk_bytes])]
        out += inflater.finish()
    finally:
        inflater.close()
    return inflater, b"".join(out)


def entries(points: list[Point]) -> list[Point]:
    return [point for point in points if point.kind is not PointKind.MILESTONE]


def windows(inflater: GzipInflater) -> list[bytes]:
    raw = b"".join(map(unpack_windows, inflater.window_groups))
    return [raw[at : at + WINDOW_BYTES] for at in range(0, len(raw), WINDOW_BYTES)]


def check_spans(inflater: GzipInflater, blob: bytes, plain: bytes) -> SpanTable:
    """Each span decodes on its own; windows and points agree."""
    spans = SpanTable(Compression.GZIP, len(blob), len(plain), encode_points(inflater.points))
    kept = windows(inflater)
    assert len(kept) == spans.windows
    for number in range(len(spans)):
        span = spans[number]
        decoder = SpanDecoder(Compression.GZIP, span, kept[span.window] if span.window is not None else b"")
        out = b"".join(decoder.feed(blob[span.blob_start : span.blob_end]))
        decoder.finish()
        assert out == plain[span.tar_start : span.tar_end]
    return spans


def test_points_lie_as_close_as_they_shall() -> None:
    plain = text(12_000_000)
    blob = gzip.compress(plain, 6, mtime=0)
    inflater, decoded = scan(blob)
    assert decoded == plain
    check_spans(inflater, blob, plain)
    starts = entries(inflater.points)
    for one, other in pairwise(starts):
        assert MIN_SPAN_BYTES <= other.tar - one.tar <= MAX_SPAN_BYTES + BLOCK_BYTES
    for one, other in pairwise(inflater.points):
        assert other.tar - one.tar <= MILESTONE_BYTES + BLOCK_BYTES
    assert len(inflater.points) > 2 * len(starts)


def test_an_entry_point_is_chosen_for_its_window() -> None:
    """Noise does not refer to what is before it: where it begins, nothing of the window is needed."""
    source = random.Random(2)
    plain = b"".join(text(700_000, number) + source.randbytes(150_000) for number in range(6))
    inflater, _ = scan(gzip.compress(plain, 6, mtime=0))
    used = [len(window) - window.count(0) for window in windows(inflater)]
    assert used and sum(used) / len(used) < 1000  # text alone needs several times that
    text_only, _ = scan(gzip.compress(text(len(plain)), 6, mtime=0))
    assert min(len(window) - window.count(0) for window in windows(text_only)) > 1000


@pytest.mark.parametrize("size_bytes", [1000, 60_000, 130_000, 700_000])
def test_members_are_entered_without_a_window(size_bytes: int) -> None:
    plain = text(5_000_000)
    blob = b"".join(gzip.compress(plain[at : at + size_bytes], 6) for at in range(0, len(plain), size_bytes))
    inflater, _ = scan(blob)
    spans = check_spans(inflater, blob, plain)
    assert spans.windows <= len(plain) // MIN_SPAN_BYTES if size_bytes > MIN_SPAN_BYTES else not spans.windows
    for span in map(spans.__getitem__, range(1, len(spans))):
        if span.window is None:
            assert span.tar_start % size_bytes == 0
            assert span.tar_start - spans[span.number - 1].tar_start >= FRAME_SPAN_BYTES
    if size_bytes < MIN_SPAN_BYTES:
        assert all(s.tar_end - s.tar_start < FRAME_SPAN_BYTES + size_bytes for s in map(spans.__getitem__, range(5)))


def test_blocks_of_many_megabytes_become_spans_of_their_own() -> None:
    """The best boundary far back is chosen, and the one that shows it is not lost."""
    deflater = zlib.compressobj(6, zlib.DEFLATED, 31, 9)
    parts = (text(450_000), bytes(7_000_000), text(300_000, 2))
    blob = b"".join(deflater.compress(part) + deflater.flush(zlib.Z_BLOCK) for part in parts) + deflater.flush()
    inflater, decoded = scan(blob)
    assert decoded == b"".join(parts)
    check_spans(inflater, blob, decoded)
    assert [point.tar for point in entries(inflater.points)] == [0, 450_000, 7_450_000]


def stored_blocks(plain: bytes, last_bytes: int) -> bytes:
    """A gzip stream of stored blocks: every boundary lies at a byte. `last_bytes`: of the last one's data."""
    out = bytearray(b"\x1f\x8b\x08\0\0\0\0\0\0\x03")
    cut = len(plain) - last_bytes
    sizes = [min(60_000, cut - at) for at in range(0, cut, 60_000)]
    at = 0
    for size in sizes:
        out += b"\0" + size.to_bytes(2, "little") + (size ^ 0xFFFF).to_bytes(2, "little") + plain[at : at + size]
        at += size
    out += b"\1" + last_bytes.to_bytes(2, "little") + (last_bytes ^ 0xFFFF).to_bytes(2, "little") + plain[at:]
    return bytes(out) + zlib.crc32(plain).to_bytes(4, "little") + len(plain).to_bytes(4, "little")


@pytest.mark.parametrize("chunk_bytes", [60_005, 60_015, 120_010, 10])
def test_boundaries_at_the_ends_of_chunks(chunk_bytes: int) -> None:
    """Nothing is known yet of what is behind such a boundary."""
    plain = random.Random(3).randbytes(1_800_000 if chunk_bytes > 1000 else 500_000)
    blob = stored_blocks(plain, 1000)
    for padding in (b"", bytes(chunk_bytes - 10)):  # the header's length, so that every block ends with a chunk
        inflater, decoded = scan(padded_header(blob, len(padding)), chunk_bytes)
        assert decoded == plain
        check_spans(inflater, padded_header(blob, len(padding)), plain)


def padded_header(blob: bytes, size_bytes: int) -> bytes:
    """The stream with a header that is so much longer (by a comment)."""
    return blob if not size_bytes else blob[:3] + b"\x10" + blob[4:10] + b"c" * (size_bytes - 1) + b"\0" + blob[10:]


def test_an_entry_point_behind_all_data_is_left_out_with_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but empty blocks comes behind the boundary that is the best one, for it needs nothing."""
    monkeypatch.setattr(gzipscan, "_JUDGED_APART_BYTES", 0)
    plain = text(MAX_SPAN_BYTES + 300)
    deflater = zlib.compressobj(6, zlib.DEFLATED, 31)
    blob = deflater.compress(plain) + deflater.flush(zlib.Z_SYNC_FLUSH) + deflater.flush()
    inflater, decoded = scan(blob)
    assert decoded == plain
    assert len(check_spans(inflater, blob, plain)) == 1
    assert len(inflater.points) > 5 and all(point.tar < len(plain) for point in inflater.points)


@pytest.mark.parametrize("level", [1, 6, 9])
def test_the_same_blob_gives_the_same_points_and_windows(level: int) -> None:
    blob = gzip.compress(text(6_000_000), level, mtime=0)
    first, again = scan(blob)[0], scan(blob)[0]
    assert (first.points, first.window_groups) == (again.points, again.window_groups)


def test_the_points_do_not_depend_on_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = text(6_000_000) + random.Random(4).randbytes(300_000) + bytes(5_000_000) + text(2_000_000, 3)
    blob = gzip.compress(plain, 6, mtime=0) + gzip.compress(text(900_000, 5), 9, mtime=0)
    found = []
    for library in (zstream.zlib_ng(), zstream.system_zlib()):
        assert library is not None
        monkeypatch.setattr(zstream, "_library", lambda library=library: library)
        inflater, decoded = scan(blob)
        check_spans(inflater, blob, decoded)
        found.append((inflater.points, inflater.window_groups, decoded))
    assert found[0] == found[1]
