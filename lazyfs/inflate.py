"""Compressed layers to plain bytes: the whole stream once, noting entry points; later, any span on its own.

Three libraries, each for what only it can do: the system's libz through ctypes tells where deflate blocks
begin (Z_BLOCK; no Python binding offers it), isal decodes a span three times as fast as zlib (measured: 7
against 22 ms for 4.2 MB), backports.zstd is Python 3.14's own zstd module.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
from collections.abc import Iterator
from typing import Protocol, cast

from backports import zstd
from isal import isal_zlib

from lazyfs.core import deflate
from lazyfs.core.deflate import WINDOW_BYTES
from lazyfs.core.index import pack_windows
from lazyfs.core.spans import SPAN_BYTES, WINDOWS_PER_GROUP, Compression, Span
from lazyfs.errors import HostError, ImageError

CHUNK_BYTES = 1 << 20
_IsalError = cast("type[Exception]", isal_zlib.error)  # the package's stubs declare an instance
# Largest window a zstd layer may ask for: RFC 8878 recommends 8 MiB, `zstd --long` writes 128 MiB.
_ZSTD_WINDOW_LOG = 27
# What follows a frame or member is handed back as a copy: small pieces keep layers of many small ones linear.
_PIECE_BYTES = 64 * 1024
# Enough compressed bytes behind an entry point to decode 32 KiB, but for freak streams (then the window stays
# whole).
_PROBE_BYTES = 128 * 1024


class LayerInflater(Protocol):
    """Decodes a whole layer blob in order. Afterwards its spans are described by

    starts: (blob_start, tar_start, shift, needs_window) of each, as core/spans.py takes them,
    window_groups: the windows they need, packed (core/index.py): a bomb of spans stays small in memory.
    """

    starts: list[tuple[int, int, int, bool]]
    window_groups: list[bytes]

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Plain bytes that follow from the next bytes of the blob. Raises ImageError."""

    def finish(self) -> Iterator[bytes]:
        """Call once at the end of the blob; raises ImageError if it is cut short."""


def layer_inflater(compression: Compression) -> LayerInflater:
    """The inflater for a layer stored that way."""
    if compression is Compression.GZIP:
        return GzipInflater()
    return ZstdInflater() if compression is Compression.ZSTD else PlainInflater()


class PlainInflater:
    """An uncompressed layer: there is nothing to do, and nothing to note."""

    def __init__(self) -> None:
        self.starts: list[tuple[int, int, int, bool]] = []
        self.window_groups: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        yield chunk

    def finish(self) -> Iterator[bytes]:
        yield from ()


class ZstdInflater:
    """One or many zstd frames (RFC 8878), skippable ones between them. A span is a group of whole frames."""

    def __init__(self) -> None:
        self.starts: list[tuple[int, int, int, bool]] = []
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
        if self.starts and self._tar_bytes == self.starts[-1][1]:
            return  # only a skippable or empty frame since: the span before begins here just as well
        if not self.starts or self._tar_bytes - self.starts[-1][1] >= SPAN_BYTES:
            self.starts.append((blob_start, self._tar_bytes, 0, False))

    def finish(self) -> Iterator[bytes]:
        if self._in_frame:
            raise ImageError("the zstd layer is cut short")
        if self.starts and self.starts[-1][1] == self._tar_bytes:
            self.starts.pop()  # nothing but skippable frames behind the last data
        yield from ()


class _ZStream(ctypes.Structure):
    """z_stream of zlib.h 1.2."""

    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


_Z_OK, _Z_STREAM_END, _Z_BUF_ERROR, _Z_BLOCK = 0, 1, -5, 5
_GZIP_WBITS = 31


@functools.cache
def _libz() -> ctypes.CDLL:
    """The system's zlib (Debian: zlib1g, always there: dpkg needs it)."""
    try:
        library = ctypes.CDLL(ctypes.util.find_library("z") or "libz.so.1")
    except OSError as error:
        raise HostError(f"cannot load the system's zlib: {error}", "install zlib1g") from None
    for name in ("inflateInit2_", "inflate", "inflateReset", "inflateEnd"):
        getattr(library, name).restype = ctypes.c_int
    return library


