"""EROFS metadata -> inodes, names, attributes, in the profile that core/erofs/format.py describes.

Rule 1: the metadata comes from outside. Every offset and length is checked against the buffer before it is
used, so damage shows as ImageError and never as another exception or as bytes from somewhere else.
Rule 2: this is the hot path of the FUSE backend. A lookup unpacks only what it compares, and copies only names and
the value asked for. The only thing remembered (bounded) is where the content of a directory lies.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from lazyfs.core.erofs.format import (
    BLOCK_BITS,
    BLOCK_BYTES,
    CHUNK_BYTES,
    CHUNK_FORMAT,
    CHUNK_INDEX,
    COMPAT_SB_CHECKSUM,
    DEVICE_SLOT,
    DEVICE_SLOT_BYTES,
    DEVICE_SLOT_FIRST,
    DEVICES_MAX,
    DIRENT,
    FORMAT_CHUNKS,
    FORMAT_INLINE,
    FORMAT_PLAIN,
    ID_MAX,
    INCOMPAT_DEVICES,
    INODE,
    INODE_BYTES,
    KIND_OF_TYPE,
    NAME_MAX,
    NSEC_PER_S,
    NULL_BLOCK,
    SLOT_BYTES,
    SUPER,
    SUPER_MAGIC,
    SUPER_OFFSET,
    SYMLINK_MAX,
    Device,
    parse_xattr_body,
    superblock_checksum,
)
from lazyfs.core.tar.kinds import Kind
from lazyfs.errors import ImageError

if TYPE_CHECKING:
    import mmap

_HINT = "remove it from the cache, or build the index again"
_REMEMBERED_DIRECTORIES = 1 << 16
_FORMATS = frozenset((FORMAT_PLAIN, FORMAT_INLINE, FORMAT_CHUNKS))
_NAMEOFF = struct.Struct("<H")  # of the dirent whose nameoff is at this place ...
_NAMEOFF_PAIR = struct.Struct("<H10xH")  # ... and of its successor
_NAMEOFF_AT = 8
_DIR = 0o040000
_LINK = 0o120000
_TYPE_MASK = 0o170000


class Inode(NamedTuple):
    """What stat(2) needs, and where a regular file's data lies. A tuple, because one is made for every stat."""

    nid: int
    kind: Kind
    mode: int  # st_mode: type and permissions
    uid: int
    gid: int
    size: int  # bytes
    nlink: int
    mtime_ns: int  # since the epoch
    rdev: int  # as os.makedev() has it; 0 unless CHR or BLK
    device: int  # FILE with data: index into `devices`, else -1
    address: int  # FILE with data: its first byte in that device


