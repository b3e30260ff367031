"""Tree -> EROFS metadata (the namespace of an image), in the profile that core/erofs/format.py describes.

`Layout` walks the tree once and gives every inode its place; then inodes and directory blocks are packed.

A file's data is one chunk of a device, never a flat inode that refers to it by the device table's unified addresses.
With flat inodes the kernel's EROFS on files (fs/erofs/fileio.c, erofs_fileio_scan_folio) compares a folio's unified
address with the device's own address behind the folio before. They are never equal, so every folio becomes a request:
4,027 reads for a start of Python in place of 410 (docs/MEASUREMENTS.md, "core/erofs").

The same tree gives the same bytes on every host: nothing depends on time, hashing or insertion order.
"""

from __future__ import annotations

import functools
import operator
import struct
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from itertools import accumulate, repeat
from operator import attrgetter

from lazyfs.core.erofs.format import (
    BLOCK_BITS,
    BLOCK_BYTES,
    CHUNK_BYTES,
    CHUNK_FORMAT,
    CHUNK_INDEX,
    COMPAT_MTIME,
    COMPAT_SB_CHECKSUM,
    DEVICE_SLOT,
    DEVICE_SLOT_BYTES,
    DEVICE_SLOT_FIRST,
    DEVICES_MAX,
    DIRENT,
    FILE,
    FORMAT_CHUNKS,
    FORMAT_INLINE,
    FORMAT_PLAIN,
    ID_MAX,
    INCOMPAT_DEVICES,
    INODE,
    INODE_BYTES,
    NSEC_PER_S,
    NULL_BLOCK,
    RDEV_MAJOR_MAX,
    RDEV_MINOR_MAX,
    SUPER,
    SUPER_MAGIC,
    SUPER_OFFSET,
    TYPE_BITS,
    Device,
    superblock_checksum,
)
from lazyfs.core.erofs.layout import Layout, Record, directory_blocks, raw_children, stored_form
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import Node
from lazyfs.errors import ImageError

__all__ = ["Device", "write_erofs"]

_HINT = "the image itself is at fault: build it again, or report it to its publisher"
_INDEX_HINT = "the image's index is damaged: build it again"
_REGULAR = TYPE_BITS[Kind.FILE]
_FILE_COLUMNS = attrgetter("mode", "size", "uid", "gid", "mtime_s", "mtime_ns", "nlink", "layer", "address")


def write_erofs(
    root: Node, devices: Sequence[Device], uuid: bytes = bytes(16), numbers: Sequence[int] | None = None
) -> bytes:
    """EROFS image of the tree's metadata, a multiple of 4096 bytes. `devices` become the device table, in this order.
    The device of a file is devices[numbers[Node.layer]], without `numbers` devices[Node.layer].

    Raises ImageError when the tree cannot be represented: names, link targets, owners, times, device numbers
    or attributes outside Linux's limits, data outside its device, a directory with two parents, a device of
    16 TiB or a file of more than 8 TiB.
    """
    if root.kind != Kind.DIR:
        raise ImageError("the root of the image is not a directory", _HINT)
    if len(devices) > DEVICES_MAX:
        raise ImageError(f"the image has {len(devices)} layers; at most {DEVICES_MAX} are supported")
    for device in devices:
        _check_device(device)
    layout = Layout(DEVICE_SLOT_BYTES * (DEVICE_SLOT_FIRST + len(devices)))
    layout.walk(root)
    image = bytearray(layout.end)
    _write_inodes(image, layout, devices, range(len(devices)) if numbers is None else numbers)
    _write_superblock(image, layout, root, devices, uuid)
    return bytes(image)


def _check_device(device: Device) -> None:
    blocks, rest = divmod(device.size_bytes, BLOCK_BYTES)
    if rest or blocks < 0:
        raise ValueError("a device's size is a multiple of 4096 bytes")
    if len(device.tag) > 64 or b"\0" in device.tag:
        raise ValueError("a device's tag has at most 64 bytes, without NUL")
    if blocks >= NULL_BLOCK:
        raise ImageError(f"a layer has {blocks * BLOCK_BYTES >> 40} TiB; EROFS addresses less than 16 TiB")