class GzipInflater:
    """A gzip layer of one or many members, noting about every SPAN_BYTES a deflate block to enter at."""

    def __init__(self) -> None:
        self.starts: list[tuple[int, int, int, bool]] = []
        self.window_groups: list[bytes] = []
        self._windows: list[bytes] = []  # not packed yet
        self._stream = _ZStream()
        status = _libz().inflateInit2_(
            ctypes.byref(self._stream), _GZIP_WBITS, b"1.2.11", ctypes.c_int(ctypes.sizeof(_ZStream))
        )
        if status != _Z_OK:
            raise HostError(f"zlib cannot be used (status {status})", "install Debian's zlib1g")
        # The first 32 KiB hold what was put out before: the window of an entry point is always at hand.
        self._out = bytearray(WINDOW_BYTES + CHUNK_BYTES)
        self._out_address = ctypes.addressof(ctypes.c_char.from_buffer(self._out))
        self._end = self._given = WINDOW_BYTES  # bytes decoded into / handed out of the buffer
        self._tar_bytes = self._blob_bytes = 0
        self._member_tar_start = 0
        self._member_ended = True
        self._members = 0
        self._padding = False
        self._pending: tuple[int, int, bytes, bytearray] | None = (
            None  # shift, tar, window, blob bytes from there on
        )

    def __del__(self) -> None:
        if self._stream.state:
            _libz().inflateEnd(ctypes.byref(self._stream))

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        source = ctypes.c_char_p(chunk)
        base = ctypes.cast(source, ctypes.c_void_p).value or 0
        at = 0
        if self._pending is not None:
            self._pending[3].extend(chunk[:_PROBE_BYTES])
        while True:
            if self._member_ended:
                if at == len(chunk):
                    break
                if self._padding or (self._members and not chunk[at]):
                    self._pad(chunk[at:])
                    break
                _libz().inflateReset(ctypes.byref(self._stream))
                self._member_ended = False
                self._member_tar_start = self._tar_bytes
            if self._end == len(self._out):
                yield self._take()
                self._slide()
            at, more = self._step(chunk, base, at)
            if not more:
                break
        self._blob_bytes += len(chunk)
        self._resolve(final=False)
        if self._end > self._given:
            yield self._take()

    def _pad(self, rest: bytes) -> None:
        """Zeros behind the last member, as gzip(1) accepts them; nothing else may follow them."""
        self._padding = True
        if rest.strip(b"\0"):
            raise ImageError(f"the gzip layer has garbage behind its data, after {self._blob_bytes} bytes")

    def _step(self, chunk: bytes, base: int, at: int) -> tuple[int, bool]:
        """One call of inflate, up to the next block boundary at most. New position, and whether to go on."""
        stream = self._stream
        stream.next_in, stream.avail_in = base + at, len(chunk) - at
        stream.next_out, stream.avail_out = self._out_address + self._end, len(self._out) - self._end
        status = _libz().inflate(ctypes.byref(stream), _Z_BLOCK)
        produced = len(self._out) - self._end - stream.avail_out
        at = len(chunk) - stream.avail_in
        self._end += produced
        self._tar_bytes += produced
        if status == _Z_STREAM_END:
            self._member_ended = True
            self._members += 1
        elif status == _Z_BUF_ERROR:
            return at, False  # needs more input
        elif status != _Z_OK:
            reason = (stream.msg or b"").decode("ascii", "replace")
            raise ImageError(
                f"the gzip layer is damaged after {self._blob_bytes + at} bytes: {reason or status}"
            )
        elif stream.data_type & 128 and not stream.data_type & 64:
            self._note_block(chunk, at, stream.data_type & 7)
        return at, bool(stream.avail_in) or stream.avail_out == 0 or self._member_ended

    def _note_block(self, chunk: bytes, at: int, unused_bits: int) -> None:
        """A block begins here: `unused_bits` before byte `at` of the chunk."""
        if self.starts and self._tar_bytes - self.starts[-1][1] < SPAN_BYTES:
            return
        self._resolve(final=True)
        fresh = self._tar_bytes == self._member_tar_start
        first = at - 1 if unused_bits else at
        if first < 0:
            return  # the block begins in the chunk before: the next boundary will do
        shift = (8 - unused_bits) % 8
        self.starts.append((self._blob_bytes + first, self._tar_bytes, shift, not fresh))
        if not fresh:
            valid = min(WINDOW_BYTES, self._tar_bytes)
            window = bytes(self._out[self._end - valid : self._end])
            self._pending = (shift, self._tar_bytes, window, bytearray(chunk[first : first + _PROBE_BYTES]))

    def _resolve(self, *, final: bool) -> None:
        """Turns the window of the last entry point into a sparse one, once enough data behind it is known."""
        if self._pending is None:
            return
        shift, tar, window, behind = self._pending
        if not final and self._tar_bytes - tar < WINDOW_BYTES and len(behind) < _PROBE_BYTES:
            return
        self._windows.append(_sparse(shift, window, bytes(behind)))
        self._pending = None
        if len(self._windows) > WINDOWS_PER_GROUP:  # the newest may still be dropped: see finish()
            self.window_groups += pack_windows(self._windows[:WINDOWS_PER_GROUP])
            del self._windows[:WINDOWS_PER_GROUP]

    def _take(self) -> bytes:
        piece = bytes(memoryview(self._out)[self._given : self._end])
        self._given = self._end
        return piece

    def _slide(self) -> None:
        self._out[:WINDOW_BYTES] = self._out[self._end - WINDOW_BYTES : self._end]
        self._end = self._given = WINDOW_BYTES

    def finish(self) -> Iterator[bytes]:
        if not self._member_ended:
            raise ImageError("the gzip layer is cut short")
        self._resolve(final=True)
        if self.starts and self.starts[-1][1] == self._tar_bytes and self.starts.pop()[3]:
            self._windows.pop()  # it was an entry point with no data behind it
        self.window_groups += pack_windows(self._windows)
        yield from ()


