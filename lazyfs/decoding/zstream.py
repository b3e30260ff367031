"""zlib's inflate through ctypes, because no Python binding can stop at each deflate block (Z_BLOCK).

zlib-ng decodes twice as fast as Debian's zlib, and its Python package exports the C functions from its extension
module. If a wheel hides them, the system's libz serves, and `lazyfs doctor` says so. Both stop at the same places, so
an index does not depend on which was used.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
from typing import NamedTuple

from lazyfs.errors import HostError

_GZIP_BITS, _RAW_BITS = 31, -15
_Z_OK, _Z_STREAM_END, _Z_BUF_ERROR = 0, 1, -5
_Z_NO_FLUSH, _Z_BLOCK = 0, 5
_FIELDS = (
    ("next_in", ctypes.c_void_p),
    ("avail_in", ctypes.c_uint32),
    ("total_in", ctypes.c_size_t),
    ("next_out", ctypes.c_void_p),
    ("avail_out", ctypes.c_uint32),
    ("total_out", ctypes.c_size_t),
    ("msg", ctypes.c_char_p),
    ("state", ctypes.c_void_p),
    ("zalloc", ctypes.c_void_p),
    ("zfree", ctypes.c_void_p),
    ("opaque", ctypes.c_void_p),
    ("data_type", ctypes.c_int),
)


class _Stream(ctypes.Structure):
    """z_stream of zlib.h 1.2."""

    _fields_ = (*_FIELDS, ("adler", ctypes.c_ulong), ("reserved", ctypes.c_ulong))


class _NgStream(ctypes.Structure):
    """zng_stream of zlib-ng.h 2."""

    _fields_ = (*_FIELDS, ("adler", ctypes.c_uint32), ("reserved", ctypes.c_ulong))


class _Library:
    """The C functions of one of the two libraries. Raises OSError, AttributeError: they cannot be called."""

    def __init__(self, path: str, prefix: str, stream: type[_Stream | _NgStream]) -> None:
        functions = ctypes.CDLL(path)  # not PyDLL: other threads run while it decodes
        version = getattr(functions, "zlibng_version" if prefix else "zlibVersion")
        version.restype = ctypes.c_char_p
        if not version().startswith(b"2." if prefix else b"1."):  # whose structures we know
            raise OSError(f"an unknown version of {path}")
        self.stream = stream
        self.init = getattr(functions, prefix + ("inflateInit2" if prefix else "inflateInit2_"))
        self.init_arguments = () if prefix else (b"1.2.11", ctypes.c_int(ctypes.sizeof(stream)))
        self.inflate = getattr(functions, prefix + "inflate")
        self.reset = getattr(functions, prefix + "inflateReset")
        self.set_dictionary = getattr(functions, prefix + "inflateSetDictionary")
        self.end = getattr(functions, prefix + "inflateEnd")


def zlib_ng() -> _Library | None:
    """zlib-ng from its Python package; None if it is missing or hides its C functions."""
    try:
        module = importlib.util.find_spec("zlib_ng.zlib_ng")
        return _Library(module.origin, "zng_", _NgStream) if module is not None and module.origin else None
    except (ImportError, OSError, AttributeError):
        return None


def system_zlib() -> _Library:
    """Debian's zlib1g, always there: dpkg needs it."""
    try:
        return _Library(ctypes.util.find_library("z") or "libz.so.1", "", _Stream)
    except (OSError, AttributeError) as error:
        raise HostError(f"cannot load the system's zlib: {error}", "install zlib1g") from None


@functools.cache
def _library() -> _Library:
    return zlib_ng() or system_zlib()


class DeflateError(Exception):
    """The data is not a valid stream."""


class Step(NamedTuple):
    """What one call did. `boundary` is None unless a block begins here; then it is how many bits of the last taken byte
    belong to that block."""

    taken_bytes: int
    given_bytes: int
    boundary: int | None
    ended: bool


class ZStream:
    """One inflate stream: gzip members, whose checksums it compares, or raw. For one thread at a time."""

    def __init__(self, *, raw: bool) -> None:
        """Raises HostError: there is no zlib, or no memory."""
        self._library = _library()
        self._stream = self._library.stream()
        self._reference = ctypes.byref(self._stream)
        bits = ctypes.c_int(_RAW_BITS if raw else _GZIP_BITS)
        status = self._library.init(self._reference, bits, *self._library.init_arguments)
        if status != _Z_OK:
            raise HostError(f"zlib cannot be used (status {status})", "install Debian's zlib1g")

    def __del__(self) -> None:
        if hasattr(self, "_reference") and self._stream.state:
            self._library.end(self._reference)

    def reset(self) -> None:
        """Begins a new stream."""
        self._library.reset(self._reference)

    def step(self, source: int, source_bytes: int, target: int, room_bytes: int) -> Step:
        """Decodes from one address to another, up to the next block boundary at most. Raises DeflateError."""
        stream = self._stream
        stream.next_in, stream.avail_in = source, source_bytes
        stream.next_out, stream.avail_out = target, room_bytes
        status = self._library.inflate(self._reference, _Z_BLOCK)
        if status not in (_Z_OK, _Z_STREAM_END, _Z_BUF_ERROR):
            raise DeflateError((stream.msg or b"").decode("ascii", "replace") or f"status {status}")
        # zlib.h, inflate(): 128 is added at the end of a block, 64 in its last one.
        at_boundary = status == _Z_OK and stream.data_type & 192 == 128
        return Step(
            source_bytes - stream.avail_in,
            room_bytes - stream.avail_out,
            stream.data_type & 7 if at_boundary else None,
            status == _Z_STREAM_END,
        )

    def decode(self, data: bytes, dictionary: bytes, limit_bytes: int) -> tuple[bytes, bool]:
        """Decodes a raw stream behind `dictionary` (at most 32 KiB) up to `limit_bytes`. The second value says whether
        the output is complete: it reached the limit or the stream's end. Raises DeflateError."""
        stream = self._stream
        self._library.reset(self._reference)
        self._library.set_dictionary(self._reference, dictionary, len(dictionary))
        out = ctypes.create_string_buffer(limit_bytes)
        source = ctypes.c_char_p(data)
        stream.next_in, stream.avail_in = ctypes.cast(source, ctypes.c_void_p).value, len(data)
        stream.next_out, stream.avail_out = ctypes.addressof(out), limit_bytes
        status = self._library.inflate(self._reference, _Z_NO_FLUSH)
        if status not in (_Z_OK, _Z_STREAM_END, _Z_BUF_ERROR):
            raise DeflateError((stream.msg or b"").decode("ascii", "replace") or f"status {status}")
        given_bytes = limit_bytes - stream.avail_out
        return ctypes.string_at(out, given_bytes), status == _Z_STREAM_END or given_bytes == limit_bytes
