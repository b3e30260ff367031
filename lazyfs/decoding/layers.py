"""Decodes whole layers in order and notes their entry points. Spans on their own: span.py. Gzip layers: gzipscan.py.

isal decodes spans of gzip layers three times as fast as zlib; backports.zstd is Python 3.14's own zstd module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, cast

from backports import zstd
from isal import isal_zlib

from lazyfs.core.layer.spans import FRAME_SPAN_BYTES, Compression, Point, PointKind
from lazyfs.errors import ImageError

CHUNK_BYTES = 1 << 20
IsalError = cast("type[Exception]", isal_zlib.error)  # the package's stubs declare an instance
# Largest window a zstd layer may ask for, as containerd's and Docker's decoder has it. RFC 8878 recommends 8 MiB, `zstd
# --long` writes 128 MiB. A decoder takes as much memory as it has decoded, up to that.
_ZSTD_WINDOW_LOG = 29
# A decoder returns what follows a frame or member as a copy: small pieces keep layers of many small frames linear.
PIECE_BYTES = 64 * 1024


class LayerInflater(Protocol):
    """Decodes a whole layer blob in order. Afterwards these describe its spans:

    points: entry points and milestones, as core/layer/spans.py takes them,
    window_groups: the windows they need, packed (core/index/windows.py), so that a bomb of spans stays small in memory.
    """

    points: list[Point]
    window_groups: list[bytes]

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Plain bytes that follow from the next bytes of the blob. Raises ImageError."""

    def finish(self) -> Iterator[bytes]:
        """Call once at the end of the blob; raises ImageError if it is cut short."""

    def close(self) -> None:
        """Always call it in the end; a second call does nothing. May take milliseconds."""


def layer_inflater(compression: Compression) -> LayerInflater:
    """The inflater for a layer stored that way. The caller closes it."""
    if compression is Compression.GZIP:
        from lazyfs.decoding.gzipscan import GzipInflater  # here, because a daemon does not need it

        return GzipInflater()
    return ZstdInflater() if compression is Compression.ZSTD else PlainInflater()


class PlainInflater:
    """An uncompressed layer: nothing to decode, no points to note."""

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
    """One or many zstd frames (RFC 8878), perhaps skippable ones between them. A span is a group of whole frames."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.window_groups: list[bytes] = []
        self._decoder = zstd_decoder()
        self._in_frame = False
        self._blob_bytes = self._tar_bytes = 0

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        for at in range(0, len(chunk), PIECE_BYTES):
            piece = chunk[at : at + PIECE_BYTES]
            self._blob_bytes += len(piece)
            while piece or not self._decoder.needs_input:
                if not self._in_frame:
                    self._in_frame = True
                    self._note_start(self._blob_bytes - len(piece))
                raw = zstd_decode(self._decoder, piece)
                self._tar_bytes += len(raw)
                if raw:
                    yield raw
                piece = b""
                if self._decoder.eof:
                    piece = self._decoder.unused_data
                    self._decoder = zstd_decoder()
                    self._in_frame = False

    def _note_start(self, blob_start: int) -> None:
        if self.points and self._tar_bytes == self.points[-1].tar:
            return  # only skippable or empty frames since the last point: it serves for this frame, too
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


def zstd_decoder() -> zstd.ZstdDecompressor:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG})


def zstd_decode(decoder: zstd.ZstdDecompressor, data: bytes) -> bytes:
    try:
        return decoder.decompress(data, CHUNK_BYTES)
    except zstd.ZstdError as error:
        if "too much memory" in str(error):
            raise ImageError(
                f"the zstd layer needs a window of more than {1 << _ZSTD_WINDOW_LOG - 20} MiB",
                "compress it again with a smaller one",
            ) from None
        raise ImageError(f"the zstd layer is damaged ({error})") from None
