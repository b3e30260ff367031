"""Spans: ranges of a compressed layer that can be decoded on their own. The unit of fetching.

A layer is cut into consecutive spans; span i covers the uncompressed bytes [tar_start(i), tar_start(i+1)) and
the blob's bytes [blob_start(i), blob_end(i)). What starts a span depends on how the layer is compressed:

    PLAIN  nothing: every byte stands where it is (spans are computed, none is stored)
    GZIP   a deflate block boundary: a bit offset inside the first byte, and a window (core/deflate.py)
    ZSTD   the start of a frame

Stored form (docs/FORMATS.md, "Span table"), one little-endian record a span: blob_start Q, tar_start Q,
shift B, window_bytes B, reserved H. window_bytes is 1 if the span needs a window and 0 if not.
"""

from __future__ import annotations

import enum
import operator
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from lazyfs.errors import ImageError

_RECORD = struct.Struct("<QQBBH")
# Uncompressed distance between two entry points. Smaller spans fetch less for a scattered read, larger ones
# keep the index small.
SPAN_BYTES = 1 << 20
# Uncompressed layers can be cut anywhere: as small as a request is still worth (measured: below 256 KiB the
# time of a request on loopback no longer falls).
PLAIN_SPAN_BYTES = 256 * 1024
# Windows are compressed together by this many: one range request brings the neighbours' too.
WINDOWS_PER_GROUP = 32
MAX_SPANS = 16_000_000


class Compression(enum.StrEnum):
    """How a layer blob is stored. Found from its first bytes, not from its media type."""

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


@dataclass(frozen=True, slots=True)
class Span:
    """One span; ends are exclusive. `window` is the number of its window among the layer's windows,
    or None.
    """

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
        if len(records) % _RECORD.size or len(records) // _RECORD.size > MAX_SPANS:
            raise ImageError("span table has the wrong length")
        rows = list(_RECORD.iter_unpack(records))
        self.count = len(rows)
        self._blob = array("Q", [row[0] for row in rows])
        self._tar = array("Q", [row[1] for row in rows])
        self._shift = bytes(row[2] & 0xFF for row in rows)
        windowed = bytes(row[3] for row in rows)
        self._window = array("I", [0])  # windows before span i
        for flag in windowed:
            self._window.append(self._window[-1] + flag)
        self._check(windowed, any(row[4] for row in rows))

    def _check(self, windowed: bytes, reserved: bool) -> None:
        if reserved or any(shift > 7 for shift in self._shift) or any(flag > 1 for flag in windowed):
            raise ImageError("span table has fields of an unknown version")
        if not self.count:
            if self.tar_bytes:
                raise ImageError("span table is empty")
            return
        ascending = all(
            all(map(operator.lt, starts, islice(starts, 1, None))) for starts in (self._blob, self._tar)
        )
        if (
            not ascending
            or self._tar[0]
            or self._blob[-1] >= self.blob_bytes
            or self._tar[-1] >= self.tar_bytes
        ):
            raise ImageError("span table has spans out of order or outside the layer")

    @property
    def windows(self) -> int:
        """How many windows the layer has."""
        return 0 if self.compression is Compression.PLAIN else self._window[-1]

    def same_as(self, other: SpanTable) -> bool:
        """Whether both cut the same kind of blob at the same places."""
        mine, theirs = ((one.compression, one.blob_bytes, one.tar_bytes, one.count) for one in (self, other))
        if mine != theirs or self.compression is Compression.PLAIN:
            return mine == theirs
        return (self._blob, self._tar, self._shift, self._window) == (
            other._blob, other._tar, other._shift, other._window
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

    def covering(self, tar_start: int, tar_end: int) -> range:
        """Numbers of the spans that hold the uncompressed bytes [tar_start, tar_end), which is not empty."""
        if self.compression is Compression.PLAIN:
            return range(tar_start // PLAIN_SPAN_BYTES, min(self.count, -(-tar_end // PLAIN_SPAN_BYTES)))
        return range(bisect_right(self._tar, tar_start) - 1, bisect_left(self._tar, tar_end))


def encode_spans(starts: Sequence[tuple[int, int, int, bool]]) -> bytes:
    """Records from (blob_start, tar_start, shift, needs_window), ascending."""
    return b"".join(_RECORD.pack(blob, tar, shift, needs, 0) for blob, tar, shift, needs in starts)
