"""The startup pack of an image: the contents of the blocks that starts touch, in order of need, in one blob.

Layout (docs/FORMATS.md, "Startup pack"; version 1), little-endian:

    0   8s  magic "LZFSPCK1"
    8   I   length of the head as stored
    12  I   length of the head, plain
    16      head: one zstd frame of what `_encode_head` writes
            frames, back to back: each a zstd frame of the contents of consecutive blocks

The pack says nothing that has to be believed: who takes a block out of it verifies it by the layer's block table. So a
wrong pack costs time only, and every number in it is checked before anything is allocated by it. The same blocks,
contents and profile give the same bytes.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from backports import zstd

from lazyfs.core.index.sections import compress, decompress
from lazyfs.core.layer.blocks import BLOCK_BYTES, MAX_BLOCKS
from lazyfs.core.oci.digests import ContentRoot, Digest, is_digest
from lazyfs.errors import ImageError

PACK_ARTIFACT_TYPE = "application/vnd.lazyfs.pack.v1"
PACK_MEDIA_TYPE = "application/vnd.lazyfs.pack.v1.blocks"

PREFIX_BYTES = 16
# A frame is what a reader in a hurry fetches, and what a damaged byte costs. Frames of 256 KiB make packs 2 to 6 %
# larger, of 4 MiB 1 to 4 % smaller.
FRAME_BYTES = 1 << 20
MAX_FRAME_BYTES = 4 << 20  # plain; bounds what a decoder allocates
MAX_PACK_BYTES = 4 << 30
MAX_HEAD_BYTES = 8 << 20  # as stored
_MAX_HEAD_PLAIN_BYTES = 16 << 20
MAX_PACK_BLOCKS = 1 << 16
_MAX_LAYERS = 1024
_MAX_STORED_FRAME_BYTES = MAX_FRAME_BYTES + (MAX_FRAME_BYTES >> 8) + 64  # ZSTD_compressBound
# Against 9: 1 % larger, made in two thirds of the time; against 3: 2 to 5 % smaller. Decoding takes as long.
_LEVEL = 6

_MAGIC = b"LZFSPCK1"
_PREFIX = struct.Struct("<8sII")
_COUNTS = struct.Struct("<HHIII")  # bytes of the manifest's digest; layers; frames; blocks; bytes of the profile
_WINDOW_LOG = 22  # MAX_FRAME_BYTES
_WHAT = "the startup pack"
_HINT = "update lazyfs, or record the image again"

Content = Callable[[ContentRoot, int], bytes | None]


class Frame(NamedTuple):
    """Frame as it lies in the blob. `blocks`: positions in the columns of PackHead."""

    offset: int
    stored_bytes: int
    plain_bytes: int
    blocks: range


class _Columns(NamedTuple):
    layers: array[int]
    blocks: array[int]
    lengths: array[int]


@dataclass(frozen=True, slots=True)
class PackHead:
    """What a pack has, and where. Do not change the arrays.

    `layer_numbers` (positions in `layers`), `block_numbers` and `block_lengths` have one entry for each block, in order
    of need; no block is there twice. `profile`: as core/starts/profile.py encodes it, not checked yet.
    """

    manifest_digest: Digest
    layers: tuple[ContentRoot, ...]
    layer_numbers: array[int]
    block_numbers: array[int]
    block_lengths: array[int]
    frames: tuple[Frame, ...]
    profile: bytes
    head_bytes: int

    def blocks(self, frame: Frame) -> Iterator[tuple[ContentRoot, int]]:
        """The blocks of a frame: layer and number."""
        for at in frame.blocks:
            yield self.layers[self.layer_numbers[at]], self.block_numbers[at]


def build_pack(
    manifest_digest: Digest,
    layers: Sequence[ContentRoot],
    needed: Iterable[tuple[int, int]],
    content: Content,
    profile: bytes,
    max_bytes: int = MAX_PACK_BYTES,
) -> bytes:
    """The blob. `needed`: blocks in order of need, each as position in `layers` and number. `content` gives the content
    of one, or None to leave it out. `max_bytes`: of all frames as stored; what is needed after that is left out.
    ValueError: nothing is left. Blocks the thread."""
    columns = _Columns(array("H"), array("I"), array("I"))
    frames: list[bytes] = []
    counts: list[int] = []
    left_bytes = min(max_bytes, MAX_PACK_BYTES - PREFIX_BYTES - MAX_HEAD_BYTES)
    for batch in _batches(layers, needed, content):
        frame = zstd.compress(b"".join(one for *_, one in batch), options=_FRAME)
        left_bytes -= len(frame)
        if left_bytes < 0 or len(columns.blocks) + len(batch) > MAX_PACK_BLOCKS:
            break
        columns.layers.extend(layer for layer, _, _ in batch)
        columns.blocks.extend(block for _, block, _ in batch)
        columns.lengths.extend(len(one) for *_, one in batch)
        frames.append(frame)
        counts.append(len(batch))
    if not frames:
        raise ValueError("a pack of no blocks")
    plain = _encode_head(manifest_digest, layers, frames, counts, columns, profile)
    stored = compress(plain)
    if len(stored) > MAX_HEAD_BYTES or len(plain) > _MAX_HEAD_PLAIN_BYTES:
        raise ValueError("the head of the pack is too large")
    return b"".join((_PREFIX.pack(_MAGIC, len(stored), len(plain)), stored, *frames))


def _batches(
    layers: Sequence[ContentRoot], needed: Iterable[tuple[int, int]], content: Content
) -> Iterator[list[tuple[int, int, bytes]]]:
    """What goes into one frame, FRAME_BYTES, but whole blocks: layer, number and content of each."""
    batch: list[tuple[int, int, bytes]] = []
    size_bytes = 0
    for layer, block in dict.fromkeys(needed):
        one = content(layers[layer], block)
        if one is None:
            continue
        if not 0 < len(one) <= BLOCK_BYTES:
            raise ValueError("not the content of a block")
        batch.append((layer, block, one))
        size_bytes += len(one)
        if size_bytes >= FRAME_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


_FRAME: dict[int, int] = {
    zstd.CompressionParameter.compression_level: _LEVEL,
    zstd.CompressionParameter.checksum_flag: 0,  # each block is verified by its sha256
}


def _encode_head(
    manifest_digest: Digest,
    layers: Sequence[ContentRoot],
    frames: Sequence[bytes],
    counts: Sequence[int],
    columns: _Columns,
    profile: bytes,
) -> bytes:
    digest = manifest_digest.encode()
    return b"".join(
        (
            _COUNTS.pack(len(digest), len(layers), len(frames), len(columns.blocks), len(profile)),
            digest,
            *map(bytes.fromhex, layers),
            array("I", map(len, frames)).tobytes(),
            array("I", counts).tobytes(),
            *(column.tobytes() for column in columns),
            profile,
        )
    )


def head_size(prefix: bytes | memoryview) -> int:
    """How many bytes of the blob prefix and head take together. `prefix`: PREFIX_BYTES or more of its beginning.
    ImageError."""
    if len(prefix) < PREFIX_BYTES:
        raise ImageError(f"{_WHAT} is cut short")
    magic, stored_bytes, plain_bytes = _PREFIX.unpack_from(prefix)
    if magic != _MAGIC:
        raise ImageError(f"{_WHAT} is of no version that this lazyfs knows", _HINT)
    if stored_bytes > MAX_HEAD_BYTES or plain_bytes > _MAX_HEAD_PLAIN_BYTES:
        raise ImageError(f"the head of {_WHAT} is too large")
    return PREFIX_BYTES + int(stored_bytes)


def parse_head(data: bytes | memoryview, blob_bytes: int) -> PackHead:
    """The head of a pack of `blob_bytes`. `data`: at least what head_size() says. Raises ImageError, and nothing else,
    for anything damaged; allocates 32 MiB at most."""
    head_bytes = head_size(data)
    if len(data) < head_bytes:
        raise ImageError(f"{_WHAT} is cut short")
    plain_bytes = _PREFIX.unpack_from(data)[2]
    plain = memoryview(decompress(memoryview(data)[PREFIX_BYTES:head_bytes], plain_bytes, _WHAT))
    if len(plain) != plain_bytes or plain_bytes < _COUNTS.size:
        raise ImageError(f"the head of {_WHAT} has the wrong length")
    digest_bytes, layers, frames, blocks, profile_bytes = _COUNTS.unpack_from(plain)
    sizes = (digest_bytes, 32 * layers, 4 * frames, 4 * frames, 2 * blocks, 4 * blocks, 4 * blocks, profile_bytes)
    ends = list(accumulate(sizes, initial=_COUNTS.size))
    if ends[-1] != plain_bytes or layers > _MAX_LAYERS or blocks > MAX_PACK_BLOCKS:
        raise ImageError(f"the head of {_WHAT} has the wrong length")
    parts = [plain[start:end] for start, end in pairwise(ends)]
    manifest_digest = str(parts[0], "ascii", "replace")
    if not is_digest(manifest_digest):
        raise ImageError(f"{_WHAT} does not say which image it is of")
    columns = _Columns(_numbers("H", parts[4]), _numbers("I", parts[5]), _numbers("I", parts[6]))
    _check_blocks(columns, layers)
    stored, counts = _numbers("I", parts[2]), _numbers("I", parts[3])
    return PackHead(
        Digest(manifest_digest),
        tuple(ContentRoot(parts[1][at : at + 32].hex()) for at in range(0, 32 * layers, 32)),
        *columns,
        tuple(_frames(head_bytes, blob_bytes, stored, counts, columns.lengths)),
        bytes(parts[7]),
        head_bytes,
    )


def _numbers(kind: str, data: memoryview) -> array[int]:
    numbers = array(kind)
    numbers.frombytes(data)
    return numbers


def _check_blocks(columns: _Columns, layers: int) -> None:
    if not columns.blocks:
        raise ImageError(f"{_WHAT} has no blocks")
    if max(columns.layers) >= layers or max(columns.blocks) >= MAX_BLOCKS:
        raise ImageError(f"{_WHAT} has a block that no layer can have")
    if not 0 < min(columns.lengths) <= max(columns.lengths) <= BLOCK_BYTES:
        raise ImageError(f"{_WHAT} has a block of impossible length")
    places = {layer << 32 | block for layer, block in zip(columns.layers, columns.blocks, strict=True)}
    if len(places) != len(columns.blocks):
        raise ImageError(f"{_WHAT} has a block twice")


def _frames(
    offset: int, blob_bytes: int, stored: Sequence[int], counts: Sequence[int], lengths: Sequence[int]
) -> Iterator[Frame]:
    first = 0
    for stored_bytes, count in zip(stored, counts, strict=True):
        blocks = range(first, first + count)
        if not count or blocks.stop > len(lengths):
            raise ImageError(f"{_WHAT} has a frame without blocks")
        plain_bytes = sum(lengths[first : blocks.stop])
        if plain_bytes > MAX_FRAME_BYTES or not 0 < stored_bytes <= _MAX_STORED_FRAME_BYTES:
            raise ImageError(f"{_WHAT} has a frame of impossible length")
        yield Frame(offset, stored_bytes, plain_bytes, blocks)
        offset += stored_bytes
        first = blocks.stop
    if first != len(lengths) or offset != blob_bytes:
        raise ImageError(f"the frames of {_WHAT} do not add up to its length")


class FrameDecoder:
    """Takes one frame as it streams, and gives the blocks in it as soon as they are there. Holds no more than the plain
    bytes of the frame."""

    def __init__(self, head: PackHead, number: int) -> None:
        self._head = head
        self._frame = head.frames[number]
        self._decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG})
        self._at = self._frame.blocks.start
        self._left_bytes = self._frame.plain_bytes  # that the decoder still has to bring
        self._parts: list[memoryview] = []  # of the block at `_at`
        self._have_bytes = 0

    def feed(self, data: bytes | memoryview) -> list[tuple[ContentRoot, int, memoryview]]:
        """The next bytes of the frame; returns the blocks that are whole now: layer, number, content, which is not
        verified. Raises ImageError if the frame is damaged, or longer than the head says; of no more use then."""
        plain = memoryview(self._decode(data))
        blocks: list[tuple[ContentRoot, int, memoryview]] = []
        at = 0
        while at < len(plain):
            length = self._head.block_lengths[self._at]
            part = plain[at : at + length - self._have_bytes]
            at += len(part)
            self._have_bytes += len(part)
            self._parts.append(part)
            if self._have_bytes == length:
                whole = part if len(self._parts) == 1 else memoryview(b"".join(self._parts))
                layer = self._head.layers[self._head.layer_numbers[self._at]]
                blocks.append((layer, self._head.block_numbers[self._at], whole))
                self._parts = []
                self._have_bytes = 0
                self._at += 1
        return blocks

    def finish(self) -> None:
        """The frame has no more bytes. ImageError if some are missing."""
        if not self._decoder.eof or self._left_bytes:
            raise ImageError(f"a frame of {_WHAT} is cut short")

    def _decode(self, data: bytes | memoryview) -> bytes:
        try:
            plain = self._decoder.decompress(data, self._left_bytes + 1)
        except (zstd.ZstdError, EOFError) as error:
            raise ImageError(f"a frame of {_WHAT} is damaged ({error})") from None
        self._left_bytes -= len(plain)
        if self._left_bytes < 0 or self._decoder.unused_data:
            raise ImageError(f"a frame of {_WHAT} is longer than its head says")
        return plain
