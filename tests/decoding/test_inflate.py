"""Layers compressed by every tool decode to the same bytes, as a stream and span by span; damage is
noticed.
"""

from __future__ import annotations

import functools
import gc
import gzip
import random
import resource
import struct
import subprocess
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyfs.core.index.windows import unpack_windows
from lazyfs.core.layer.deflate import WINDOW_BYTES
from lazyfs.core.layer.spans import Compression, PointKind, SpanTable, detect_compression, encode_points
from lazyfs.decoding.layers import CHUNK_BYTES, layer_inflater
from lazyfs.decoding.span import SpanDecoder
from lazyfs.errors import ImageError

MEBIBYTE = 1 << 20


@functools.cache
def plain() -> bytes:
    """4.5 MiB in which everything occurs: text, noise (stored blocks), zeros, repeats at long distances."""
    source = random.Random(1)
    words = [source.randbytes(source.randint(2, 12)).hex().encode() for _ in range(3000)]
    parts: list[bytes] = []
    while sum(len(part) for part in parts) < 4_500_000:
        parts.append(b" ".join(source.choices(words, k=source.randint(1, 20_000))))
        parts.append(source.randbytes(source.choice([10, 3000, 70_000, 200_000])))
        parts.append(bytes(source.choice([1, 5000, 400_000])))
        parts.append(b"".join(parts)[-30_000:-5000])
    return b"".join(parts)


def tool(*command: str) -> Callable[[], bytes]:
    return lambda: subprocess.run(command, input=plain(), stdout=subprocess.PIPE, check=True).stdout


def deflated(level: int, strategy: int = zlib.Z_DEFAULT_STRATEGY, memory: int = 8) -> Callable[[], bytes]:
    def compress() -> bytes:
        deflater = zlib.compressobj(level, zlib.DEFLATED, 31, memory, strategy)
        return deflater.compress(plain()) + deflater.flush()

    return compress


def flushed(mode: int) -> bytes:
    """Flushes in odd places: empty stored blocks, which begin and end at bytes whatever was before."""
    deflater = zlib.compressobj(6, zlib.DEFLATED, 31)
    pieces = [
        deflater.compress(plain()[at : at + 77_777]) + deflater.flush(mode)
        for at in range(0, len(plain()), 77_777)
    ]
    return b"".join(pieces) + deflater.flush()


def odd_stored() -> bytes:
    """Stored blocks behind odd bit positions: levels change between 0 and 9 within one stream."""
    out = []
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    data, at, source = plain(), 0, random.Random(2)
    while at < len(data):
        length = source.randint(1, 60_000)
        out.append(deflater.compress(data[at : at + length]) + deflater.flush(zlib.Z_BLOCK))
        at += length
    raw = b"".join(out) + deflater.flush()
    return (
        b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + raw + struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)
    )


def members(size: int, *headers: bytes) -> bytes:
    """Many members, with the given headers in turn."""
    out = []
    for number, at in enumerate(range(0, len(plain()), size)):
        piece = plain()[at : at + size]
        deflater = zlib.compressobj(6, zlib.DEFLATED, -15)
        raw = deflater.compress(piece) + deflater.flush()
        out.append(headers[number % len(headers)] + raw + struct.pack("<II", zlib.crc32(piece), len(piece)))
    return b"".join(out)


def with_crc(header: bytes) -> bytes:
    return header + struct.pack("<H", zlib.crc32(header) & 0xFFFF)


HEADERS = (
    b"\x1f\x8b\x08\0\0\0\0\0\0\x03",
    b"\x1f\x8b\x08\x08\0\0\0\0\0\x03layer.tar\0",
    b"\x1f\x8b\x08\x14\0\0\0\0\0\x03\x03\0abcnote\0",
    with_crc(b"\x1f\x8b\x08\x1e\0\0\0\0\0\x03\x02\0xyname\0comment\0"),
    with_crc(b"\x1f\x8b\x08\x02\0\0\0\0\0\x03"),
    b"\x1f\x8b\x08\x08\0\0\0\0\0\x03" + b"n" * 70_000 + b"\0",
)
EMPTY_MEMBER = gzip.compress(b"")


