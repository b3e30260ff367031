"""Compressed layers to plain bytes: the whole stream once, noting entry points; later, any span on its own.

isal decodes a span of a gzip layer three times as fast as zlib (measured: 7 against 22 ms for 4.2 MB);
backports.zstd is Python 3.14's own zstd module. How gzip layers are scanned is in gzipscan.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, cast

from backports import zstd
from isal import isal_zlib

from lazyfs.core import deflate
from lazyfs.core.spans import FRAME_SPAN_BYTES, Compression, Point, PointKind, Span
from lazyfs.errors import ImageError

CHUNK_BYTES = 1 << 20
_IsalError = cast("type[Exception]", isal_zlib.error)  # the package's stubs declare an instance
# Largest window a zstd layer may ask for: RFC 8878 recommends 8 MiB, `zstd --long` writes 128 MiB.
_ZSTD_WINDOW_LOG = 27
# What follows a frame or member is handed back as a copy: small pieces keep layers of many small ones linear.
_PIECE_BYTES = 64 * 1024


class LayerInflater(Protocol):
    """Decodes a whole layer blob in order. Afterwards its spans are described by

    points: entry points and milestones, as core/spans.py takes them,
    window_groups: the windows they need, packed (core/index.py): a bomb of spans stays small in memory.
    """

    points: list[Point]
    window_groups: list[bytes]

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Plain bytes that follow from the next bytes of the blob. Raises ImageError."""

    def finish(self) -> Iterator[bytes]:
        """Call once at the end of the blob; raises ImageError if it is cut short."""

    def close(self) -> None:
        """Call at last, whatever happened; again if you like. May take milliseconds."""


def layer_inflater(compression: Compression) -> LayerInflater:
    """The inflater for a layer stored that way. Close it."""
    if compression is Compression.GZIP:
        from lazyfs.gzipscan import GzipInflater  # a daemon needs none of it

        return GzipInflater()
    return ZstdInflater() if compression is Compression.ZSTD else PlainInflater()


class PlainInflater:
    """An uncompressed layer: there is nothing to do, and nothing to note."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.window_groups: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        yield chunk

    def finish(self) -> Iterator[bytes]:
        yield from ()

    def close(self) -> None:
        pass


class ZstdInflater:
    """One or many zstd frames (RFC 8878), skippable ones between them. A span is a group of whole frames."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.window_groups: list[bytes] = []
        self._decoder = _zstd_decoder()
        self._in_frame = False
        self._blob_bytes = self._tar_bytes = 0

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        for at in range(0, len(chunk), _PIECE_BYTES):
            piece = chunk[at : at + _PIECE_BYTES]
            self._blob_bytes += len(piece)
            while piece or not self._decoder.needs_input:
                if not self._in_frame:
                    self._in_frame = True
                    self._note_start(self._blob_bytes - len(piece))
                raw = _zstd_decode(self._decoder, piece)
                self._tar_bytes += len(raw)
                if raw:
                    yield raw
                piece = b""
                if self._decoder.eof:
                    piece = self._decoder.unused_data
                    self._decoder = _zstd_decoder()
                    self._in_frame = False

    def _note_start(self, blob_start: int) -> None:
        if self.points and self._tar_bytes == self.points[-1].tar:
            return  # only a skippable or empty frame since: the span before begins here just as well
        if not self.points or self._tar_bytes - self.points[-1].tar >= FRAME_SPAN_BYTES:
            self.points.append(Point(blob_start, self._tar_bytes, 0, PointKind.ENTRY))

    def finish(self) -> Iterator[bytes]:
        if self._in_frame:
            raise ImageError("the zstd layer is cut short")
        if self.points and self.points[-1].tar == self._tar_bytes:
            self.points.pop()  # nothing but skippable frames behind the last data
        yield from ()

    def close(self) -> None:
        pass


