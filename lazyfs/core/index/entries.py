"""The entries of a layer's tar, in columns: they compress to a third of rows, and are read several times faster.

Layout (docs/FORMATS.md, "Entries of a layer"): four lengths, a column for each field, then the variable parts back to
back. The address of a file's data is not stored: it follows from the sizes (core/layer/blocks.py).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise, starmap
from operator import attrgetter
from typing import Any

from lazyfs.core.layer.blocks import page_align
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.reader import MAX_ENTRIES, TarEntry
from lazyfs.core.tar.tree import LayerEntry
from lazyfs.errors import ImageError

_HEADER = struct.Struct("<QQQQ")  # entries; bytes of paths, of targets, of extended attributes
# kind, mode, uid, gid, size, mtime_s, mtime_ns, rdev_major, rdev_minor; lengths of path, target and attributes
_COLUMNS = "BHIIQqIHIHHI"
_FIELDS = attrgetter("kind", "mode", "uid", "gid", "size", "mtime_s", "mtime_ns", "rdev_major", "rdev_minor")
_XATTR = struct.Struct("<HI")  # length of name and value; both follow
_ENTRY_BYTES = struct.calcsize("<" + _COLUMNS)
_KINDS = {int(kind): kind for kind in Kind}


def encode_entries(items: Sequence[LayerEntry]) -> bytes:
    """The entries' bytes. Addresses must be those of BlockTableBuilder.place, in order. ImageError: out of range."""
    entries = [item.entry for item in items]
    paths = [entry.path for entry in entries]
    targets = [entry.target for entry in entries]
    xattrs = [_pack_xattrs(entry.xattrs) if entry.xattrs else b"" for entry in entries]
    texts = (paths, targets, xattrs)
    columns: list[Sequence[int]] = list(zip(*map(_FIELDS, entries), strict=True)) or [()] * 9
    columns += [list(map(len, column)) for column in texts]
    joined = [b"".join(column) for column in texts]
    try:
        packed = [array(code, column).tobytes() for code, column in zip(_COLUMNS, columns, strict=True)]
    except OverflowError:
        raise ImageError("a layer has an entry with a number out of range", "the image itself is at fault") from None
    return b"".join((_HEADER.pack(len(entries), *map(len, joined)), *packed, *joined))


def decode_entries(raw: bytes, device_bytes: int) -> list[LayerEntry]:
    """Inverse of encode_entries. ImageError if damaged, or if the files do not fill `device_bytes`."""
    try:
        items = _decode(memoryview(raw))
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ImageError(f"the entries of a layer are damaged ({type(error).__name__})") from None
    at = 0
    for item in items:
        entry = item.entry
        if entry.size:
            if entry.kind is not Kind.FILE:
                raise ImageError("the entries of a layer are damaged (a size)")
            item.address = at
            at += page_align(entry.size)
    if at != device_bytes:
        raise ImageError("the entries of a layer do not fit its block table")
    return items


def _decode(view: memoryview) -> list[LayerEntry]:
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
    for length, sizes in zip(lengths, columns[9:], strict=True):
        texts.append(list(_cut(view[at : at + length], sizes)))
        at += length
    kinds = map(_KINDS.__getitem__, columns[0])
    xattrs = [_unpack_xattrs(packed) if packed else {} for packed in texts[2]]
    rows = zip(texts[0], kinds, *columns[1:7], texts[1], *columns[7:9], xattrs, strict=True)
    return [LayerEntry(entry, 0) for entry in starmap(TarEntry, rows)]


def _cut(joined: memoryview, sizes: Sequence[int]) -> Iterator[bytes]:
    whole = bytes(joined)
    ends = list(accumulate(sizes, initial=0))
    if ends[-1] != len(whole):
        raise ValueError("wrong lengths")
    for start, end in pairwise(ends):
        yield whole[start:end]


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
