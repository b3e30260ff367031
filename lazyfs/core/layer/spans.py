"""Spans: ranges of a compressed layer that can be decoded on their own. The unit of fetching.

A layer is cut into consecutive spans; span i covers the uncompressed bytes [tar_start(i), tar_start(i+1)) and
the blob's bytes [blob_start(i), blob_end(i)). Where a span may start depends on the compression:

    PLAIN  anywhere: spans are computed, none is stored
    GZIP   at a deflate block boundary: a bit offset inside the first byte, and a window (core/layer/deflate.py)
    ZSTD   at the start of a frame

Inside, a span may have milestones: places where decoding may stop, for which the table has the blob offset that
decoding up to there needs.

Stored form (docs/FORMATS.md, "Span table"), one little-endian record a point: blob offset Q, tar offset Q,
shift B, kind B (PointKind), reserved H.
"""

from __future__ import annotations

import enum
import operator
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, compress, islice
from typing import NamedTuple

from lazyfs.errors import ImageError

_RECORD = struct.Struct("<QQBBH")
# Uncompressed distance between two entry points: an indexer chooses the best boundary within. Smaller spans fetch less
# for a scattered read, larger ones keep the index small.
MIN_SPAN_BYTES = 384 * 1024
MAX_SPAN_BYTES = 1152 * 1024
# Smaller than the above, because entering at a frame needs no window.
FRAME_SPAN_BYTES = 128 * 1024
# Uncompressed distance between two milestones.
MILESTONE_BYTES = 32 * 1024
# Uncompressed layers can be cut anywhere. A smaller request takes no less time than one of 256 KiB.
PLAIN_SPAN_BYTES = 256 * 1024
# So many windows are compressed together: one range request also brings the neighbours' windows.
WINDOWS_PER_GROUP = 8
# As many as a layer of 256 GiB has; each takes 32 bytes of memory.
MAX_POINTS = 4_000_000


class Compression(enum.StrEnum):
    """How a layer blob is stored. Its first bytes say it, not its media type."""

    PLAIN = "plain"
    GZIP = "gzip"
    ZSTD = "zstd"


def detect_compression(head: bytes) -> Compression:
    """From the first bytes (4 are enough) of a blob: gzip RFC 1952, zstd RFC 8878 (also skippable frames)."""
    if head[:2] == b"\x1f\x8b":
        return Compression.GZIP
    if head[:4] == b"\x28\xb5\x2f\xfd" or (
        head[1:4] == b"\x2a\x4d\x18" and head[:1] and head[0] & 0xF0 == 0x50
    ):
        return Compression.ZSTD
    return Compression.PLAIN


class PointKind(enum.IntEnum):
    """What a decoder can do at a point of a layer."""

    ENTRY = 0  # begin, knowing nothing
    ENTRY_WITH_WINDOW = 1  # begin, given the window
    MILESTONE = 2  # stop


class Point(NamedTuple):
    """A point of a layer that the index records. The low `shift` bits of byte `blob` lie before the point."""

    blob: int
    tar: int
    shift: int
    kind: PointKind


# For bytes.translate: 1 for the kinds of which that is true, else 0.
_IS_ENTRY = bytes(kind != PointKind.MILESTONE for kind in range(256))
_NEEDS_WINDOW = bytes(kind == PointKind.ENTRY_WITH_WINDOW for kind in range(256))


@dataclass(frozen=True, slots=True)
class Span:
    """One span; ends are exclusive. `window` is its window's number among those of the layer, or None."""

    number: int
    blob_start: int
    blob_end: int
    tar_start: int
    tar_end: int
    shift: int
    window: int | None