def zstd_frames(size: int, *between: bytes) -> bytes:
    out = []
    for number, at in enumerate(range(0, len(plain()), size)):
        out += [
            zstd.compress(plain()[at : at + size]),
            *([between[number % len(between)]] if between else []),
        ]
    return b"".join(out)


SKIPPABLE = struct.pack("<II", 0x184D2A50, 5) + b"hello"

BLOBS: dict[str, Callable[[], bytes]] = {
    "gzip -1": tool("gzip", "-1nc"),
    "gzip -6": tool("gzip", "-6c"),
    "gzip -9": tool("gzip", "-9nc"),
    "pigz": tool("pigz", "-p2", "-b128", "-c"),
    "pigz independent": tool("pigz", "-p2", "-ib256", "-c"),
    **{f"zlib {level}": deflated(level) for level in range(10)},
    "zlib fixed codes": deflated(6, zlib.Z_FIXED),
    "zlib huffman only": deflated(6, zlib.Z_HUFFMAN_ONLY),
    "zlib small blocks": deflated(6, memory=1),
    "sync flush": lambda: flushed(zlib.Z_SYNC_FLUSH),
    "partial flush": lambda: flushed(zlib.Z_PARTIAL_FLUSH),
    "full flush": lambda: flushed(zlib.Z_FULL_FLUSH),
    "odd stored": odd_stored,
    "members": lambda: members(700_000, *HEADERS),
    "bgzip": lambda: members(60_000, b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x06\0BC\x02\0\0\0") + EMPTY_MEMBER,
    "tiny members": lambda: members(300, HEADERS[0]),
    "empty members": lambda: (
        EMPTY_MEMBER * 3 + members(1_100_000, EMPTY_MEMBER + HEADERS[0]) + EMPTY_MEMBER * 2
    ),
    "zero padding": lambda: gzip.compress(plain()) + bytes(70_000),
    "zstd": lambda: zstd.compress(plain()),
    "zstd checksum": lambda: zstd.compress(plain(), options={zstd.CompressionParameter.checksum_flag: 1}),
    "zstd long": tool("zstd", "-q", "--long=27", "-c"),
    "zstd frames": lambda: zstd_frames(400_000),
    "zstd small frames": lambda: zstd_frames(3000),
    "zstd skippable": lambda: SKIPPABLE + zstd_frames(1_100_000, SKIPPABLE, zstd.compress(b""), b""),
    "plain": plain,
}


@functools.cache
def blob(name: str) -> bytes:
    return BLOBS[name]()


def pieces(data: bytes, source: random.Random, limit: int) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        length = source.randint(1, limit)
        yield data[at : at + length]
        at += length


class Inflated:
    """A blob decoded as a stream, and its spans."""

    def __init__(self, data: bytes, seed: int, limit: int = 2 * MEBIBYTE) -> None:
        compression = detect_compression(data[:4])
        inflater = layer_inflater(compression)
        out = [raw for piece in pieces(data, random.Random(seed), limit) for raw in inflater.feed(piece)]
        out += inflater.finish()
        assert compression is Compression.PLAIN or all(len(raw) <= CHUNK_BYTES for raw in out)
        self.blob = data
        self.points = inflater.points
        self.plain = b"".join(out)
        self.windows = [
            raw[at : at + WINDOW_BYTES]
            for raw in map(unpack_windows, inflater.window_groups)
            for at in range(0, len(raw), WINDOW_BYTES)
        ]
        self.spans = SpanTable(compression, len(data), len(self.plain), encode_points(inflater.points))
        assert self.spans.windows == len(self.windows)

    def decoder(self, number: int) -> SpanDecoder:
        span = self.spans[number]
        window = self.windows[span.window] if span.window is not None else b""
        return SpanDecoder(self.spans.compression, span, window)

    def decode(self, number: int, source: random.Random, limit: int = 5 * MEBIBYTE) -> bytes:
        span = self.spans[number]
        decoder = self.decoder(number)
        out: list[bytes] = []
        for piece in pieces(self.blob[span.blob_start : span.blob_end], source, limit):
            out += decoder.feed(piece)
        decoder.finish()
        assert all(
            len(raw) <= CHUNK_BYTES for raw in out[:-1] if self.spans.compression is not Compression.PLAIN
        )
        return b"".join(out)


@pytest.mark.parametrize("name", BLOBS)
def test_every_span_decodes_on_its_own(name: str) -> None:
    inflated = Inflated(blob(name), seed=3)
    assert inflated.plain == plain()
    if name not in ("zstd", "zstd checksum", "zstd long"):
        assert len(inflated.spans) >= 3
    for number in range(len(inflated.spans)):
        span = inflated.spans[number]
        assert inflated.decode(number, random.Random(number)) == plain()[span.tar_start : span.tar_end]


@pytest.mark.parametrize("name", BLOBS)
def test_a_span_may_be_left_at_every_milestone_and_gone_on_with(name: str) -> None:
    inflated = inflated_blob(name)
    if name in ("gzip -6", "pigz", "zlib 6"):
        assert sum(point.kind is PointKind.MILESTONE for point in inflated.points) >= 20
    for number in range(len(inflated.spans)):
        span = inflated.spans[number]
        decoder = inflated.decoder(number)
        blob_at, tar_at = span.blob_start, span.tar_start
        for stop in [p.tar for p in inflated.points if span.tar_start < p.tar < span.tar_end] + [span.tar_end]:
            end = inflated.spans.blob_end_for(span, stop)
            assert end == span.blob_end if stop == span.tar_end else end < span.blob_end
            part = b"".join(decoder.feed(inflated.blob[blob_at:end]))
            assert part == plain()[tar_at : tar_at + len(part)]
            blob_at, tar_at = end, tar_at + len(part)
            assert tar_at >= stop  # no byte is held back
        decoder.finish()


@pytest.mark.parametrize("name", BLOBS)
def test_a_decoder_goes_with_its_last_user(name: str) -> None:
    """And does not wait for the cycle collector, which sees nothing of the 0.1 MB that it has."""
    inflated = inflated_blob(name)
    span = inflated.spans[0]
    gc.disable()
    try:
        decoder = inflated.decoder(0)
        for _ in decoder.feed(inflated.blob[span.blob_start : span.blob_end]):
            pass
        gone = weakref.ref(decoder)
        del decoder
        assert gone() is None
    finally:
        gc.enable()


@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(sorted(BLOBS)), st.integers(0, 1 << 30), st.sampled_from([7000, 50_000, 1 << 20, 8 << 20])
)
def test_any_sizes_of_pieces_give_the_same_bytes(name: str, seed: int, limit: int) -> None:
    inflated = Inflated(blob(name), seed, limit)
    assert inflated.plain == plain()
    for number in range(len(inflated.spans)):
        span = inflated.spans[number]
        assert inflated.decode(number, random.Random(seed), limit) == plain()[span.tar_start : span.tar_end]


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300), st.integers(0, 9), st.integers(1, 3), st.integers(1, 9))
def test_small_layers_byte_by_byte(data: bytes, level: int, count: int, limit: int) -> None:
    for stored in (gzip.compress(data, level) * count, zstd.compress(data) * count):
        inflated = Inflated(stored, seed=level, limit=limit)
        assert inflated.plain == data * count
        spans = range(len(inflated.spans))
        assert b"".join(inflated.decode(n, random.Random(n), limit) for n in spans) == data * count


