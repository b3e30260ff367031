"""What tar headers encode: numbers and checksums, extended (pax) headers, sparse maps.

A pax header is a list of ``LENGTH KEY=VALUE\\n`` records (POSIX.1-2017, pax, "pax Extended Header"). Keys and values
stay bytes, since names need not be UTF-8 (``hdrcharset=BINARY`` says only that). Sparse maps have four encodings (GNU
tar manual, "Storing Sparse Files"); `lay_out` checks them all.

Everything here raises `FormatError` only; reader.py adds the place and turns it into an ImageError.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import unquote_to_bytes

MAX_PAX_BYTES = 1 << 20  # as in Go's archive/tar; without it readers ran out of memory (CVE-2022-2879)
MAX_SEGMENTS = 1 << 18  # bounds memory per file: about 40 MB of Python objects
MAX_FILE_BYTES = 1 << 44  # EROFS: 2**32 blocks of 4 KiB; sums of sizes stay far below 2**63
MAX_XATTR_NAME = 255  # linux/limits.h XATTR_NAME_MAX
MAX_XATTR_BYTES = 1 << 16  # linux/limits.h XATTR_SIZE_MAX

# overlayfs would obey these: with them a layer could redirect a name or hide a directory.
_FORBIDDEN_XATTRS = b"trusted.overlay."
_SCHILY = b"SCHILY.xattr."
_LIBARCHIVE = b"LIBARCHIVE.xattr."
_TIME = re.compile(rb"([+-]?)([0-9]{1,18})(?:\.([0-9]*))?")

Segments = tuple[tuple[int, int, int], ...]


class FormatError(ValueError):
    """The tar breaks its format. The text completes "the layer's tar is damaged: …"."""


def number(value: bytes, what: str) -> int:
    """A number in a header: octal digits between spaces and NULs, or base-256 (GNU and star) within 64 bits."""
    digits = value.strip(b" \0")
    if value[0] & 0x80:
        bits = 8 * len(value) - 1
        result = int.from_bytes(value, "big") & ((1 << bits) - 1)
        if value[0] & 0x40:
            result -= 1 << bits
        if -(2**63) <= result < 2**63:
            return result
    elif not digits:
        return 0
    else:
        digits = digits.partition(b"\0")[0].rstrip(b" ")
        if digits.isdigit() and b"8" not in digits and b"9" not in digits:
            return int(digits, 8)
    raise FormatError(f"{what} is not a valid number")


def check_sum(block: bytes, stored: bytes) -> None:
    """Raises FormatError unless `stored` is the header's checksum, of unsigned or (by old writers) signed bytes."""
    expected = number(stored, "the checksum")
    total = sum(block) - sum(stored) + 8 * 0x20  # the field itself counts as spaces
    if total != expected:
        signed = total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
        if signed != expected:
            raise FormatError("a header's checksum does not match")


def parse_pax(payload: bytes) -> dict[bytes, bytes]:
    """The records of one extended header. The last of equal keys wins.

    Sparse format 0.0 repeats its keys; its pairs become the map of format 0.1.
    """
    records: dict[bytes, bytes] = {}
    pairs: list[bytes] = []
    position = 0
    while position < len(payload):
        space = payload.find(b" ", position, position + 8)
        digits = payload[position : max(space, position)]
        if not digits.isdigit():
            raise FormatError("a pax record has no length")
        end = position + int(digits)
        equals = payload.find(b"=", space + 1, end)
        if end > len(payload) or equals <= space + 1 or payload[end - 1] != 0x0A:
            raise FormatError("a pax record does not have the form LENGTH KEY=VALUE")
        key, value = payload[space + 1 : equals], payload[equals + 1 : end - 1]
        if b"\0" in key:
            raise FormatError("the key of a pax record holds a NUL byte")
        position = end
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            if (key == b"GNU.sparse.offset") != (len(pairs) % 2 == 0):
                raise FormatError("the offsets and lengths of a sparse map do not alternate")
            pairs.append(value)
        else:
            records[key] = value
    if pairs:
        records[b"GNU.sparse.map"] = b",".join(pairs)
    return records


def wrong_gnu_prefix(place: bytes) -> bytes:
    """The beginning of a path that Go's writer before 1.8 (Docker until 1.12) put where the GNU format has two times,
    from byte 345 of the header; empty if these are times.

    Go's reader takes it for a path if one of the times is no number and all is ASCII.
    """
    times = place[:12], place[12:24]
    try:
        for time in times:
            if time[0]:
                number(time, "a time")
    except FormatError:
        prefix = place.partition(b"\0")[0]
        return prefix if prefix.isascii() else b""
    return b""


