"""Blobs of sections, each compressed by itself: a magic, a JSON header that gives their lengths, the sections.

Little-endian:

    0   8s  magic; names the kind of blob and its version
    8   Q   length of the header as stored
    16      header: zstd frame of a JSON object
            sections, back to back, one zstd frame each

Used by the index of an image (core/index/imageindex.py, and v1.py). The index of a layer (core/index/layerindex.py)
has a form of its own, since its first part must stand alone. Its header and frames are made and read here, too.
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
_LEVEL = 9


def encode_sections(magic: bytes, header: dict[str, Any], raw: Sequence[bytes]) -> bytes:
    """The blob. `header` gets the key "sections": [stored length, plain length] of each. The same input gives the same
    bytes."""
    sections = [compress_quickly(section) for section in raw]
    lengths = [[len(stored), len(plain)] for stored, plain in zip(sections, raw, strict=True)]
    return b"".join((write_header(magic, {**header, "sections": lengths}), *sections))


class Sections:
    """A blob, opened: the header is parsed, sections are decoded on demand. The blob is not copied.

    `what` names the blob in errors, `hint` says what helps if its version is unknown. ImageError: damaged or unknown.
    """

    def __init__(self, blob: bytes, magic: bytes, version: int, what: str, hint: str) -> None:
        self._blob = memoryview(blob)
        self._what = what
        self.header, at = read_header(self._blob, magic, version, what, hint)
        try:
            lengths = [section_lengths(pair) for pair in self.header["sections"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ImageError(f"the header of {what} is damaged ({type(error).__name__})") from None
        self._places: list[tuple[int, int, int]] = []
        for stored, plain in lengths:
            self._places.append((at, stored, plain))
            at += stored
        if at != len(blob):
            raise ImageError(f"the sections of {what} do not add up to its length")

    def __len__(self) -> int:
        return len(self._places)

    def section(self, index: int, limit_bytes: int = MAX_SECTION_BYTES) -> bytes:
        """One section, decoded; ImageError if it is larger than `limit_bytes`."""
        at, stored, plain = self._places[index]
        if plain > limit_bytes:
            raise ImageError(f"a section of {self._what} is too large")
        raw = decompress(self._blob[at : at + stored], plain, self._what)
        if len(raw) != plain:
            raise ImageError(f"a section of {self._what} has the wrong length")
        return raw


def write_header(magic: bytes, header: dict[str, Any]) -> bytes:
    """The beginning of such a blob. The same header gives the same bytes."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    stored = compress(text.encode())
    return _HEAD.pack(magic, len(stored)) + stored


def read_header(
    blob: memoryview, magic: bytes, version: int, what: str, hint: str
) -> tuple[dict[str, Any], int]:
    """The header and where it ends; magic and version are checked. ImageError if damaged or unknown."""
    if len(blob) < _HEAD.size:
        raise ImageError(f"{what} is cut short")
    found, header_bytes = _HEAD.unpack_from(blob)
    if found != magic:
        raise ImageError(f"{what} is of no version that this lazyfs knows", hint)
    if header_bytes > len(blob) - _HEAD.size:
        raise ImageError(f"{what} is cut short")
    end = _HEAD.size + header_bytes
    try:
        header = json.loads(decompress(blob[_HEAD.size : end], _MAX_HEADER_BYTES, what))
        if header["version"] != version:
            raise ImageError(f"{what} has an unknown version", hint)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ImageError(f"the header of {what} is damaged ({type(error).__name__})") from None
    return header, end


def section_lengths(pair: Any) -> tuple[int, int]:
    """Stored and plain length of a section as a header gives them; else ValueError or TypeError."""
    stored, plain = pair
    return number(stored, MAX_STORED_BYTES), number(plain, MAX_SECTION_BYTES)


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


_FRAME: dict[int, int] = {
    zstd.CompressionParameter.compression_level: _LEVEL,
    zstd.CompressionParameter.checksum_flag: 1,
    zstd.CompressionParameter.window_log: 23,
}
# For block tables: other strategies skip the faster the less they find, and miss equal hashes, those of equal blocks,
# which are 7 % of a table.
_HASHES_FRAME: dict[int, int] = {**_FRAME, zstd.CompressionParameter.strategy: zstd.Strategy.btlazy2}
# For namespaces, which each change of an image makes anew: 8 % larger, eight times faster.
_QUICK_FRAME: dict[int, int] = {
    **_FRAME,
    zstd.CompressionParameter.compression_level: 1,
    zstd.CompressionParameter.strategy: zstd.Strategy.fast,
    zstd.CompressionParameter.min_match: 5,
    zstd.CompressionParameter.hash_log: 17,
    zstd.CompressionParameter.target_length: 0,
}


def compress(raw: bytes) -> bytes:
    """One zstd frame with checksum, of a window that `decompress` takes."""
    return zstd.compress(raw, options=_FRAME)


def compress_hashes(raw: bytes) -> bytes:
    """As compress, for what consists of hashes."""
    return zstd.compress(raw, options=_HASHES_FRAME)


def compress_quickly(raw: bytes) -> bytes:
    """As compress, for what is large and made often."""
    return zstd.compress(raw, options=_QUICK_FRAME)


def decompress(stored: bytes | memoryview, limit_bytes: int, what: str) -> bytes:
    """The content of one whole zstd frame, at most `limit_bytes`; never allocates more. `what`: the blob's name in
    errors."""
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