def test_the_windows_are_sparse() -> None:
    inflated = Inflated(blob("gzip -6"), seed=1)
    used = sum(len(window) - window.count(0) for window in inflated.windows)
    assert used < len(inflated.windows) * WINDOW_BYTES / 2


@pytest.mark.parametrize(
    "behind",
    [
        b"x",
        b"\0x",
        b"garbage" * 100,
        bytes(100) + b"\x1f\x8b",
        bytes(40) + EMPTY_MEMBER,
        b"\x1f",
        b"\x1f\x8b\x08",
    ],
)
@pytest.mark.parametrize("limit", [1, 40, MEBIBYTE])
def test_garbage_behind_gzip_data_is_refused(behind: bytes, limit: int) -> None:
    for data in (b"some data", b""):
        with pytest.raises(ImageError):
            Inflated(gzip.compress(data) + behind, seed=1, limit=limit)


@pytest.mark.parametrize("stored", [gzip.compress(b"some data" * 50), zstd.compress(b"some data" * 50)])
def test_cut_off_layers_are_refused(stored: bytes) -> None:
    for end in range(4, len(stored)):
        with pytest.raises(ImageError):
            Inflated(stored[:end], seed=1)
    with pytest.raises(ImageError):
        Inflated(stored + stored[:9], seed=1)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["gzip -6", "tiny members", "zstd checksum"]),
    st.integers(10, 1 << 30),
    st.integers(1, 255),
)
def test_flipped_bits_are_noticed(name: str, at: int, mask: int) -> None:
    damaged = bytearray(blob(name))
    damaged[at % len(damaged)] ^= mask
    try:
        # Some header fields mean nothing (time, operating system): then the data is right.
        assert Inflated(bytes(damaged), seed=1).plain == plain()
    except ImageError:
        return


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["gzip -6", "odd stored", "bgzip", "zstd frames", "plain"]), st.data())
def test_damaged_spans_give_an_image_error_or_too_few_or_other_bytes(name: str, data: st.DataObject) -> None:
    inflated = inflated_blob(name)
    number = data.draw(st.integers(0, len(inflated.spans) - 1))
    span = inflated.spans[number]
    damaged = bytearray(inflated.blob[span.blob_start : span.blob_end])
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    end = data.draw(st.one_of(st.just(len(damaged)), st.integers(0, len(damaged))))
    window = data.draw(st.sampled_from([b"", bytes(WINDOW_BYTES), *inflated.windows[:1]]))
    decoder = SpanDecoder(inflated.spans.compression, span, window)
    size = 0
    try:
        for raw in decoder.feed(bytes(damaged[:end])):
            size += len(raw)
        decoder.finish()
    except ImageError:
        assert size <= span.tar_end - span.tar_start
        return
    assert size == span.tar_end - span.tar_start