class SpanDecoder:
    """Decodes one span. Feed the blob's bytes of the span in order; get exactly its plain bytes.

    Raises ImageError for data that does not decode, or decodes to less than the span's length; what follows
    the span's plain bytes is ignored. Output comes in pieces of at most CHUNK_BYTES.
    """

    def __init__(self, compression: Compression, span: Span, window: bytes = b"") -> None:
        self._left = span.tar_end - span.tar_start
        self._shift = span.shift
        self._compression = compression
        if compression is Compression.GZIP:
            self._inflater = isal_zlib.decompressobj(-15, zdict=window)
            self._entered = False
            self._first_member = True
            self._between = b""  # trailer and header between two gzip members, gathered
            self._rest = b""
        elif compression is Compression.ZSTD:
            self._zstd = _zstd_decoder()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The next bytes of the span's range of the blob -> plain bytes."""
        for raw in self._decode(data):
            if self._left <= 0:
                return
            piece = raw[: self._left]
            self._left -= len(piece)
            if piece:
                yield piece

    @property
    def done(self) -> bool:
        """Whether all plain bytes of the span came out."""
        return self._left <= 0

    def finish(self) -> None:
        """Raises ImageError if not all plain bytes came."""
        if self._left:
            raise ImageError(
                "a range of the layer decodes to less than its index says", "index the image again"
            )

    def _decode(self, data: bytes) -> Iterator[bytes]:
        # Not a bound method kept in the object: with its memory it would wait for the cycle collector.
        if self._compression is Compression.PLAIN:
            return iter((data,))
        return self._gunzip(data) if self._compression is Compression.GZIP else self._unzstd(data)

    def _gunzip(self, data: bytes) -> Iterator[bytes]:
        if not self._entered:
            if not data:
                return
            self._entered = True
            data = deflate.entered(self._shift, data)
        if self._first_member and not self._inflater.eof:
            yield from self._inflate(data)
            data = self._rest
        for at in range(0, len(data), _PIECE_BYTES):
            self._rest = data[at : at + _PIECE_BYTES]
            while self._rest and self._left > 0:
                if self._inflater.eof and not self._next_member():
                    break
                yield from self._inflate(self._rest)

    def _next_member(self) -> bool:
        """Skips a member's trailer and the header of the next one, once both are here whole."""
        self._between += self._rest
        self._rest = b""
        header = deflate.gzip_header_bytes(self._between[8:]) if len(self._between) > 8 else None
        if header is None:
            return False
        self._rest = self._between[8 + header :]
        self._between = b""
        self._first_member = False
        self._inflater = isal_zlib.decompressobj(-15)
        return True

    def _inflate(self, data: bytes) -> Iterator[bytes]:
        """Decodes up to the end of the member; `_rest` is what follows it in `data`."""
        while True:
            try:
                raw = self._inflater.decompress(data, CHUNK_BYTES)
            except _IsalError as error:
                raise ImageError(f"a range of the gzip layer does not decode ({error})") from None
            yield raw
            self._rest = self._inflater.unused_data if self._inflater.eof else b""
            data = self._inflater.unconsumed_tail
            if self._inflater.eof or (not data and len(raw) < CHUNK_BYTES):
                return

    def _unzstd(self, data: bytes) -> Iterator[bytes]:
        for at in range(0, len(data), _PIECE_BYTES):
            piece = data[at : at + _PIECE_BYTES]
            while piece or not self._zstd.needs_input:
                yield _zstd_decode(self._zstd, piece)
                piece = b""
                if self._zstd.eof:
                    piece = self._zstd.unused_data
                    self._zstd = _zstd_decoder()


def _zstd_decoder() -> zstd.ZstdDecompressor:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG})


def _zstd_decode(decoder: zstd.ZstdDecompressor, data: bytes) -> bytes:
    try:
        return decoder.decompress(data, CHUNK_BYTES)
    except zstd.ZstdError as error:
        raise ImageError(f"the zstd layer is damaged ({error})") from None
