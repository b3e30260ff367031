"""Entering a deflate stream in the middle, and what that costs (RFC 1951, RFC 1952).

A deflate block may start at any bit. Stock zlib or ISA-L can start decoding there if it is given

- the last 32 KiB of output before that point (the *window*), and
- the stream from that bit on, *at the same bit position within its byte*: a stored block skips to the next byte
  boundary, so shifting the stream to bit 0 breaks every stored block behind the entry point.

Hence a sequence of empty blocks, of the right length, replaces the low bits of the first byte.
"""

from __future__ import annotations

import functools
from array import array

from lazyfs.errors import ImageError

WINDOW_BYTES = 32768

_FIXED_EMPTY = ((0b010, 3), (0, 7))  # not final, fixed codes, end of block: 10 bits


def _dynamic_empty() -> tuple[tuple[int, int], ...]:
    """An empty block with dynamic codes, 93 bits long: fixed blocks (10 bits) cannot give an odd length.

    Code lengths alphabet: only the symbols 18 and 1, one bit each (complete, as zlib demands). Literal lengths: 256
    zeros as two runs (138 + 118), then length 1 for end-of-block; one distance code of length 1. It has all 19 code
    length entries, where 18 would do, to make the length odd.
    """
    lengths = [0] * 19
    lengths[2] = lengths[17] = 1  # positions of the symbols 18 and 1 in RFC 1951's order (3.2.7)
    head = ((0b100, 3), (0, 5), (0, 5), (15, 4), *((length, 3) for length in lengths))
    runs = ((1, 1), (138 - 11, 7), (1, 1), (118 - 11, 7), (0, 1), (0, 1))
    return (*head, *runs, (0, 1))


def _prefix(shift: int) -> tuple[bytes, int]:
    """Whole bytes of empty blocks, and the `shift` bits that follow them."""
    value = bits = 0
    parts = _dynamic_empty() if shift % 2 else ()
    while True:
        for number, width in parts:
            value |= number << bits
            bits += width
        if bits % 8 == shift:
            break
        parts = _FIXED_EMPTY
    raw = value.to_bytes(bits // 8 + 1, "little")
    return raw[:-1], raw[-1]


_PREFIXES = tuple(_prefix(shift) for shift in range(8))


def entered(shift: int, stream: bytes) -> bytes:
    """The bytes to feed a raw inflater, for a stream whose first byte has `shift` low bits of the block before.

    `shift` is 0..7, `stream` not empty. Empty blocks, which decode to nothing, replace these bits.
    """
    whole, low_bits = _PREFIXES[shift]
    return whole + bytes([low_bits | (stream[0] & (0xFF << shift) & 0xFF)]) + stream[1:]


@functools.cache
def probes() -> tuple[bytes, bytes]:
    """Two windows, (high, low), that show which bytes of the true window a decoder copies.

    Position p reads as the pair (p // 128, p // 128 + 1 + p % 128), whose numbers are never equal. A byte that does not
    come from the window is the same in both outputs. Cached, not a constant, because only indexing needs them.
    """
    high = bytes(p >> 7 for p in range(WINDOW_BYTES))
    return high, bytes(((p >> 7) + 1 + (p & 127)) & 0xFF for p in range(WINDOW_BYTES))


@functools.cache
def _positions() -> array[int]:
    """From pairs, as numbers in the host's byte order, to positions in the window; WINDOW_BYTES for any other pair."""
    places = array("H", [WINDOW_BYTES]) * 65536
    for position, pair in enumerate(_pairs(*probes())):
        places[pair] = position
    return places


def _pairs(high: bytes, low: bytes) -> array[int]:
    pairs = bytearray(2 * len(high))
    pairs[0::2] = high
    pairs[1::2] = low
    return array("H", bytes(pairs))  # iterates three times as fast as a memoryview


def sparse_window(window: bytes, high: bytes, low: bytes) -> bytes:
    """The window, in which every byte is zeroed that the data behind the entry point never copies: 9 of 10.

    `high` and `low` are the first 32 KiB behind the entry point, decoded with the probes as windows. A distance is at
    most 32 KiB, so later data cannot reach into the window directly; a copy of a copy keeps the pair. Raises
    ImageError if that data refers to bytes before the window, which is shorter at the start of a stream.
    """
    size = min(len(low), len(high))
    mask = bytearray(WINDOW_BYTES + 1)
    for place in map(_positions().__getitem__, set(_pairs(high[:size], low[:size]))):
        mask[place] = 0xFF
    padding = WINDOW_BYTES - len(window)
    if any(mask[:padding]):
        raise ImageError("gzip stream refers to data before its start")
    sparse = int.from_bytes(window, "little") & int.from_bytes(mask[padding:WINDOW_BYTES], "little")
    return sparse.to_bytes(len(window), "little")


def gzip_header_bytes(data: bytes) -> int | None:
    """Length of the gzip member header at the start of `data` (RFC 1952, 2.3); None if `data` ends within it.

    Raises ImageError if it is no gzip header.
    """
    if data[:3] != b"\x1f\x8b\x08"[: len(data[:3])]:
        raise ImageError("layer is not a gzip stream where one must begin")
    if len(data) < 10:
        return None
    flags = data[3]
    if flags & 0xE0:
        raise ImageError("gzip header has reserved flags")
    at = 10
    if flags & 4:
        if len(data) < at + 2:
            return None
        at += 2 + int.from_bytes(data[at : at + 2], "little")
    for flag in (8, 16):  # file name, comment: up to a NUL
        if flags & flag:
            end = data.find(b"\0", at)
            if end < 0:
                if len(data) > 1 << 20:
                    raise ImageError("gzip header is longer than 1 MiB")
                return None
            at = end + 1
    if flags & 2:
        at += 2
    return at if at <= len(data) else None