def _write_inodes(image: bytearray, layout: Layout, devices: Sequence[Device], numbers: Sequence[int]) -> None:
    if layout.files:
        columns = list(zip(*map(_FILE_COLUMNS, layout.files), strict=True))
        if not _write_files(image, layout.files.values(), columns, devices, numbers):
            # One file cannot be represented. Writing them one by one finds out which, and why.
            records = [(node, position, b"", 0, 0) for node, position in layout.files.items()]
            _write_records(image, layout, devices, numbers, records)
    if layout.unread is not None:
        _check_devices(layout.rooms, devices, numbers)
        layout.unread.write(image, layout.runs, numbers)
    _write_records(image, layout, devices, numbers, layout.records)


def _check_devices(rooms: Mapping[int, int], devices: Sequence[Device], numbers: Sequence[int]) -> None:
    """Raises ImageError unless the devices of these layers are at least of these sizes: those that they had in the
    namespace that unread files come from."""
    for layer, size_bytes in rooms.items():
        if not (0 <= layer < len(numbers) and 0 <= numbers[layer] < len(devices)):
            raise ImageError(f"files of layer {layer} have no device", _INDEX_HINT)
        if devices[numbers[layer]].size_bytes < size_bytes:
            raise ImageError("a lower layer's data is smaller than its files", _INDEX_HINT)


def _write_files(
    image: bytearray,
    positions: Iterable[int],
    columns: Sequence[Sequence[int]],
    devices: Sequence[Device],
    numbers: Sequence[int],
) -> bool:
    """Writes plain files by columns, several times faster than one by one. False: one cannot be represented."""
    modes, sizes, uids, gids, mtimes_s, mtimes_ns, nlinks, layers, addresses = columns
    if not 0 <= min(layers) <= max(layers) < len(numbers):
        return False
    device_numbers = list(map(numbers.__getitem__, layers))
    rooms = [device.size_bytes for device in devices]
    if (
        reduce(operator.or_, modes) & ~0o7777
        or not 0 <= min(mtimes_ns) <= max(mtimes_ns) < NSEC_PER_S
        or max(uids) > ID_MAX
        or max(gids) > ID_MAX
        or not 0 <= min(device_numbers) <= max(device_numbers) < len(devices)
        or min(sizes) < 0
        or max(sizes) > CHUNK_BYTES
        or min(addresses) < 0
        or reduce(operator.or_, addresses) % BLOCK_BYTES
        or not all(map(operator.le, map(operator.add, addresses, sizes), map(rooms.__getitem__, device_numbers)))
    ):
        return False
    bits = map(operator.or_, repeat(_REGULAR), modes)
    ids = map(operator.add, device_numbers, repeat(1))
    blocks = map(operator.rshift, addresses, repeat(BLOCK_BITS))
    writes = map(
        FILE.pack_into, repeat(image), positions, repeat(FORMAT_CHUNKS), repeat(0), bits, repeat(0),
        sizes, repeat(CHUNK_FORMAT), repeat(0), uids, gids, mtimes_s, mtimes_ns, nlinks, repeat(0), ids,
        blocks,
    )  # fmt: skip
    try:
        deque(writes, maxlen=0)
    except struct.error:
        return False
    return True


def _write_records(
    image: bytearray,
    layout: Layout,
    devices: Sequence[Device],
    numbers: Sequence[int],
    records: Sequence[Record],
) -> None:
    for node, position, body, size, tail in records:
        kind, mode, uid, gid, mtime_ns = node.kind, node.mode, node.uid, node.gid, node.mtime_ns
        if mode & ~0o7777 or not 0 <= mtime_ns < NSEC_PER_S or uid > ID_MAX or gid > ID_MAX:
            raise ImageError(
                f"mode {mode:#o}, owner {uid}:{gid} or {mtime_ns} ns is out of range",
                _HINT,
            )
        content = b""
        layout_format, address = FORMAT_INLINE if tail else FORMAT_PLAIN, 0
        outside = layout.outside.get(node, 0)
        if kind == Kind.FILE and node.size:
            size, layout_format, address = node.size, FORMAT_CHUNKS, CHUNK_FORMAT
            content = bytes(-len(body) % CHUNK_INDEX.size) + _chunk_index(node, devices, numbers)
        elif kind in (Kind.CHR, Kind.BLK):
            address = _encode_rdev(node)
        else:
            address = outside >> BLOCK_BITS
        try:
            INODE.pack_into(
                image, position, layout_format, ((len(body) - 12) >> 2) + 1 if body else 0, TYPE_BITS[kind] | mode,
                0, size, address, 0, uid, gid, node.mtime_s, mtime_ns, node.nlink,
            )  # fmt: skip
        except (struct.error, KeyError):
            raise ImageError(
                f"a file cannot be represented (type {kind!r}, size {node.size}, "
                f"owner {uid}:{gid}, time {node.mtime_s}, {node.nlink} links)",
                _HINT,
            ) from None
        if kind == Kind.DIR:
            content = _pack_directory(node, layout)
        elif kind == Kind.SYMLINK:
            content = node.target
        if outside:
            whole = size - tail
            image[outside : outside + whole] = content[:whole]
            content = content[whole:]
        position += INODE_BYTES
        image[position : position + len(body) + len(content)] = body + content


