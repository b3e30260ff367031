"""Blobs of sections, each compressed by itself: a magic, a JSON header that gives their lengths, the sections.

Little-endian:

    0   8s  magic; names the kind of blob and its version
    8   Q   length of the header as stored
    16      header: zstd frame of a JSON object
            sections, back to back, one zstd frame each

Used by the index of an image (core/index/blob.py) and the scan of a layer (core/index/scan.py).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

from backports import zstd

from lazyfs.errors import ImageError

MAX_SECTION_BYTES = 1 << 32
MAX_STORED_BYTES = 1 << 30
_HEAD = struct.Struct("<8sQ")
_MAX_HEADER_BYTES = 64 << 20
# Level 9 against 19: 1 % larger, ten times faster; the bulk (hashes) does not compress at all.
LEVEL = 9


def encode_sections(magic: bytes, header: dict[str, Any], raw: Sequence[bytes], level: int = LEVEL) -> bytes:
    """The blob; `header` gets the key "sections": [stored length, plain length] of each. The same input gives the
    same bytes."""
    sections = [compress(section, level) for section in raw]
    lengths = [[len(stored), len(plain)] for stored, plain in zip(sections, raw, strict=True)]
    text = json.dumps({**header, "sections": lengths}, sort_keys=True, separators=(",", ":"))
    stored_header = compress(text.encode(), level)
    return b"".join((_HEAD.pack(magic, len(stored_header)), stored_header, *sections))


class Sections:
    """A blob, opened: the header is parsed, sections are decoded when asked for. The blob is not copied.

    `what` names it in errors, `hint` says what helps when its version is unknown. ImageError: damaged or unknown.
    """

    def __init__(self, blob: bytes, magic: bytes, what: str, hint: str) -> None:
        self._blob = memoryview(blob)
        self._what = what
        if len(blob) < _HEAD.size:
            raise ImageError(f"{what} is cut short")
        found, header_bytes = _HEAD.unpack_from(blob)
        if found != magic:
            raise ImageError(f"{what} is of no version that this lazyfs knows", hint)
        if header_bytes > len(blob) - _HEAD.size:
            raise ImageError(f"{what} is cut short")
        text = decompress(self._blob[_HEAD.size : _HEAD.size + header_bytes], _MAX_HEADER_BYTES, what)
        try:
            header = json.loads(text)
            if header["version"] != 1:
                raise ImageError(f"{what} has an unknown version", hint)
            lengths = [
                (number(a, MAX_STORED_BYTES), number(b, MAX_SECTION_BYTES)) for a, b in header["sections"]
            ]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ImageError(f"the header of {what} is damaged ({type(error).__name__})") from None
        self.header: dict[str, Any] = header
        self._places: list[tuple[int, int, int]] = []
        at = _HEAD.size + header_bytes
        for stored, plain in lengths:
            self._places.append((at, stored, plain))
            at += stored
        if at != len(blob):
            raise ImageError(f"the sections of {what} do not add up to its length")

    def __len__(self) -> int:
        return len(self._places)

    def section(self, index: int) -> bytes:
        """One section, decoded."""
        at, stored, plain = self._places[index]
        raw = decompress(self._blob[at : at + stored], plain, self._what)
        if len(raw) != plain:
            raise ImageError(f"a section of {self._what} has the wrong length")
        return raw


def text(value: object) -> str:
    """A short text of a header; else ValueError."""
    if not isinstance(value, str) or len(value) > 256:
        raise ValueError("not a short text")
    return value


def sha256_hex(value: object) -> str:
    """A sha256 of a header in hexadecimal; else ValueError."""
    found = text(value)
    if len(found) != 64 or found.strip("0123456789abcdef"):
        raise ValueError("not a sha256")
    return found


def number(value: object, limit: int) -> int:
    """A number of a header, from 0 to `limit`; else ValueError."""
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError("not a number in range")
    return value


def compress(raw: bytes, level: int = LEVEL) -> bytes:
    """One zstd frame with checksum, of a window that `decompress` takes."""
    options: dict[int, int] = {
        zstd.CompressionParameter.compression_level: level,
        zstd.CompressionParameter.checksum_flag: 1,
        zstd.CompressionParameter.window_log: 23,
    }
    return zstd.compress(raw, options=options)


def decompress(stored: bytes | memoryview, limit_bytes: int, what: str) -> bytes:
    """One whole zstd frame of at most `limit_bytes` of content; never allocates more than that. `what` it is part of,
    for errors."""
    decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 23})
    try:
        raw = decoder.decompress(stored, limit_bytes + 1)
        if len(raw) <= limit_bytes and not decoder.eof:
            raw += decoder.decompress(b"", 1)
    except zstd.ZstdError as error:
        raise ImageError(f"{what} is damaged ({error})") from None
    if len(raw) > limit_bytes or not decoder.eof or decoder.unused_data:
        raise ImageError(f"a part of {what} is longer or shorter than it says")
    return raw