def decimal(value: bytes, what: str) -> int:
    """A non-negative decimal number of at most 18 digits (so below 2**63)."""
    if not value.isdigit() or len(value) > 18:
        raise FormatError(f"{what} is not a valid number")
    return int(value)


def timestamp(value: bytes) -> tuple[int, int]:
    """A pax time as (seconds, nanoseconds). Nanoseconds are 0..999999999; further digits are cut off."""
    match = _TIME.fullmatch(value)
    if match is None:
        raise FormatError("a pax time is not a decimal number")
    sign, seconds, fraction = match[1], int(match[2]), int(((match[3] or b"") + b"000000000")[:9])
    if sign != b"-":
        return seconds, fraction
    return (-seconds - 1, 1_000_000_000 - fraction) if fraction else (-seconds, 0)


def xattrs(records: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """The extended attributes among the records, in star's encoding, which is raw, or libarchive's.

    An empty value stays one, because a file system had it (GNU tar and containerd agree). In other records an empty
    value means "not given" (POSIX).
    """
    found: dict[bytes, bytes] = {}
    for key, value in records.items():
        if key.startswith(_SCHILY):
            _add_xattr(found, key[len(_SCHILY) :], value)
        elif key.startswith(_LIBARCHIVE):
            name = unquote_to_bytes(key[len(_LIBARCHIVE) :])
            if _SCHILY + name in records:
                continue  # bsdtar writes both
            text = value.rstrip(b"=")  # libarchive leaves the padding out
            try:
                value = base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
            except (binascii.Error, ValueError):
                raise FormatError("the value of an extended attribute is not base64") from None
            _add_xattr(found, name, value)
    return found


def _add_xattr(found: dict[bytes, bytes], name: bytes, value: bytes) -> None:
    if not 0 < len(name) <= MAX_XATTR_NAME or b"\0" in name:
        raise FormatError("the name of an extended attribute is empty, too long or holds a NUL byte")
    if len(value) > MAX_XATTR_BYTES:
        raise FormatError("an extended attribute is larger than 64 KiB")
    if not name.startswith(_FORBIDDEN_XATTRS):
        found[name] = value


def sparse_version(records: Mapping[bytes, bytes]) -> int:
    """0: a plain file. 1: the map is in the records (0.0, 0.1). 2: the map is before the data (1.0)."""
    version = records.get(b"GNU.sparse.major"), records.get(b"GNU.sparse.minor")
    if version == (b"1", b"0"):
        return 2
    if version not in ((None, None), (b"0", b"0"), (b"0", b"1")):
        raise FormatError("a sparse file has an unknown format version")
    return 1 if b"GNU.sparse.map" in records else 0


def sparse_size(records: Mapping[bytes, bytes]) -> int:
    """The logical size of a sparse file in bytes."""
    value = records.get(b"GNU.sparse.realsize", records.get(b"GNU.sparse.size"))
    if value is None:
        raise FormatError("a sparse file does not tell its size")
    return decimal(value, "the size of a sparse file")


def sparse_pairs(values: Sequence[bytes]) -> list[tuple[int, int]]:
    """(offset, length) pairs from alternating decimal numbers."""
    if len(values) % 2 or len(values) > 2 * MAX_SEGMENTS:
        raise FormatError("a sparse map is cut off or too long")
    numbers = [decimal(value, "a number in a sparse map") for value in values]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def gnu_pairs(table: bytes) -> list[tuple[int, int]]:
    """Pairs of an old GNU sparse table, 12 bytes a number. The first empty pair ends it."""
    pairs: list[tuple[int, int]] = []
    for at in range(0, len(table), 24):
        if not table[at] or not table[at + 12]:
            break
        offset = number(table[at : at + 12], "a number in a sparse map")
        pairs.append((offset, number(table[at + 12 : at + 24], "a number in a sparse map")))
    return pairs


def lay_out(pairs: Iterable[tuple[int, int]], size: int, stored: int, tar_offset: int) -> Segments:
    """Checked segments (file offset, tar offset, length) of a file with `stored` bytes at `tar_offset`.

    The pieces must ascend, not overlap, end within `size` and use up exactly the stored bytes. Empty pieces (GNU tar
    marks the end of a file by one) are left out; touching ones are joined.
    """
    segments: list[tuple[int, int, int]] = []
    file_end, tar_end = 0, tar_offset
    for offset, length in pairs:
        if offset < file_end or length < 0 or offset + length > size:
            raise FormatError("the pieces of a sparse file overlap or reach beyond its end")
        if length and segments and offset == file_end:
            before = segments[-1]
            segments[-1] = (before[0], before[1], before[2] + length)
        elif length:
            segments.append((offset, tar_end, length))
        file_end, tar_end = offset + length, tar_end + length
    if tar_end - tar_offset != stored:
        raise FormatError("a sparse map does not fit the stored data")
    return tuple(segments)
