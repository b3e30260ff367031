"""What nobody has asked for of a namespace that is read back: it stays as it was written, and is written again so.

A change of an image touches a few of its 33,000 files. Taking the others apart, even their names, and putting them
together again would be most of the work of writing the new namespace.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, compress
from operator import itemgetter
from typing import Any, NamedTuple

from lazyfs.core.erofs.format import (
    BLOCK_BITS,
    BLOCK_BYTES,
    CHUNK_FORMAT,
    DIRENT,
    FILE,
    FORMAT_CHUNKS,
    INODE_BYTES,
    SLOT_BYTES,
    Device,
)
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import Node, UnreadChildren

_PERMISSIONS = 0o7777
# 32-bit words of FILE: format and attributes; mode and reserved; size (two); format of chunks; 0; uid; gid; seconds
# (two); nanoseconds; links; then behind the inode: advise and device; block.
_FORMAT, _NLINK, _DEVICE = 4, 11, 16
_WORD = struct.Struct("<I")
_SLOT_WORDS = SLOT_BYTES // 4
# Of plain files that lie side by side, the nids differ by this; and the bytes of each, with padding.
FILE_SLOTS = -(-FILE.size // SLOT_BYTES)
FILE_BYTES = FILE_SLOTS * SLOT_BYTES
_FILE_WORDS = FILE_BYTES // 4


class Run(NamedTuple):
    """Plain files that lie side by side in a new namespace: the nids they had, and where the first of them lies, in
    bytes."""

    nids: array[int]
    position: int


class PlainFiles:
    """Regular files with data, without attributes and with one name each, by nid, in a namespace of this host."""

    def __init__(self, buffer: Any, devices: Sequence[Device], layers: Sequence[int]) -> None:
        """`layers`: of each device, the `Node.layer` of its files."""
        self._buffer = bytes(buffer)
        self._devices = devices
        self._layers = layers

    def plain(self, nids: Sequence[int]) -> tuple[Sequence[bool], Sequence[int]]:
        """Which inodes are such files, and of each file the device, as a key of `rooms`. Raises ValueError if there is
        no such inode, or one of another form."""
        count = len(nids)
        if not count:
            return [], []
        if not 0 <= min(nids) <= max(nids) <= (len(self._buffer) - INODE_BYTES) // SLOT_BYTES:
            raise ValueError("no such inode")
        # The last inode may be a file without data, which is read as if a chunk index followed.
        words = array("I", self._buffer + bytes(FILE_BYTES - INODE_BYTES))
        get = itemgetter(*nids, 0)  # one more: it gives a tuple
        columns = (get(words[word::_SLOT_WORDS])[:-1] for word in (0, _NLINK, _FORMAT, _DEVICE))
        heads, links, chunks, devices = columns
        flags: Sequence[bool] = [True] * count
        if heads.count(FORMAT_CHUNKS) < count or links.count(1) < count:
            flags = [head == FORMAT_CHUNKS and link == 1 for head, link in zip(heads, links, strict=True)]
        known = {number << 16 for number in range(1, len(self._devices) + 1)}
        if not known >= set(compress(devices, flags)) or not set(compress(chunks, flags)) <= {CHUNK_FORMAT}:
            raise ValueError("a file of another form")
        return flags, devices

    def device(self, nid: int) -> int:
        """Of one such file, its device as `plain` gives it."""
        device: int = _WORD.unpack_from(self._buffer, nid * SLOT_BYTES + 4 * _DEVICE)[0]
        return device

    def rooms(self, devices: Iterable[int]) -> dict[int, int]:
        """Numbers of the layers whose devices these are -> size in bytes of the device."""
        numbers = [(word >> 16) - 1 for word in devices]
        return {self._layers[number]: self._devices[number].size_bytes for number in numbers}

    def node(self, nid: int) -> Node:
        """One of them as a node: a new object at each call."""
        fields = FILE.unpack_from(self._buffer, nid * SLOT_BYTES)
        _, _, mode, _, size, _, _, uid, gid, mtime_s, mtime_ns, nlink, _, device_id, block = fields
        layer, address = self._layers[device_id - 1], block << BLOCK_BITS
        mode &= _PERMISSIONS
        return Node(Kind.FILE, mode, uid, gid, mtime_s, mtime_ns, size, layer=layer, address=address, nlink=nlink)

    def write(self, image: bytearray, runs: Sequence[Run], numbers: Sequence[int]) -> None:
        """Writes files into another namespace. `numbers`: of each layer, its device there."""
        source = self._buffer
        layers = enumerate(self._layers, 1)
        moved = {old << 16: numbers[layer] + 1 << 16 for old, layer in layers if layer < len(numbers)}
        stay = all(old == new for old, new in moved.items())
        words = memoryview(image).cast("I")
        for nids, position in runs:
            end = position + FILE_BYTES * len(nids)
            starts = [nid * SLOT_BYTES for nid in nids]
            if nids == _side_by_side(nids[0], len(nids)):
                image[position:end] = source[starts[0] : starts[-1] + FILE_BYTES]
            else:
                image[position:end] = b"".join([source[start : start + FILE_BYTES] for start in starts])
            if not stay:
                columns = words[position >> 2 : end >> 2]
                columns[_DEVICE::_FILE_WORDS] = array("I", map(moved.__getitem__, columns[_DEVICE::_FILE_WORDS]))


def _side_by_side(first: int, count: int) -> array[int]:
    """The nids of so many plain files that lie side by side."""
    return array("I", range(first, first + FILE_SLOTS * count, FILE_SLOTS))


class Stored(NamedTuple):
    """A directory as it lies in a namespace, in the form that the writer gives it. Entries are numbered in their order.

    `nids`: of all entries. `others`: those entries that are no plain files; None for "." and "..", in this order.
    """

    blocks: tuple[bytes, ...]  # without padding
    nids: array[int]
    others: dict[int, Node | None]

    def names(self) -> list[bytes]:
        """Of all entries."""
        return list(chain.from_iterable(map(_names, self.blocks)))

    def name(self, place: int) -> bytes:
        """Of one entry."""
        for block in self.blocks:
            heads_bytes = _heads_bytes(block)
            at = DIRENT.size * place
            if at < heads_bytes:
                _, start, _, _ = DIRENT.unpack_from(block, at)
                following = at + DIRENT.size
                end = DIRENT.unpack_from(block, following)[1] if following < heads_bytes else len(block)
                return block[start:end]
            place -= heads_bytes // DIRENT.size
        raise IndexError(place)

    def plain(self) -> Iterator[array[int]]:
        """The plain files between the other entries, in order."""
        at = 0
        for place in (*sorted(self.others), len(self.nids)):
            if at < place:
                yield self.nids[at:place]
            at = place + 1

    def content(self, nids: array[int]) -> bytes:
        """The directory with other nids: all blocks, those before the last padded."""
        parts: list[bytes] = []
        at = 0
        for block in self.blocks:
            heads = array("I", block[: _heads_bytes(block)])
            count = len(heads) // 3
            heads[0::3] = nids[at : at + count]
            at += count
            parts += (heads.tobytes(), block[len(heads) * 4 :], bytes(BLOCK_BYTES - len(block)))
        return b"".join(parts[:-1])


def _heads_bytes(block: bytes) -> int:
    """Where the names of a directory's block begin: at the first entry's."""
    return int.from_bytes(block[8:10], "little")


def _names(block: bytes) -> list[bytes]:
    starts = array("H", block[: _heads_bytes(block)])[4::6]
    return [block[start:end] for start, end in zip(starts, [*starts[1:], len(block)], strict=True)]


class StoredChildren(UnreadChildren):
    """The children of a directory in a tree that was read back.

    Nothing is made of them until one is asked for. Then they have names, and a plain file is a number until it is asked
    for itself.
    """

    __slots__ = ("_devices", "_named", "files", "stored")

    def __init__(self, files: PlainFiles, stored: Stored) -> None:
        self.files = files
        self.stored: Stored | None = stored  # None once a child was asked for
        self._named: dict[bytes, Any] = {}
        self._devices: frozenset[int] = frozenset()

    def keep_devices(self, devices: Iterable[int]) -> None:
        """`devices`: of the plain files, as PlainFiles.plain gives them."""
        self._devices = frozenset(devices)

    def raw(self) -> dict[bytes, Any]:
        """All children by name. A plain file that nobody asked for is its nid."""
        if self.stored is not None:
            children: list[Any] = list(self.stored.nids)
            for place, node in self.stored.others.items():
                children[place] = node
            named = zip(self.stored.names(), children, strict=True)
            self._named = {name: child for name, child in named if child is not None}
            self.stored = None
        return self._named

    def nodes(self) -> list[Node]:
        if self.stored is not None:
            return [node for node in self.stored.others.values() if node is not None]
        return [child for child in self._named.values() if type(child) is not int]

    def rooms(self) -> dict[int, int]:
        """Numbers of the layers in which data of plain files lies that nobody asked for -> size of the device."""
        devices: Iterable[int] = self._devices
        if self.stored is None:
            devices = {self.files.device(nid) for nid in self._named.values() if type(nid) is int}
        return self.files.rooms(devices)

    def layers(self) -> set[int]:
        return set(self.rooms())

    def __getitem__(self, name: bytes) -> Node:
        child = self.raw()[name]
        if type(child) is int:
            self._named[name] = child = self.files.node(child)
        node: Node = child
        return node

    def __setitem__(self, name: bytes, child: Node) -> None:
        self.raw()[name] = child

    def __delitem__(self, name: bytes) -> None:
        del self.raw()[name]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.raw())

    def __len__(self) -> int:
        return len(self._named) if self.stored is None else len(self.stored.nids) - 2
