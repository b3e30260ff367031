"""The entries of a layer's tar, in columns: they compress to a fifth of rows, and are read several times faster.

Layout (docs/FORMATS.md, "Entries of a layer"): four lengths, a column for each field, then the variable parts back to
back. What follows from elsewhere is left out: of a path what it shares with the one before it, a size that is that of
the file's blocks, and the address of a file's data, which follows from the sizes (core/layer/blocks.py).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise, starmap
from operator import attrgetter
from typing import Any

from lazyfs.core.layer.blocks import BLOCK_BYTES, BlockTable, page_align
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.reader import MAX_ENTRIES, MAX_PATH, TarEntry
from lazyfs.core.tar.tree import LayerEntry
from lazyfs.errors import ImageError

_HEADER = struct.Struct("<QQQQ")  # entries; bytes of what is left of paths, of targets, of extended attributes
# kind, mode, uid, gid, size, mtime_s, mtime_ns, rdev_major, rdev_minor; length of what a path shares with the one
# before, lengths of target and attributes
_COLUMNS = "BHIIQqIHIHHI"
_SIZE = 4  # the number of that column
_FIELDS = attrgetter("kind", "mode", "uid", "gid", "size", "mtime_s", "mtime_ns", "rdev_major", "rdev_minor")
_AS_BLOCKS = (1 << 64) - 1  # a file is as large as its blocks
_XATTR = struct.Struct("<HI")  # length of name and value; both follow
_ENTRY_BYTES = struct.calcsize("<" + _COLUMNS)
_KINDS = {int(kind): kind for kind in Kind}


def encode_entries(items: Sequence[LayerEntry], table: BlockTable) -> bytes:
    """The entries' bytes. Addresses must be those of BlockTableBuilder.place, in order. ImageError: out of range."""
    entries = [item.entry for item in items]
    targets = [entry.target for entry in entries]
    xattrs = [_pack_xattrs(entry.xattrs) if entry.xattrs else b"" for entry in entries]
    shared, suffixes = _without_shared([entry.path for entry in entries])
    columns: list[Sequence[int]] = list(zip(*map(_FIELDS, entries), strict=True)) or [()] * 9
    columns[_SIZE] = _stored_sizes(entries, table)
    columns += [shared, list(map(len, targets)), list(map(len, xattrs))]
    joined = [b"".join(column) for column in (suffixes, targets, xattrs)]
    try:
        packed = [array(code, column).tobytes() for code, column in zip(_COLUMNS, columns, strict=True)]
    except OverflowError:
        raise ImageError("a layer has an entry with a number out of range", "the image itself is at fault") from None
    return b"".join((_HEADER.pack(len(entries), *map(len, joined)), *packed, *joined))


def decode_entries(raw: bytes, table: BlockTable) -> list[LayerEntry]:
    """Inverse of encode_entries. ImageError if damaged, or if the files do not fill the device of `table`."""
    try:
        items = _decode(memoryview(raw))
        _set_places([item for item in items if item.entry.size], _FileData(table))
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ImageError(f"the entries of a layer are damaged ({type(error).__name__})") from None
    end = max((item.address + page_align(item.entry.size) for item in items), default=0)
    if end != table.device_bytes:
        raise ImageError("the entries of a layer do not fit its block table")
    return items


class _FileData:
    """The files of a block table, one after the other."""

    def __init__(self, table: BlockTable) -> None:
        self._addresses = table.addresses.tolist()
        self._tar_offsets = table.tar_offsets.tolist()
        self._lengths = table.lengths.tolist()
        self._block = 0
        self._address = 0  # of the next file

    def size(self) -> int:
        """How many bytes the blocks have that lie back to back, in device and tar, from the next file's address on."""
        addresses, lengths, block = self._addresses, self._lengths, self._block
        if block == len(addresses) or addresses[block] != self._address:
            return 0
        size = lengths[block]
        while (
            lengths[block] == BLOCK_BYTES
            and block + 1 < len(addresses)
            and addresses[block + 1] - addresses[block] == BLOCK_BYTES
            and self._tar_offsets[block + 1] - self._tar_offsets[block] == BLOCK_BYTES
        ):
            block += 1
            size += lengths[block]
        return size

    def take(self, size_bytes: int) -> int:
        """The address of a file of that size, which is the next one."""
        address = self._address
        self._address += page_align(size_bytes)
        while self._block < len(self._addresses) and self._addresses[self._block] < self._address:
            self._block += 1
        return address


