"""A layer's data device: where each block of file data lies, and what its bytes hash to.

The regular files of a layer, in tar order, each starting on a 4 KiB boundary, form a linear address
space. A file is cut into blocks from its own start (a sparse file: from the start of each stretch of
data), so inserting a file elsewhere never moves another file's cuts. Addresses that no block covers
(padding, holes) read as zeros by definition.

The table is columnar, so that a process uses it in place from a memory map (docs/FORMATS.md, "Block table"):

    0   8s  magic "LZFSBT01"
    8   Q   count         number of blocks
    16  Q   device_bytes  size of the address space, a multiple of 4096
    24  Q   tar_bytes     length of the uncompressed layer
    32  count x Q    address      ascending, blocks do not overlap
        count x Q    tar_offset   ascending
        count x I    length       1 .. BLOCK_BYTES
        count x 32s  sha256

The sha256 over these bytes is the layer's *content root*: a table with that digest verifies
the layer's data block by block, whoever made the table.
"""

from __future__ import annotations

import hashlib
import operator
import struct
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import islice
from mmap import mmap

from lazyfs.core.oci.digests import ContentRoot
from lazyfs.errors import ImageError

PAGE_BYTES = 4096
TAR_BLOCK_BYTES = 512
# Each block has one sha256, one presence mark and one table record. Larger blocks make the table smaller; smaller ones
# make a cold 4 KiB read of a large file verify less. Most files are smaller than one block.
BLOCK_BYTES = 256 * 1024
# EROFS addresses 4 KiB blocks by 32 bits; half of that leaves room for the namespace.
MAX_DEVICE_BYTES = (1 << 32) * PAGE_BYTES // 2
MAX_BLOCKS = 64_000_000
MAX_TAR_BYTES = 1 << 50

_HEADER = struct.Struct("<8sQQQ")
_MAGIC = b"LZFSBT01"
_RECORD_BYTES = 8 + 8 + 4 + 32
_MASK = (1 << 64) - 1

if sys.byteorder != "little":  # pragma: no cover - the columns are used in place, as little-endian numbers
    raise ImportError("lazyfs needs a little-endian machine")


def page_align(size_bytes: int) -> int:
    """`size_bytes` rounded up to the next multiple of 4096."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


class BlockTable:
    """Read-only view of a block table in any buffer (bytes or a memory map), checked when opened.

    Raises ImageError if any record is out of order, overlaps, or points outside device or tar. `was_checked`: the
    caller finds out, by the content root, whether these bytes were checked before; then the records are not.
    """

    def __init__(self, buffer: bytes | memoryview | mmap, *, was_checked: bool = False) -> None:
        view = memoryview(buffer).cast("B")
        if len(view) < _HEADER.size:
            raise ImageError("block table is cut short")
        magic, count, device_bytes, tar_bytes = _HEADER.unpack_from(view)
        if magic != _MAGIC:
            raise ImageError("not a block table of a known version")
        if count > MAX_BLOCKS or len(view) != _HEADER.size + count * _RECORD_BYTES:
            raise ImageError("block table has the wrong length")
        self.buffer = view
        self.count: int = count
        self.device_bytes: int = device_bytes
        self.tar_bytes: int = tar_bytes
        at = _HEADER.size
        self.addresses = view[at : at + 8 * count].cast("Q")
        at += 8 * count
        self.tar_offsets = view[at : at + 8 * count].cast("Q")
        at += 8 * count
        self.lengths = view[at : at + 4 * count].cast("I")
        at += 4 * count
        self._digests = view[at:]
        if not was_checked:
            self._check()

    def _check(self) -> None:
        if (
            self.device_bytes > MAX_DEVICE_BYTES
            or self.device_bytes % PAGE_BYTES
            or self.tar_bytes > MAX_TAR_BYTES
        ):
            raise ImageError("block table declares impossible sizes")
        if not self.count:
            return
        if min(self.lengths) < 1 or max(self.lengths) > BLOCK_BYTES:
            raise ImageError("block table has a block of impossible length")
        for starts, limit in ((self.addresses, self.device_bytes), (self.tar_offsets, self.tar_bytes)):
            ends = map(operator.add, starts, self.lengths)
            following = islice(starts, 1, None)
            # map stops with the shorter one, so the last block's end is compared on its own
            if not all(map(operator.le, ends, following)) or starts[-1] + self.lengths[-1] > limit:
                raise ImageError("block table has blocks that overlap or lie outside")

    @property
    def content_root(self) -> ContentRoot:
        """sha256 of the table, 64 hex digits. Computed at each call."""
        return ContentRoot(hashlib.sha256(self.buffer).hexdigest())

    def digest(self, block: int) -> bytes:
        """The 32 bytes of the sha256 of block number `block`."""
        return bytes(self._digests[32 * block : 32 * block + 32])

    def digest_prefixes(self) -> list[int]:
        """The first 8 bytes of each block's sha256, as little-endian numbers."""
        return self._digests.cast("Q")[::4].tolist()

    def overlapping(self, address: int, size_bytes: int) -> range:
        """Numbers of the blocks that share a byte with [address, address + size_bytes)."""
        first = bisect_right(self.addresses, address)
        if first and self.addresses[first - 1] + self.lengths[first - 1] > address:
            first -= 1
        return range(first, bisect_left(self.addresses, address + size_bytes, first))

    def from_tar(self, start: int, end: int) -> range:
        """Numbers of the blocks that share a byte with [start, end) of the uncompressed layer."""
        first = bisect_right(self.tar_offsets, start)
        if first and self.tar_offsets[first - 1] + self.lengths[first - 1] > start:
            first -= 1
        return range(first, bisect_left(self.tar_offsets, end, first))