def _pack_directory(directory: Node, layout: Layout) -> bytes:
    """All blocks of a directory. All but the last are padded with zeros."""
    stored = stored_form(directory)
    if stored is not None:
        return stored.content(layout.stored_nids[directory])
    names = layout.names[directory]
    children = {**raw_children(directory), b".": directory, b"..": layout.parents[directory]}
    if len(names) * DIRENT.size + sum(map(len, names)) <= BLOCK_BYTES:
        return _pack_block(names, children, layout.nids)
    blocks = [_pack_block(block, children, layout.nids) for block in directory_blocks(names)[0]]
    return b"".join([block.ljust(BLOCK_BYTES, b"\0") for block in blocks[:-1]] + blocks[-1:])


def _pack_block(names: list[bytes], children: dict[bytes, Node | int], nids: dict[Node | int, int]) -> bytes:
    nodes = [children[name] for name in names]
    fields = [0] * (4 * len(names))
    fields[0::4] = [nids[node] for node in nodes]
    fields[1::4] = list(accumulate(map(len, names[:-1]), initial=DIRENT.size * len(names)))
    fields[2::4] = [Kind.FILE if isinstance(node, int) else node.kind for node in nodes]
    return b"".join((_dirents(len(names)).pack(*fields), *names))


@functools.cache
def _dirents(count: int) -> struct.Struct:
    """`count` times DIRENT; a block holds at most 315."""
    return struct.Struct("<" + "QHBB" * count)


def _chunk_index(node: Node, devices: Sequence[Device], numbers: Sequence[int]) -> bytes:
    device = numbers[node.layer] if 0 <= node.layer < len(numbers) else -1
    if not 0 <= device < len(devices) or node.address % BLOCK_BYTES or node.address < 0:
        raise ImageError(
            f"a file of {node.size} bytes has no place in a layer (layer {node.layer}, "
            f"address {node.address})",
            _INDEX_HINT,
        )
    if not 0 < node.size <= devices[device].size_bytes - node.address:
        raise ImageError(f"a file of {node.size} bytes reaches beyond its layer's data", _INDEX_HINT)
    if node.size > CHUNK_BYTES:
        raise ImageError(f"a file has {node.size} bytes; lazyfs supports 8 TiB")
    return CHUNK_INDEX.pack(0, device + 1, node.address >> BLOCK_BITS)


def _encode_rdev(node: Node) -> int:
    major, minor = node.rdev_major, node.rdev_minor
    if not (0 <= major <= RDEV_MAJOR_MAX and 0 <= minor <= RDEV_MINOR_MAX):
        raise ImageError(f"device number {major}:{minor} is not valid", "Linux allows 12 bits and 20 bits")
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def _write_superblock(
    image: bytearray, layout: Layout, root: Node, devices: Sequence[Device], uuid: bytes
) -> None:
    for index, device in enumerate(devices):
        DEVICE_SLOT.pack_into(
            image,
            DEVICE_SLOT_BYTES * (DEVICE_SLOT_FIRST + index),
            device.tag,
            device.size_bytes >> BLOCK_BITS,
            0,
        )

    def pack(checksum: int) -> None:
        SUPER.pack_into(
            image,
            SUPER_OFFSET,
            SUPER_MAGIC,
            checksum,
            COMPAT_SB_CHECKSUM | COMPAT_MTIME,
            BLOCK_BITS,
            0,
            layout.nids[root],
            layout.count,
            0,
            0,
            len(image) >> BLOCK_BITS,
            0,
            0,
            uuid,
            b"lazyfs",
            INCOMPAT_DEVICES if devices else 0,
            0,
            len(devices),
            DEVICE_SLOT_FIRST if devices else 0,
            bytes(38),
        )

    pack(0)
    pack(superblock_checksum(image))