@functools.cache
def inflated_blob(name: str) -> Inflated:
    return Inflated(blob(name), seed=5)


BOMB = """
import sys, zlib
from backports import zstd
from lazyfs.core.layer.spans import Compression, SpanTable, encode_points
from lazyfs.decoding.layers import layer_inflater
from lazyfs.decoding.span import SpanDecoder

if sys.argv[1] == "gzip":
    deflater = zlib.compressobj(1, zlib.DEFLATED, 31)
    compress, flush = deflater.compress, deflater.flush
else:
    frame = zstd.ZstdCompressor(level=3)
    compress, flush = frame.compress, frame.flush
zeros = bytes(1 << 20)
stored = b"".join(compress(zeros) for _ in range(512)) + flush()
compression = Compression(sys.argv[1])
inflater = layer_inflater(compression)
total = 0
for raw in inflater.feed(stored):
    total += len(raw)
for raw in inflater.finish():
    total += len(raw)
assert total == 1 << 29, total
spans = SpanTable(compression, len(stored), total, encode_points(inflater.points))
span = spans[0]
decoder = SpanDecoder(compression, span)
assert sum(map(len, decoder.feed(stored[span.blob_start:span.blob_end]))) == span.tar_end - span.tar_start
"""


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_bombs_stay_small_in_memory(compression: str) -> None:
    """512 MiB of zeros in a few megabytes, in a process that may not have more than 256 MiB of data."""
    root = Path(__file__).parents[2]
    limit = (256 << 20, 256 << 20)
    subprocess.run(
        [sys.executable, "-c", BOMB, compression], cwd=root, env={"PYTHONPATH": str(root)}, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, limit), timeout=60,
    )  # fmt: skip


def test_a_zstd_window_beyond_the_limit_is_refused() -> None:
    # Frame header: no single segment, window descriptor exponent 31 (2 TiB).
    with pytest.raises(ImageError):
        Inflated(b"\x28\xb5\x2f\xfd\x00\xf8" + bytes(100), seed=1)
