"""Decodes one span of a layer."""

from __future__ import annotations

from collections.abc import Iterator

from isal import isal_zlib

from lazyfs.core.layer import deflate
from lazyfs.core.layer.spans import Compression, Span
from lazyfs.decoding.layers import CHUNK_BYTES, PIECE_BYTES, IsalError, zstd_decode, zstd_decoder
from lazyfs.errors import ImageError


class SpanDecoder:
    """Decodes one span: takes the blob's bytes of the span in order and gives exactly its plain bytes.

    Output comes in pieces of at most CHUNK_BYTES; plain bytes behind the span are ignored. Raises ImageError if the
    data does not decode, or decodes to less than the span.
    """

    def __init__(self, compression: Compression, span: Span, window: bytes = b"") -> None:
        self._left = span.tar_end - span.tar_start
        self._shift = span.shift
        self._compression = compression
        if compression is Compression.GZIP:
            self._inflater = isal_zlib.decompressobj(-15, zdict=window)
            self._entered = False
            self._first_member = True
            self._between = b""  # trailer and header between two gzip members, as far as they were fed
            self._rest = b""
        elif compression is Compression.ZSTD:
            self._zstd = zstd_decoder()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The plain bytes that follow from the next bytes of the span's range of the blob."""
        for raw in self._decode(data):
            if self._left <= 0:
                return
            piece = raw[: self._left]
            self._left -= len(piece)
            if piece:
                yield piece

    @property
    def done(self) -> bool:
        """Whether all plain bytes of the span were given."""
        return self._left <= 0

    def finish(self) -> None:
        """Raises ImageError unless all plain bytes were given."""
        if self._left:
            raise ImageError(
                "a range of the layer decodes to less than its index says", "index the image again"
            )

    def _decode(self, data: bytes) -> Iterator[bytes]:
        # A bound method stored in the object would be a cycle, whose memory waits for the cycle collector.
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
        for at in range(0, len(data), PIECE_BYTES):
            self._rest = data[at : at + PIECE_BYTES]
            while self._rest and self._left > 0:
                if self._inflater.eof and not self._next_member():
                    break
                yield from self._inflate(self._rest)

    def _next_member(self) -> bool:
        """Skips a member's trailer and the next one's header, once both were fed whole. Returns whether it did."""
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
        """Decodes up to the end of the member. Leaves in `_rest` what follows it in `data`."""
        while True:
            try:
                raw = self._inflater.decompress(data, CHUNK_BYTES)
            except IsalError as error:
                raise ImageError(f"a range of the gzip layer does not decode ({error})") from None
            yield raw
            self._rest = self._inflater.unused_data if self._inflater.eof else b""
            data = self._inflater.unconsumed_tail
            if self._inflater.eof or (not data and len(raw) < CHUNK_BYTES):
                return

    def _unzstd(self, data: bytes) -> Iterator[bytes]:
        for at in range(0, len(data), PIECE_BYTES):
            piece = data[at : at + PIECE_BYTES]
            while piece or not self._zstd.needs_input:
                yield zstd_decode(self._zstd, piece)
                piece = b""
                if self._zstd.eof:
                    piece = self._zstd.unused_data
                    self._zstd = zstd_decoder()