class BlockTableBuilder:
    """Collects the blocks of a layer in tar order."""

    def __init__(self) -> None:
        self._addresses = array("Q")
        self._tar_offsets = array("Q")
        self._lengths = array("I")
        self._digests = bytearray()
        self._device_bytes = 0

    def place(self, size_bytes: int) -> int:
        """Reserves address space for a file of `size_bytes` and returns its address."""
        address = self._device_bytes
        self._device_bytes += page_align(size_bytes)
        if self._device_bytes > MAX_DEVICE_BYTES:
            raise ImageError("a layer's files are larger than 8 TiB together, which lazyfs cannot address")
        return address

    def add(self, address: int, tar_offset: int, length_bytes: int, digest: bytes) -> None:
        """Records one block; blocks come in ascending order of both address and tar offset."""
        self._addresses.append(address)
        self._tar_offsets.append(tar_offset)
        self._lengths.append(length_bytes)
        self._digests += digest

    def finish(self, tar_bytes: int) -> bytes:
        """The table's bytes."""
        head = _HEADER.pack(_MAGIC, len(self._lengths), self._device_bytes, tar_bytes)
        return b"".join(
            (
                head,
                self._addresses.tobytes(),
                self._tar_offsets.tobytes(),
                self._lengths.tobytes(),
                bytes(self._digests),
            )
        )


def pack_table(table: bytes) -> bytes:
    """The table in a form that compresses well; `unpack_table` gives the same bytes back.

    A block mostly begins where the one before it suggests: in the device at the next page, in the tar at the next
    block of 512 bytes, or a header behind that. What is left when this is taken off are a few different numbers. Only
    the hashes stay as large as they are.
    """
    opened = BlockTable(table)
    columns = ((opened.addresses, PAGE_BYTES), (opened.tar_offsets, TAR_BLOCK_BYTES))
    return b"".join(
        (
            table[: _HEADER.size],
            *(_residuals(starts, opened.lengths, unit).tobytes() for starts, unit in columns),
            table[_HEADER.size + 16 * opened.count :],
        )
    )


def unpack_table(packed: bytes, page_bytes: int = PAGE_BYTES, tar_block_bytes: int = TAR_BLOCK_BYTES) -> bytes:
    """Inverse of pack_table, which takes off the places that follow from these two. Raises ImageError for damaged
    input; BlockTable checks the bounds."""
    if len(packed) < _HEADER.size:
        raise ImageError("block table is cut short")
    count = _HEADER.unpack_from(packed)[1]
    if count > MAX_BLOCKS or len(packed) != _HEADER.size + count * _RECORD_BYTES:
        raise ImageError("block table has the wrong length")
    view = memoryview(packed)
    at = _HEADER.size
    lengths = view[at + 16 * count : at + 20 * count].cast("I")
    addresses = _starts(view[at : at + 8 * count].cast("Q"), lengths, page_bytes)
    tar_offsets = _starts(view[at + 8 * count : at + 16 * count].cast("Q"), lengths, tar_block_bytes)
    return b"".join((view[:at], addresses.tobytes(), tar_offsets.tobytes(), view[at + 16 * count :]))


def _residuals(starts: Sequence[int], lengths: Sequence[int], unit: int) -> array[int]:
    """How far behind the next multiple of `unit` after the block before it each block begins, modulo 2^64."""
    residuals = array("Q")
    end = 0
    for start, length in zip(starts, lengths, strict=True):
        residuals.append(start - end - -end % unit & _MASK)
        end = start + length
    return residuals


def _starts(residuals: Sequence[int], lengths: Sequence[int], unit: int) -> array[int]:
    starts = array("Q")
    end = 0
    for residual, length in zip(residuals, lengths, strict=True):
        start = end + -end % unit + residual & _MASK
        if start > MAX_TAR_BYTES:
            raise ImageError("block table has a block outside the layer")
        starts.append(start)
        end = start + length
    return starts