class SpanTable:
    """The spans of one layer. Immutable; raises ImageError for damaged records."""

    def __init__(
        self, compression: Compression, blob_bytes: int, tar_bytes: int, records: bytes | memoryview = b""
    ) -> None:
        self.compression = compression
        self.blob_bytes = blob_bytes
        self.tar_bytes = tar_bytes
        if compression is Compression.PLAIN:
            if records or blob_bytes != tar_bytes:
                raise ImageError("an uncompressed layer has no span records")
            self.count = -(-tar_bytes // PLAIN_SPAN_BYTES)
            return
        if len(records) % _RECORD.size or len(records) // _RECORD.size > MAX_POINTS:
            raise ImageError("span table has the wrong length")
        blob, tar = _column(records, 0), _column(records, 2)
        shifts, kinds = (bytes(memoryview(records)[at :: _RECORD.size]) for at in (16, 17))
        reserved = any(any(memoryview(records)[at :: _RECORD.size]) for at in (18, 19))
        if max(shifts, default=0) > 7 or max(kinds, default=0) > PointKind.MILESTONE or reserved:
            raise ImageError("span table has fields of an unknown version")
        self._check(blob, tar, kinds)
        # All points, entries and milestones: where decoding can stop.
        self._stop_tar = tar
        self._stop_blob = array("Q", map(operator.add, blob, map(bool, shifts)))
        entries = kinds.translate(_IS_ENTRY)
        self.count = entries.count(1)
        self._blob = array("Q", compress(blob, entries))
        self._tar = array("Q", compress(tar, entries))
        self._shift = bytes(compress(shifts, entries))
        needs_window = compress(kinds.translate(_NEEDS_WINDOW), entries)
        self._window = array("I", accumulate(needs_window, initial=0))  # number of windows before span i

    def _check(self, blob: array[int], tar: array[int], kinds: bytes) -> None:
        """Refuses points that are out of order or outside the layer."""
        if not kinds:
            if self.tar_bytes:
                raise ImageError("span table has no entry point")
            return
        for values, limit in ((blob, self.blob_bytes), (tar, self.tar_bytes)):
            if not all(map(operator.lt, values, islice(values, 1, None))) or values[-1] >= limit:
                raise ImageError("span table has points out of order or outside the layer")
        if tar[0] or kinds[0] == PointKind.MILESTONE:
            raise ImageError("span table does not begin with the layer")

    @property
    def windows(self) -> int:
        """How many windows the layer has."""
        return 0 if self.compression is Compression.PLAIN else self._window[-1]

    def same_as(self, other: SpanTable) -> bool:
        """Whether both cut the same kind of blob at the same places with the same windows."""
        mine, theirs = ((one.compression, one.blob_bytes, one.tar_bytes, one.count) for one in (self, other))
        if mine != theirs or self.compression is Compression.PLAIN:
            return mine == theirs
        return (self._blob, self._tar, self._shift, self._window, self._stop_tar, self._stop_blob) == (
            other._blob, other._tar, other._shift, other._window, other._stop_tar, other._stop_blob
        )  # fmt: skip

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Span:
        if not 0 <= number < self.count:
            raise IndexError(number)
        if self.compression is Compression.PLAIN:
            start = number * PLAIN_SPAN_BYTES
            end = min(start + PLAIN_SPAN_BYTES, self.tar_bytes)
            return Span(number, start, end, start, end, 0, None)
        last = number == self.count - 1
        blob_end = self.blob_bytes if last else self._blob[number + 1]
        if not last and self._shift[number + 1]:
            blob_end += 1  # the next span begins inside a byte that this one ends in
        window = self._window[number] if self._window[number + 1] > self._window[number] else None
        return Span(
            number,
            self._blob[number],
            blob_end,
            self._tar[number],
            self.tar_bytes if last else self._tar[number + 1],
            self._shift[number],
            window,
        )

    def blob_end_for(self, span: Span, tar_end: int) -> int:
        """The end of the blob range that decoding `span` up to `tar_end` needs: a milestone, or the end of the span."""
        if tar_end >= span.tar_end:
            return span.blob_end
        if self.compression is Compression.PLAIN:
            return span.blob_start + tar_end - span.tar_start
        stop = bisect_left(self._stop_tar, tar_end)
        if stop == len(self._stop_tar) or self._stop_tar[stop] >= span.tar_end:
            return span.blob_end
        return int(self._stop_blob[stop])

    def covering(self, tar_start: int, tar_end: int) -> range:
        """Numbers of the spans that hold the uncompressed bytes [tar_start, tar_end), a range that is not empty."""
        if self.compression is Compression.PLAIN:
            return range(tar_start // PLAIN_SPAN_BYTES, min(self.count, -(-tar_end // PLAIN_SPAN_BYTES)))
        return range(bisect_right(self._tar, tar_start) - 1, bisect_left(self._tar, tar_end))


def _column(records: bytes | memoryview, word: int) -> array[int]:
    """The 64-bit numbers at 32-bit word `word` of all records, made without a Python object for each of millions."""
    words = memoryview(records).cast("I")
    column = array("Q", bytes(8 * (len(records) // _RECORD.size)))
    if column:
        halves = memoryview(column).cast("B").cast("I")
        halves[0::2] = words[word :: _RECORD.size // 4]
        halves[1::2] = words[word + 1 :: _RECORD.size // 4]
    return column


def encode_points(points: Sequence[Point]) -> bytes:
    """The records of a span table. `points` must be ascending."""
    return b"".join(_RECORD.pack(*point, 0) for point in points)
