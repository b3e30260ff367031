"""Entering deflate streams at any bit, sparse windows, gzip headers."""

from __future__ import annotations

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.layer import deflate
from lazyfs.errors import ImageError


@pytest.mark.parametrize("shift", range(8))
def test_prefix_decodes_to_nothing_and_stops_at_the_bit(shift: int) -> None:
    # A final stored block from bit `shift` on: its header, then padding up to the byte boundary.
    header = 0b001 << shift
    first, second = header & 0xFF, header >> 8
    stored = b"\x05\x00\xfa\xffhello"
    tail = stored if shift <= 5 else bytes([second]) + stored
    garbage = (1 << shift) - 1  # bits of the block before
    for decode in (zlib.decompressobj(-15), zlib.decompressobj(-15)):
        data = deflate.entered(shift, bytes([first | garbage]) + tail)
        assert decode.decompress(data) == b"hello"
        assert decode.eof


def test_probes_name_every_position_once() -> None:
    high, low = deflate.probes()
    pairs = list(zip(high, low, strict=True))
    assert len(set(pairs)) == len(pairs) == deflate.WINDOW_BYTES
    assert all(a != b for a, b in pairs)


@given(st.lists(st.integers(0, deflate.WINDOW_BYTES - 1), max_size=50), st.binary(min_size=1, max_size=50))
def test_sparse_window_keeps_what_is_copied(copied: list[int], literal: bytes) -> None:
    window = bytes(1 + p % 255 for p in range(deflate.WINDOW_BYTES))
    high, low = deflate.probes()
    decoded = [literal + bytes(probe[p] for p in copied) for probe in (high, low)]
    sparse = deflate.sparse_window(window, *decoded)
    assert [p for p, byte in enumerate(sparse) if byte] == sorted(set(copied))
    assert all(sparse[p] == window[p] for p in copied)


def test_sparse_window_refuses_copies_from_before_a_short_window() -> None:
    high, low = deflate.probes()
    with pytest.raises(ImageError):
        deflate.sparse_window(b"x" * 100, high[:1], low[:1])
    assert deflate.sparse_window(b"x" * 100, high[-1:], low[-1:]) == bytes(99) + b"x"


HEADERS = [
    b"\x1f\x8b\x08\x00\0\0\0\0\0\x03",
    b"\x1f\x8b\x08\x08\0\0\0\0\0\x03name.tar\0",
    b"\x1f\x8b\x08\x10\0\0\0\0\0\x03comment\0",
    b"\x1f\x8b\x08\x04\0\0\0\0\0\x03\x06\x00BC\x02\x00\x1b\x00",
    b"\x1f\x8b\x08\x04\0\0\0\0\0\x03\x00\x00",
    b"\x1f\x8b\x08\x1e\0\0\0\0\0\x03\x02\x00xynameand\0\0cc",
]


@given(st.sampled_from(HEADERS), st.binary(max_size=20))
def test_header_length_is_known_once_all_of_it_is_here(header: bytes, behind: bytes) -> None:
    assert deflate.gzip_header_bytes(header + behind) == len(header)
    for end in range(len(header)):
        assert deflate.gzip_header_bytes(header[:end]) is None


@given(st.binary(max_size=64))
def test_noise_is_a_header_or_an_image_error(noise: bytes) -> None:
    try:
        length = deflate.gzip_header_bytes(b"\x1f\x8b\x08" + noise)
        assert length is None or 10 <= length <= 3 + len(noise)
        deflate.gzip_header_bytes(noise)
    except ImageError:
        return


def test_a_real_header_and_an_endless_name() -> None:
    data = gzip.compress(b"x" * 100, mtime=0)
    length = deflate.gzip_header_bytes(data)
    assert length is not None
    assert zlib.decompressobj(-15).decompress(data[length:]) == b"x" * 100
    with pytest.raises(ImageError, match="longer"):
        deflate.gzip_header_bytes(b"\x1f\x8b\x08\x08\0\0\0\0\0\x03" + b"n" * (1 << 20))
