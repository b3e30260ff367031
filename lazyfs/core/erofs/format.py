"""EROFS on-disk format: the part that lazyfs writes and accepts.

Source of every number: the kernel's ``fs/erofs/erofs_fs.h`` and ``Documentation/filesystems/erofs.rst``.
lazyfs uses a narrow profile and its reader refuses everything outside it, so that the kernel, too, only
ever sees these few features:

* 4 KiB blocks, extended (64-byte) inodes, ``meta_blkaddr`` 0, so an inode lies at byte ``nid * 32``;
* regular files: CHUNK_BASED with one chunk index, whose chunk is the whole file, one extent of an external
  device; without data FLAT_PLAIN; no device has a place (``mapped_blkaddr``) in the flat address space;
* directories and symbolic links: FLAT_INLINE where the tail fits behind the inode, else FLAT_PLAIN;
* inline extended attributes only; no compression, holes, shared or long-prefix attributes.
"""

from __future__ import annotations

import re
import stat
import struct
from dataclasses import dataclass

from lazyfs.core.tar.kinds import Kind
from lazyfs.errors import ImageError

BLOCK_BYTES = 4096
BLOCK_BITS = 12
SUPER_OFFSET = 1024
SUPER_MAGIC = 0xE0F5E1E2
SLOT_BYTES = 32  # a nid counts these
INODE_BYTES = 64
DEVICE_SLOT_BYTES = 128
DEVICE_SLOT_FIRST = (SUPER_OFFSET + 128) // DEVICE_SLOT_BYTES
NULL_BLOCK = 0xFFFFFFFF  # EROFS_NULL_ADDR: never a real block address

COMPAT_SB_CHECKSUM = 0x1
COMPAT_MTIME = 0x2  # extended inodes carry mtime (not ctime)
INCOMPAT_DEVICES = 0x4 | 0x8  # CHUNKED_FILE | DEVICE_TABLE: both in images with devices, else neither

FORMAT_PLAIN = 1 | 0 << 1  # i_format: extended inode | data layout
FORMAT_INLINE = 1 | 2 << 1
FORMAT_CHUNKS = 1 | 4 << 1
# i_u of a chunk-based inode: EROFS_CHUNK_FORMAT_INDEXES, and log2 of the blocks of a chunk: the largest there
# is, so one chunk has room for every file.
CHUNK_FORMAT = 0x20 | 31
CHUNK_BYTES = BLOCK_BYTES << 31  # 8 TiB

NAME_MAX = 255
SYMLINK_MAX = 4095  # PATH_MAX without the terminating NUL
ID_MAX = 0xFFFFFFFE  # (uid_t)-1 means "no user" to the kernel
NSEC_PER_S = 1_000_000_000
DEVICES_MAX = 4096  # images stay far below; keeps the root's nid in its 16-bit field
RDEV_MAJOR_MAX = 0xFFF  # new_encode_dev(): 12 bits of major,
RDEV_MINOR_MAX = 0xFFFFF  # 20 of minor

# magic, checksum, feature_compat, blkszbits, sb_extslots, root_nid, inos, build_time, build_time_nsec,
# blocks, meta_blkaddr, xattr_blkaddr, uuid, volume_name, feature_incompat, available_compr_algs,
# extra_devices, devt_slotoff; the rest (directory block size, attribute prefixes, packed inode) is zero here
SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHH38s")
# tag, blocks, mapped_blkaddr
DEVICE_SLOT = struct.Struct("<64sII56x")
# i_format, i_xattr_icount, i_mode, i_reserved, i_size, i_u, i_ino, i_uid, i_gid, i_mtime, i_mtime_nsec,
# i_nlink; the last 16 bytes are reserved. i_ino, a number for stat(2) on 32-bit systems, is 0: the kernel shows the
# nid, and numbers that only run on would be a tenth of the namespace as stored.
INODE = struct.Struct("<HHHHQIIIIqII")
# advise (in newer images the upper address bits; zero here), device_id (position in the device table + 1),
# blkaddr in that device; it follows inode and attributes at the next multiple of its own size
CHUNK_INDEX = struct.Struct("<HHI")
# An inode without attributes and, right behind it, its chunk index: what most regular files are
FILE = struct.Struct("<HHHHQIIIIqII16xHHI")
# nid, nameoff, file_type, reserved
DIRENT = struct.Struct("<QHBB")
# h_name_filter, h_shared_count, reserved
XATTR_HEADER = struct.Struct("<IB7s")
# e_name_len, e_name_index, e_value_size
XATTR_ENTRY = struct.Struct("<BBH")
XATTR_BODY_MAX = XATTR_HEADER.size + 4 * (0xFFFF - 1)  # i_xattr_icount has 16 bits

ACL_ACCESS = b"system.posix_acl_access"
ACL_DEFAULT = b"system.posix_acl_default"
# The two ACL names are whole names: nothing may follow them.
XATTR_PREFIXES = {1: b"user.", 2: ACL_ACCESS, 3: ACL_DEFAULT, 4: b"trusted.", 6: b"security."}

# ACL attributes are on disk as getxattr(2) gives them (linux/posix_acl_xattr.h): version 2; tag, rwx, id ...
_ACL_VERSION = struct.Struct("<I")
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_TAGS = {0x01: "u", 0x02: "U", 0x04: "g", 0x08: "G", 0x10: "m", 0x20: "o"}
# acl(5), "VALID ACLS": an ACL with named users or groups must have a mask.
_ACL_ORDER = re.compile("ugm?o|uU*gG*mo")

