"""Plain files of a namespace that nobody has asked for: they stay as they were written, and are written again so.

A change of an image touches a few of its 33,000 files. Making an object of each, and taking it apart again, would be
most of the work of writing the new namespace.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress, repeat
from operator import itemgetter
from typing import Any

from lazyfs.core.erofs.format import (
    BLOCK_BITS,
    BLOCK_BYTES,
    CHUNK_BYTES,
    CHUNK_FORMAT,
    FILE,
    FORMAT_CHUNKS,
    INODE_BYTES,
    SLOT_BYTES,
    Device,
)
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import Node

_REGULAR = 0o100000
_PERMISSIONS = 0o7777
# 32-bit words of FILE: format and attributes; mode and reserved; size (two); format of chunks; number; uid; gid;
# seconds (two); nanoseconds; links; then behind the inode: advise and device; block.
_SIZE, _FORMAT, _NUMBER, _NLINK, _DEVICE, _BLOCK = 2, 4, 5, 11, 16, 17
_SLOT_WORDS = SLOT_BYTES // 4


class PlainFiles:
    """Regular files with data, without attributes and with one name each, by nid."""

    def __init__(self, buffer: Any, devices: Sequence[Device], layers: Sequence[int]) -> None:
        """`layers`: of each device, the `Node.layer` of its files."""
        self._buffer = bytes(buffer)
        self._devices = devices
        self._layers = layers
        # The last inode may be a file without data, which is read as if a chunk index followed.
        self._words = array("I", self._buffer + bytes(FILE.size - INODE_BYTES))

    def _columns(self, nids: Sequence[int]) -> Callable[[int], Sequence[int]]:
        """A function that gives one word of each inode, by the word's number."""
        get = itemgetter(*map(operator.mul, nids, repeat(_SLOT_WORDS)), 0, 0)  # two more: it gives a tuple

        def column(word: int) -> Sequence[int]:
            found: tuple[int, ...] = get(self._words[word:] if word else self._words)
            return found[:-2]

        return column

    def plain(self, nids: Sequence[int]) -> list[bool] | None:
        """Which inodes are such files. None if one of them is outside the profile, damaged, or has two names.

        Owners and times are not checked here: reading an inode checks them.
        """
        last = len(self._buffer) - INODE_BYTES
        if not nids:
            return []
        if not 0 <= min(nids) <= max(nids) <= last // SLOT_BYTES:
            return None
        column = self._columns(nids)
        flags = [head == FORMAT_CHUNKS and link == 1 for head, link in zip(column(0), column(_NLINK), strict=True)]
        files = list(compress(nids, flags))
        return flags if self._are_valid(files) else None

    def _are_valid(self, nids: Sequence[int]) -> bool:
        if not nids:
            return True
        if len(set(nids)) != len(nids):
            return False
        places = map(operator.mod, map(operator.mul, nids, repeat(SLOT_BYTES)), repeat(BLOCK_BYTES))
        column = self._columns(nids)
        modes = map(operator.and_, column(1), repeat(~_PERMISSIONS))
        upper = map(operator.lshift, column(_SIZE + 1), repeat(32))
        sizes = list(map(operator.or_, column(_SIZE), upper))
        devices = column(_DEVICE)
        if (
            max(places) > BLOCK_BYTES - INODE_BYTES
            or set(modes) != {_REGULAR}
            or set(column(_FORMAT)) != {CHUNK_FORMAT}
            or not 0 < min(sizes) <= max(sizes) <= CHUNK_BYTES
        ):
            return False
        rooms = {number << 16: device.size_bytes for number, device in enumerate(self._devices, 1)}
        if not rooms.keys() >= set(devices):
            return False
        ends = map(operator.add, map(operator.lshift, column(_BLOCK), repeat(BLOCK_BITS)), sizes)
        return all(map(operator.le, ends, map(rooms.__getitem__, devices)))

    def node(self, nid: int) -> Node:
        """One of them as a node: a new object at each call."""
        fields = FILE.unpack_from(self._buffer, nid * SLOT_BYTES)
        _, _, mode, _, size, _, _, uid, gid, mtime_s, mtime_ns, nlink, _, device_id, block = fields
        layer, address = self._layers[device_id - 1], block << BLOCK_BITS
        mode &= _PERMISSIONS
        return Node(Kind.FILE, mode, uid, gid, mtime_s, mtime_ns, size, layer=layer, address=address, nlink=nlink)

    def rooms(self, nids: Sequence[int]) -> dict[int, int]:
        """Numbers of the layers in which their data lies -> size in bytes of the layer's device."""
        devices = [(word >> 16) - 1 for word in set(self._columns(nids)(_DEVICE))]
        return {self._layers[device]: self._devices[device].size_bytes for device in devices}

    def layers(self, nids: Sequence[int]) -> set[int]:
        """Numbers of the layers in which their data lies."""
        return set(self.rooms(nids))

    def write(
        self, image: bytearray, places: Mapping[int, int], inode_numbers: Iterable[int], numbers: Sequence[int]
    ) -> None:
        """Writes files into another namespace. `places`: nid here -> byte position there. `numbers`: of each layer, its
        device there."""
        source = self._buffer
        words = memoryview(image).cast("I")
        for (nid, place), number in zip(places.items(), inode_numbers, strict=True):
            at = nid * SLOT_BYTES
            image[place : place + FILE.size] = source[at : at + FILE.size]
            words[(place >> 2) + _NUMBER] = number
        layers = enumerate(self._layers, 1)
        moved = {old << 16: numbers[layer] + 1 << 16 for old, layer in layers if layer < len(numbers)}
        if any(old != new for old, new in moved.items()):
            for place in places.values():
                at = (place >> 2) + _DEVICE
                words[at] = moved[words[at]]
