"""The startup pack: what goes in comes out, in order of need; anything else gives ImageError and allocates little."""

from __future__ import annotations

import contextlib
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.layer.blocks import BLOCK_BYTES, MAX_BLOCKS
from lazyfs.core.oci.digests import ContentRoot, Digest
from lazyfs.core.starts.pack import (
    MAX_FRAME_BYTES,
    MAX_PACK_BLOCKS,
    PREFIX_BYTES,
    FrameDecoder,
    PackHead,
    build_pack,
    head_size,
    parse_head,
)
from lazyfs.errors import ImageError

MANIFEST = Digest("sha256:" + "5" * 64)
ROOTS = [ContentRoot(f"{number:064x}") for number in range(3)]
Blocks = list[tuple[ContentRoot, int, bytes]]


def content(root: ContentRoot, block: int) -> bytes:
    """Noise and repetitions of any length up to a block."""
    source = random.Random(block * 31 + int(root, 16))
    length = min(BLOCK_BYTES, source.randrange(1, 2 * BLOCK_BYTES)) if block < 100 else source.randrange(1, 20_000)
    return (source.randbytes(length // 4 + 1) * 4)[:length]


def build(needed: list[tuple[int, int]], profile: bytes = b"profile", **limits: int) -> bytes:
    return build_pack(MANIFEST, ROOTS, needed, content, profile, **limits)


def frames(pack: bytes, head: PackHead, step: int = 1 << 30) -> Iterator[Blocks]:
    """The blocks of each frame, which is decoded in pieces of `step` bytes."""
    for number, frame in enumerate(head.frames):
        stored = pack[frame.offset : frame.offset + frame.stored_bytes]
        decoder = FrameDecoder(head, number)
        found: Blocks = []
        for at in range(0, len(stored), step):
            found += [(root, block, bytes(one)) for root, block, one in decoder.feed(stored[at : at + step])]
        decoder.finish()
        assert [one[:2] for one in found] == list(head.blocks(frame))
        yield found


def read_all(pack: bytes, step: int = 1 << 30) -> Blocks:
    return [one for blocks in frames(pack, parse_head(pack, len(pack)), step) for one in blocks]


NEEDED = [(0, 5), (1, 5), (2, 70), (2, 3), (0, 70), (0, 6), (1, 6), *((2, block) for block in range(10, 24))]
PACK = build(NEEDED)
HEAD_BYTES = head_size(PACK)
WHOLE = read_all(PACK)
HEAD = parse_head(PACK, len(PACK))

blocks_of_layers = st.lists(st.tuples(st.integers(0, 2), st.integers(0, MAX_BLOCKS - 1)), min_size=1, max_size=20)


@given(blocks_of_layers, st.binary(max_size=50), st.sampled_from([7_000, 1 << 30]))
def test_what_goes_in_comes_out(needed: list[tuple[int, int]], profile: bytes, step: int) -> None:
    pack = build(needed, profile)
    head = parse_head(pack[: head_size(pack)], len(pack))
    found = read_all(pack, step)
    assert (head.manifest_digest, head.layers, head.profile) == (MANIFEST, tuple(ROOTS), profile)
    assert {(root, block) for root, block, _ in found} == {(ROOTS[layer], block) for layer, block in needed}
    assert len(found) == len(set(needed))
    assert all(content(root, block) == one for root, block, one in found)
    assert build(needed, profile) == pack


def test_blocks_come_in_order_of_need() -> None:
    assert [one[:2] for one in WHOLE] == [(ROOTS[layer], block) for layer, block in NEEDED]
    assert sum(frame.plain_bytes for frame in HEAD.frames) == sum(len(one) for _, _, one in WHOLE)


def test_a_block_comes_as_soon_as_its_bytes_are_there() -> None:
    decoder = FrameDecoder(HEAD, 0)
    stored = PACK[HEAD_BYTES : HEAD_BYTES + HEAD.frames[0].stored_bytes]
    half = decoder.feed(stored[: len(stored) // 2])
    assert 0 < len(half) < len(HEAD.frames[0].blocks)
    with pytest.raises(ImageError, match="cut short"):
        decoder.finish()


def test_blocks_without_content_are_left_out() -> None:
    def some(root: ContentRoot, block: int) -> bytes | None:
        return content(root, block) if block % 2 else None

    pack = build_pack(MANIFEST, ROOTS, NEEDED, some, b"")
    assert {one[:2] for one in read_all(pack)} == {(ROOTS[layer], block) for layer, block in NEEDED if block % 2}
    with pytest.raises(ValueError, match="no blocks"):
        build_pack(MANIFEST, ROOTS, NEEDED, lambda root, block: None, b"")


def test_a_limit_leaves_out_what_is_needed_last() -> None:
    assert len(HEAD.frames) > 2
    two = sum(frame.stored_bytes for frame in HEAD.frames[:2])
    for limit, count in ((two, 2), (two + 100, 2), (two - 1, 1)):
        kept = read_all(build(NEEDED, max_bytes=limit))
        assert kept == WHOLE[: HEAD.frames[count - 1].blocks.stop]
    with pytest.raises(ValueError, match="no blocks"):
        build(NEEDED, max_bytes=100)


@given(st.integers(0, len(PACK) - 1), st.integers(1, 255))
def test_a_flipped_byte_never_moves_a_block(at: int, mask: int) -> None:
    """In the head it is noticed. In a frame it may change a content, which is why all of them are verified."""
    damaged = bytearray(PACK)
    damaged[at] ^= mask
    with contextlib.suppress(ImageError):
        found = read_all(bytes(damaged), 50_000)
        assert [(root, block, len(one)) for root, block, one in found] == [
            (root, block, len(one)) for root, block, one in WHOLE
        ]


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, HEAD_BYTES - 1])
def test_a_head_that_is_cut_short_is_refused(length: int) -> None:
    with pytest.raises(ImageError):
        parse_head(PACK[:length], len(PACK))


@pytest.mark.parametrize("size", [0, HEAD_BYTES, len(PACK) - 1, len(PACK) + 1, 1 << 50])
def test_a_blob_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ImageError, match="add up"):
        parse_head(PACK, size)


def test_a_frame_in_the_place_of_another_gives_the_wrong_blocks_or_an_error() -> None:
    first, second = HEAD.frames[:2]
    stored = PACK[second.offset : second.offset + second.stored_bytes]
    decoder = FrameDecoder(HEAD, 0)
    with contextlib.suppress(ImageError):
        for root, block, one in decoder.feed(stored):
            assert (root, block) in list(HEAD.blocks(first))
            assert bytes(one) != content(root, block)
        decoder.finish()


@given(st.binary(max_size=200))
def test_noise_gives_an_image_error(noise: bytes) -> None:
    for data in (noise, b"LZFSPCK1" + noise, with_head(noise)):
        with pytest.raises(ImageError):
            parse_head(data, len(data))


def test_a_pack_of_another_version_is_refused() -> None:
    with pytest.raises(ImageError, match="no version that this lazyfs knows"):
        head_size(b"LZFSPCK2" + PACK[8:])


def with_head(plain: bytes, declared: int | None = None) -> bytes:
    """The pack with another head."""
    stored = zstd.compress(plain)
    prefix = struct.pack("<8sII", b"LZFSPCK1", len(stored), len(plain) if declared is None else declared)
    return prefix + stored + PACK[HEAD_BYTES:]


PLAIN = zstd.decompress(PACK[PREFIX_BYTES:HEAD_BYTES])
COUNTS = struct.Struct("<HHIII")
DIGEST_BYTES, LAYERS, FRAMES, BLOCKS, PROFILE_BYTES = COUNTS.unpack_from(PLAIN)
STORED_AT = COUNTS.size + DIGEST_BYTES + 32 * LAYERS
COUNTS_AT = STORED_AT + 4 * FRAMES
LAYERS_AT = COUNTS_AT + 4 * FRAMES
BLOCKS_AT = LAYERS_AT + 2 * BLOCKS
LENGTHS_AT = BLOCKS_AT + 4 * BLOCKS


def patched(at: int, value: int, size: int = 4) -> Callable[[], bytes]:
    return lambda: PLAIN[:at] + value.to_bytes(size, "little") + PLAIN[at + size :]


HOSTILE: dict[str, Callable[[], bytes]] = {
    "manifest digest": patched(COUNTS.size, ord("x"), 1),
    "digest's length": patched(0, 0xFFFF, 2),
    "layers": patched(2, 0xFFFF, 2),
    "frames": patched(4, 0xFFFF_FFFF),
    "no frames": patched(4, 0),
    "blocks": patched(8, 0xFFFF_FFFF),
    "no blocks": patched(8, 0),
    "profile": patched(12, 0xFFFF_FFFF),
    "frame of no bytes": patched(STORED_AT, 0),
    "frame larger than the blob": patched(STORED_AT, MAX_FRAME_BYTES),
    "frame of 4 GiB": patched(STORED_AT, 0xFFFF_FFFF),
    "frame of no blocks": patched(COUNTS_AT, 0),
    "frame of too many blocks": patched(COUNTS_AT, BLOCKS + 1),
    "frames of too few blocks": patched(COUNTS_AT, 1),
    "layer": patched(LAYERS_AT, LAYERS, 2),
    "block": patched(BLOCKS_AT, MAX_BLOCKS),
    "block twice": patched(LAYERS_AT + 2, 0, 2),  # block 5 of layer 0 instead of layer 1
    "length": patched(LENGTHS_AT, BLOCK_BYTES + 1),
    "no length": patched(LENGTHS_AT, 0),
    "cut short": lambda: PLAIN[:-1],
    "longer": lambda: PLAIN + b"x",
    "empty": lambda: b"",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_head_gives_an_image_error(what: str) -> None:
    data = with_head(HOSTILE[what]())
    with pytest.raises(ImageError):
        parse_head(data, len(data))


def test_an_unchanged_head_is_taken() -> None:
    """So that the tests above refuse what they mean."""
    data = with_head(PLAIN)
    assert read_all(data) == WHOLE


def test_a_frame_of_more_than_the_limit_is_refused() -> None:
    count = MAX_FRAME_BYTES // BLOCK_BYTES + 1
    parts = (
        COUNTS.pack(DIGEST_BYTES, LAYERS, 1, count, 0),
        PLAIN[COUNTS.size : STORED_AT],
        struct.pack("<II", len(PACK) - HEAD_BYTES, count),
        bytes(2 * count),
        struct.pack(f"<{count}I", *range(count)),
        struct.pack(f"<{count}I", *[BLOCK_BYTES] * count),
    )
    data = with_head(b"".join(parts))
    with pytest.raises(ImageError, match="impossible length"):
        parse_head(data, len(data))


@pytest.mark.parametrize("declared", [100, 1 << 20, 0xFFFF_FFFF])
def test_a_bomb_in_the_head_stays_small(declared: int) -> None:
    data = with_head(bytes(200 << 20), declared)
    with peak_below(4 << 20), pytest.raises(ImageError):
        parse_head(data, len(data))


def test_a_bomb_in_a_frame_stays_small() -> None:
    for bomb in (zstd.compress(bytes(200 << 20)), zstd.compress(bytes(HEAD.frames[0].plain_bytes + 1))):
        decoder = FrameDecoder(HEAD, 0)
        with peak_below(3 * HEAD.frames[0].plain_bytes), pytest.raises(ImageError):
            decoder.feed(bomb)
            decoder.finish()


def test_a_frame_of_a_large_window_is_refused() -> None:
    options: dict[int, int] = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.content_size_flag: 0}
    compressor = zstd.ZstdCompressor(options=options)
    frame = compressor.compress(random.Random(1).randbytes(1000)) + compressor.flush()
    with pytest.raises(ImageError, match="damaged"):
        FrameDecoder(HEAD, 0).feed(frame)


@pytest.mark.parametrize("tail", [b"x", zstd.compress(b"x"), zstd.compress(b"")])
def test_what_follows_a_frame_is_refused(tail: bytes) -> None:
    stored = PACK[HEAD_BYTES : HEAD_BYTES + HEAD.frames[0].stored_bytes]
    for pieces in ([stored + tail], [stored, tail]):
        decoder = FrameDecoder(HEAD, 0)
        with pytest.raises(ImageError, match=r"longer|damaged"):
            for piece in pieces:
                decoder.feed(piece)


def test_the_largest_head_stays_within_its_bound() -> None:
    one = {ROOTS[0]: b"same"}
    needed = [(0, block) for block in range(MAX_PACK_BLOCKS)]
    pack = build_pack(MANIFEST, ROOTS[:1], needed, lambda root, block: one[root], b"")
    with peak_below(32 << 20):
        head = parse_head(pack, len(pack))
    assert len(head.block_numbers) == MAX_PACK_BLOCKS
    assert len(FrameDecoder(head, 0).feed(pack[head.head_bytes :])) == MAX_PACK_BLOCKS


@contextlib.contextmanager
def peak_below(limit_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit_bytes
    finally:
        tracemalloc.stop()