# Dirent file types equal Kind's values (Kind follows the FT_* numbers); inode types are the usual S_IF* bits.
TYPE_BITS: dict[Kind, int] = {
    Kind.FILE: stat.S_IFREG,
    Kind.DIR: stat.S_IFDIR,
    Kind.CHR: stat.S_IFCHR,
    Kind.BLK: stat.S_IFBLK,
    Kind.FIFO: stat.S_IFIFO,
    Kind.SYMLINK: stat.S_IFLNK,
}
KIND_OF_TYPE: dict[int, Kind] = {bits: kind for kind, bits in TYPE_BITS.items()}


@dataclass(frozen=True)
class Device:
    """One data device. `tag`: the layer's content root in hex, at most 64 bytes, no NUL. `size_bytes`: a
    multiple of 4096."""

    tag: bytes
    size_bytes: int


def superblock_checksum(first_block: bytes | bytearray) -> int:
    """CRC-32C as the kernel computes it: over the first block from the superblock on, with zeros in the checksum
    field, seed ~0, no final inversion."""
    crc = 0xFFFFFFFF
    table = _CRC32C_TABLE
    covered = b"".join(
        (first_block[SUPER_OFFSET : SUPER_OFFSET + 4], bytes(4), first_block[SUPER_OFFSET + 8 : BLOCK_BYTES])
    )
    for byte in covered:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC32C_TABLE = _crc32c_table()


def xattr_body(xattrs: dict[bytes, bytes]) -> bytes:
    """Inline attribute area of an inode: header and entries, sorted by name, each padded to 4 bytes.

    Names outside the five known namespaces are left out: no Linux file system would have taken them
    (setxattr(2): ENOTSUP), and the layer unpackers ignore that error. Raises ImageError for what cannot be
    stored: an overlong name, a NUL in it, a value over 65535 bytes, more than 256 KiB in all.
    """
    parts: list[bytes] = []
    length = XATTR_HEADER.size
    for name in sorted(xattrs):
        value = xattrs[name]
        index, suffix = _split_xattr_name(name)
        if not index:
            continue
        if b"\0" in suffix or len(suffix) > 255 or len(value) > 0xFFFF:
            raise ImageError(
                f"extended attribute {name[:64]!r} cannot be stored: value of {len(value)} bytes",
                "Linux allows names of 255 bytes without NUL, and EROFS values of 65535 bytes",
            )
        size = XATTR_ENTRY.size + len(suffix) + len(value)
        padding = -size % 4
        parts += (XATTR_ENTRY.pack(len(suffix), index, len(value)), suffix, value, bytes(padding))
        length += size + padding
    if not parts:
        return b""
    if length > XATTR_BODY_MAX:
        raise ImageError(
            f"a file has {length} bytes of extended attributes; EROFS stores {XATTR_BODY_MAX}",
            "the image has to be rebuilt with fewer or smaller attributes",
        )
    return b"".join((XATTR_HEADER.pack(0, 0, bytes(7)), *parts))


def acl_is_valid(value: bytes) -> bool:
    """Whether setxattr(2) would take `value` as an ACL. The kernel refuses access to files with an invalid one."""
    if len(value) % _ACL_ENTRY.size != _ACL_VERSION.size or _ACL_VERSION.unpack_from(value)[0] != 2:
        return False
    tags = ""
    for tag, permissions, owner in _ACL_ENTRY.iter_unpack(value[_ACL_VERSION.size :]):
        letter = _ACL_TAGS.get(tag, "?")
        if permissions > 7 or (letter in "UG" and owner > ID_MAX):
            return False
        tags += letter
    return _ACL_ORDER.fullmatch(tags) is not None


def _split_xattr_name(name: bytes) -> tuple[int, bytes]:
    """Namespace index and the rest of the name; index 0 for a name that no Linux file system takes."""
    for index, prefix in XATTR_PREFIXES.items():
        if name.startswith(prefix):
            suffix = name[len(prefix) :]
            # "user." alone and "system.posix_acl_accessX" are no names: setxattr(2) refuses both.
            return (index, suffix) if prefix.endswith(b".") == bool(suffix) else (0, b"")
    return 0, b""


def parse_xattr_body(body: bytes) -> dict[bytes, bytes]:
    """Inverse of `xattr_body`. Raises ImageError for anything that function does not write."""
    if len(body) <= XATTR_HEADER.size or XATTR_HEADER.unpack_from(body)[1]:
        raise ImageError("damaged index: bad extended attribute header")
    found: dict[bytes, bytes] = {}
    position = XATTR_HEADER.size
    while position < len(body):
        # Entries are 4-byte aligned and so is the body: the fixed part always fits.
        name_length, index, value_length = XATTR_ENTRY.unpack_from(body, position)
        position += XATTR_ENTRY.size
        value_start = position + name_length
        end = value_start + value_length
        prefix = XATTR_PREFIXES.get(index)
        if end > len(body) or prefix is None or prefix.endswith(b".") != bool(name_length):
            raise ImageError("damaged index: bad extended attribute")
        name = prefix + body[position:value_start]
        if name in found or b"\0" in name:
            raise ImageError("damaged index: bad extended attribute name")
        found[name] = body[value_start:end]
        position = end + -end % 4
    return found