def _stored_sizes(entries: Sequence[TarEntry], table: BlockTable) -> list[int]:
    data = _FileData(table)
    sizes = []
    for entry in entries:
        size = entry.size
        if size:
            sizes.append(_AS_BLOCKS if data.size() == size else size)
            data.take(size)
        else:
            sizes.append(0)
    return sizes


def _set_places(files: Sequence[LayerEntry], data: _FileData) -> None:
    """Gives files their sizes and addresses; ValueError if there are none."""
    for item in files:
        entry = item.entry
        if entry.kind is not Kind.FILE:
            raise ValueError("a size")
        if entry.size == _AS_BLOCKS:
            entry.size = data.size()
            if not entry.size:
                raise ValueError("a file without blocks")
        item.address = data.take(entry.size)


def _without_shared(paths: Sequence[bytes]) -> tuple[list[int], list[bytes]]:
    """Of each path, how many bytes it has in common with the one before it, and the rest, which NUL ends."""
    lengths, suffixes = [], []
    before = b""
    for path in paths:
        if b"\0" in path:
            raise ImageError("a layer has a path with a NUL byte", "the image itself is at fault")
        length, end = 0, min(len(before), len(path))
        while length < end:  # it is from `length` to `end`
            middle = (length + end + 1) // 2
            if before.startswith(path[length:middle], length):
                length = middle
            else:
                end = middle - 1
        lengths.append(length)
        suffixes.append(path[length:] + b"\0")
        before = path
    return lengths, suffixes


def _with_shared(lengths: Sequence[int], suffixes: Sequence[bytes]) -> Iterator[bytes]:
    path = b""
    for length, suffix in zip(lengths, suffixes, strict=True):
        if length > len(path) or length + len(suffix) > MAX_PATH:
            raise ValueError("a path of wrong length")
        path = path[:length] + suffix
        yield path


def _decode(view: memoryview) -> list[LayerEntry]:
    """The entries as they are stored: sizes may be _AS_BLOCKS, and addresses are missing."""
    count, *lengths = _HEADER.unpack_from(view)
    at = _HEADER.size
    if count > MAX_ENTRIES or len(view) != at + count * _ENTRY_BYTES + sum(lengths):
        raise ValueError("wrong length")
    columns: list[Any] = []
    for code in _COLUMNS:
        end = at + count * struct.calcsize("<" + code)
        columns.append(array(code, view[at:end].tobytes()))
        at = end
    texts = []
    for length in lengths:
        texts.append(view[at : at + length].tobytes())
        at += length
    suffixes = texts[0].split(b"\0")
    if suffixes.pop():
        raise ValueError("a path does not end")
    kinds = map(_KINDS.__getitem__, columns[0])
    paths = _with_shared(columns[9], suffixes)
    targets = _cut(texts[1], columns[10])
    xattrs = [_unpack_xattrs(packed) if packed else {} for packed in _cut(texts[2], columns[11])]
    rows = zip(paths, kinds, *columns[1:7], targets, *columns[7:9], xattrs, strict=True)
    return [LayerEntry(entry, 0) for entry in starmap(TarEntry, rows)]


def _cut(joined: bytes, sizes: Sequence[int]) -> Iterator[bytes]:
    ends = list(accumulate(sizes, initial=0))
    if ends[-1] != len(joined):
        raise ValueError("wrong lengths")
    for start, end in pairwise(ends):
        yield joined[start:end]


def _pack_xattrs(xattrs: dict[bytes, bytes]) -> bytes:
    return b"".join(_XATTR.pack(len(name), len(value)) + name + value for name, value in xattrs.items())


def _unpack_xattrs(packed: bytes) -> dict[bytes, bytes]:
    xattrs: dict[bytes, bytes] = {}
    at = 0
    while at < len(packed):
        name_bytes, value_bytes = _XATTR.unpack_from(packed, at)
        at += _XATTR.size
        end = at + name_bytes + value_bytes
        if end > len(packed):
            raise ValueError("an attribute reaches too far")
        xattrs[packed[at : at + name_bytes]] = packed[at + name_bytes : end]
        at = end
    return xattrs