class Metadata:
    """Reads one metadata image from `buffer`. The caller owns the buffer, and must neither change nor close it."""

    def __init__(self, buffer: bytes | mmap.mmap) -> None:
        """Raises ImageError unless the superblock and the device table are whole and within the profile."""
        self.buffer = buffer
        self.length = len(buffer)
        if self.length < BLOCK_BYTES or self.length % BLOCK_BYTES:
            raise damaged(f"its size is {self.length} bytes")
        superblock = SUPER.unpack_from(buffer, SUPER_OFFSET)
        magic, checksum, compat, block_bits, extra_slots, self.root_nid, self.inode_count = superblock[:7]
        blocks, meta_block = superblock[9:11]
        incompat, algorithms, device_count, device_slot, rest = superblock[14:]
        if magic != SUPER_MAGIC:
            raise damaged("it is no EROFS image")
        if not compat & COMPAT_SB_CHECKSUM or checksum != superblock_checksum(buffer[:BLOCK_BYTES]):
            raise damaged("its superblock's checksum does not match")
        if (
            incompat not in (0, INCOMPAT_DEVICES)
            or block_bits != BLOCK_BITS
            or extra_slots
            or algorithms
            or any(rest)
        ):
            raise ImageError(
                f"the index uses EROFS features that lazyfs does not write (flags {incompat:#x})",
                "it was made by another program or another version of lazyfs",
            )
        if blocks != self.length >> BLOCK_BITS or meta_block:
            raise damaged(f"its superblock speaks of {blocks} blocks")
        if (
            bool(device_count) != bool(incompat)
            or device_count > DEVICES_MAX
            or (device_count and device_slot != DEVICE_SLOT_FIRST)
        ):
            raise damaged("bad device table")
        self.devices = self._read_devices(device_count)
        self._places: dict[int, tuple[int, int, int]] = {}
        self._directory(self.root_nid)

    def _read_devices(self, count: int) -> tuple[Device, ...]:
        if DEVICE_SLOT_BYTES * (DEVICE_SLOT_FIRST + count) > self.length:
            raise damaged("bad device table")
        devices = []
        for index in range(count):
            tag, blocks, mapped = DEVICE_SLOT.unpack_from(
                self.buffer, DEVICE_SLOT_BYTES * (DEVICE_SLOT_FIRST + index)
            )
            if mapped or blocks == NULL_BLOCK:
                raise damaged("bad device table")
            devices.append(Device(tag.rstrip(b"\0"), blocks << BLOCK_BITS))
        return tuple(devices)

    def inode(self, nid: int) -> Inode:
        """The inode at `nid`. Raises ImageError if there is no valid one."""
        fields = self._fields(nid)
        layout, xattr_count, mode, _, size, address, _, uid, gid, mtime_s, mtime_ns, nlink = fields
        kind = KIND_OF_TYPE.get(mode & _TYPE_MASK)
        if kind is None or mtime_ns >= NSEC_PER_S or uid > ID_MAX or gid > ID_MAX or not nlink:
            raise damaged(f"bad inode {nid}")
        device = -1
        place = rdev = 0
        if kind is Kind.FILE:
            if size:
                if layout != FORMAT_CHUNKS or address != CHUNK_FORMAT:
                    raise damaged(f"bad format of inode {nid}")
                device, place = self._extent(nid, xattr_count, size)
            elif layout != FORMAT_PLAIN:
                raise damaged(f"bad format of inode {nid}")
        elif kind is Kind.DIR:
            self._directory(nid)
        elif kind is Kind.SYMLINK:
            self._link_place(nid)
        elif size or layout != FORMAT_PLAIN:
            raise damaged(f"special file {nid} with content")
        elif kind is not Kind.FIFO:
            rdev = address  # new_encode_dev() equals glibc's makedev() for 32-bit numbers
        return Inode(
            nid, kind, mode, uid, gid, size, nlink, mtime_s * NSEC_PER_S + mtime_ns, rdev, device, place
        )

    def _extent(self, nid: int, xattr_count: int, size: int) -> tuple[int, int]:
        """Where a file's data lies: number of the device, byte address in it."""
        position = nid * SLOT_BYTES + INODE_BYTES + xattr_bytes(xattr_count)
        position += -position % CHUNK_INDEX.size
        if position > self.length - CHUNK_INDEX.size:
            raise damaged(f"chunk index of inode {nid} outside")
        advise, device_id, block = CHUNK_INDEX.unpack_from(self.buffer, position)
        # An id of 0 would be the metadata itself.
        if advise or not 0 < device_id <= len(self.devices):
            raise damaged(f"file data of inode {nid} in no device")
        place = block << BLOCK_BITS
        # NULL_BLOCK, a hole, lies beyond every device.
        if size > CHUNK_BYTES or place + size > self.devices[device_id - 1].size_bytes:
            raise damaged(f"file data of inode {nid} beyond its device")
        return device_id - 1, place

    def _fields(self, nid: int) -> tuple[int, ...]:
        position = nid * SLOT_BYTES
        if (
            not 0 <= position <= self.length - INODE_BYTES
            or position % BLOCK_BYTES > BLOCK_BYTES - INODE_BYTES
        ):
            raise damaged(f"no inode {nid}")
        fields = INODE.unpack_from(self.buffer, position)
        # The reserved field holds the upper address bits of newer, 48-bit images.
        if fields[0] not in _FORMATS or fields[3]:
            raise damaged(f"bad format of inode {nid}")
        return fields

    def _content(self, nid: int, fields: tuple[int, ...]) -> tuple[int, int, int]:
        """Content of a directory or link: size, byte address of whole blocks, byte address of the rest."""
        layout, xattr_count, size = fields[0], fields[1], fields[4]
        whole = size & -BLOCK_BYTES
        blocks = fields[5] << BLOCK_BITS
        if layout == FORMAT_PLAIN:
            if not BLOCK_BYTES <= blocks <= self.length - size:
                raise damaged(f"content of inode {nid} outside")
            return size, blocks, blocks + whole
        if layout != FORMAT_INLINE:
            raise damaged(f"bad format of inode {nid}")
        rest = nid * SLOT_BYTES + INODE_BYTES + xattr_bytes(xattr_count)
        left = size - whole
        # The kernel reads an inline tail from the block that holds the inode.
        if (
            not left
            or rest // BLOCK_BYTES != nid * SLOT_BYTES // BLOCK_BYTES
            or (rest % BLOCK_BYTES + left > BLOCK_BYTES)
        ):
            raise damaged(f"inline content of inode {nid} crosses a block")
        if whole and not BLOCK_BYTES <= blocks <= self.length - whole:
            raise damaged(f"content of inode {nid} outside")
        return size, blocks, rest

    def _directory(self, nid: int) -> tuple[int, int, int]:
        place = self._places.get(nid)
        if place is None:
            fields = self._fields(nid)
            if fields[2] & _TYPE_MASK != _DIR:
                raise damaged(f"inode {nid} is no directory")
            place = self._content(nid, fields)
            if place[0] < DIRENT.size:
                raise damaged(f"empty directory {nid}")
            if len(self._places) >= _REMEMBERED_DIRECTORIES:
                self._places.clear()
            self._places[nid] = place
        return place

    def _link_place(self, nid: int) -> tuple[int, int]:
        fields = self._fields(nid)
        if fields[2] & _TYPE_MASK != _LINK or not 0 < fields[4] <= SYMLINK_MAX:
            raise damaged(f"bad symbolic link {nid}")
        size, _, position = self._content(nid, fields)
        return size, position

    def readlink(self, nid: int) -> bytes:
        """Target of a symbolic link: 1 to 4095 bytes."""
        size, position = self._link_place(nid)
        target = bytes(self.buffer[position : position + size])
        if b"\0" in target:
            raise damaged(f"bad symbolic link {nid}")
        return target

    def xattrs(self, nid: int) -> dict[bytes, bytes]:
        """All extended attributes, by full name; ACLs in the form of getxattr(2)."""
        size = xattr_bytes(self._fields(nid)[1])
        if not size:
            return {}
        position = nid * SLOT_BYTES + INODE_BYTES
        if size > self.length - position:
            raise damaged(f"attributes of inode {nid} outside")
        return parse_xattr_body(bytes(self.buffer[position : position + size]))

    def lookup(self, nid: int, name: bytes) -> int | None:
        """nid of the entry `name` in directory `nid`, or None.

        Binary search over the blocks by their first names, then inside one block (erofs.rst, "Directories").
        """
        size, blocks, rest = self._directory(nid)
        low = 0
        if size > BLOCK_BYTES:
            high = (size - 1) // BLOCK_BYTES
            while low < high:
                middle = (low + high + 1) >> 1
                base, end = self._block(middle, size, blocks, rest)
                if self._name(base, 0, self._dirents(base, end), end) <= name:
                    low = middle
                else:
                    high = middle - 1
        base, end = self._block(low, size, blocks, rest)
        count = self._dirents(base, end)
        buffer = self.buffer
        low, high = 0, count - 1
        while low <= high:
            middle = (low + high) >> 1
            if middle == count - 1:
                found = self._name(base, middle, count, end)
            else:
                start, stop = _NAMEOFF_PAIR.unpack_from(buffer, base + DIRENT.size * middle + _NAMEOFF_AT)
                if base + stop > end:
                    raise damaged(f"bad directory {nid}")
                found = buffer[base + start : base + stop]
            if found == name:
                target: int = DIRENT.unpack_from(buffer, base + DIRENT.size * middle)[0]
                return target
            if found < name:
                low = middle + 1
            else:
                high = middle - 1
        return None

    def entries(self, nid: int) -> Iterator[tuple[bytes, int, int]]:
        """(name, nid, file type as in Kind) of every entry in byte order of the names, with "." and ".."."""
        buffer = self.buffer
        size, blocks, rest = self._directory(nid)
        for number in range((size + BLOCK_BYTES - 1) // BLOCK_BYTES):
            base, end = self._block(number, size, blocks, rest)
            count = self._dirents(base, end)
            dirents = list(DIRENT.iter_unpack(buffer[base : base + DIRENT.size * count]))
            for index, (child, start, file_type, _) in enumerate(dirents):
                if index + 1 < count:
                    stop = dirents[index + 1][1]
                    name = buffer[base + start : base + stop] if base + stop <= end else b""
                else:
                    name = self._name(base, index, count, end)
                if (
                    not 0 < len(name) <= NAME_MAX
                    or start < DIRENT.size * count
                    or b"\0" in name
                    or b"/" in name
                ):
                    raise damaged(f"bad name in directory {nid}")
                yield name, child, file_type

    def _block(self, number: int, size: int, blocks: int, rest: int) -> tuple[int, int]:
        """First byte of directory block `number`, and the end of what it may use."""
        if number < size >> BLOCK_BITS:
            base = blocks + number * BLOCK_BYTES
            return base, base + BLOCK_BYTES
        return rest, rest + size % BLOCK_BYTES

    def _dirents(self, base: int, end: int) -> int:
        """Number of entries of the block: the names begin where they end."""
        if end - base < DIRENT.size:
            raise damaged("directory block too small")
        offset: int = _NAMEOFF.unpack_from(self.buffer, base + _NAMEOFF_AT)[0]
        if not offset or offset % DIRENT.size or base + offset > end:
            raise damaged("bad directory block")
        return offset // DIRENT.size

    def _name(self, base: int, index: int, count: int, end: int) -> bytes:
        """Name number `index`; the last one ends with the block or at its first NUL."""
        buffer = self.buffer
        place = base + DIRENT.size * index + _NAMEOFF_AT
        if index < count - 1:
            start, stop = _NAMEOFF_PAIR.unpack_from(buffer, place)
            if base + stop > end:
                raise damaged("bad name in a directory")
            return buffer[base + start : base + stop]
        start = _NAMEOFF.unpack_from(buffer, place)[0]
        if base + start >= end:
            raise damaged("bad name in a directory")
        return buffer[base + start : min(end, base + start + NAME_MAX + 1)].partition(b"\0")[0]


def xattr_bytes(count: int) -> int:
    """Length of an inode's attribute area, from `i_xattr_icount`."""
    return 12 + 4 * (count - 1) if count else 0


def damaged(what: str) -> ImageError:
    """The error to raise."""
    return ImageError(f"the image's index is damaged: {what}", _HINT)