def _sparse(shift: int, window: bytes, behind: bytes) -> bytes:
    """The window without the bytes that `behind` (the blob from the entry point on) does not refer to."""

    def decode(dictionary: bytes) -> tuple[bytes, bool]:
        decoder = isal_zlib.decompressobj(-15, zdict=dictionary)
        raw = decoder.decompress(deflate.enter_at(shift, behind[0]) + behind[1:], WINDOW_BYTES)
        return raw, decoder.eof or len(raw) == WINDOW_BYTES

    try:
        plain, complete = decode(window)
        if not complete:
            return window
        high, low = (decode(probe)[0] for probe in deflate.probes())
        sparse = deflate.sparse_window(window, high, low)
        # Cheap, and the only thing a wrong window could do is make a span undecodable for ever.
        return sparse if decode(sparse)[0] == plain else window
    except _IsalError:
        return window


class SpanDecoder:
    """Decodes one span. Feed the blob's bytes of the span in order; get exactly its plain bytes.

    Raises ImageError for data that does not decode, or decodes to less than the span's length; what follows
    the span's plain bytes is ignored. Output comes in pieces of at most CHUNK_BYTES.
    """

    def __init__(self, compression: Compression, span: Span, window: bytes = b"") -> None:
        self._left = span.tar_end - span.tar_start
        self._shift = span.shift
        if compression is Compression.PLAIN:
            self._decode = self._plain
        elif compression is Compression.GZIP:
            self._decode = self._gunzip
            self._inflater = isal_zlib.decompressobj(-15, zdict=window)
            self._entered = False
            self._first_member = True
            self._between = b""  # trailer and header between two gzip members, gathered
            self._rest = b""
        else:
            self._decode = self._unzstd
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

    def finish(self) -> None:
        """Raises ImageError if not all plain bytes came."""
        if self._left:
            raise ImageError(
                "a range of the layer decodes to less than its index says", "index the image again"
            )

    def _plain(self, data: bytes) -> Iterator[bytes]:
        yield data

    def _gunzip(self, data: bytes) -> Iterator[bytes]:
        if not self._entered:
            if not data:
                return
            self._entered = True
            data = deflate.enter_at(self._shift, data[0]) + data[1:]
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
