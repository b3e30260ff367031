"""The FUSE protocol's bytes, as far as a flat directory of read-only files needs them.

Source: include/uapi/linux/fuse.h, protocol 7.36 (what we ask for; the kernel then talks 7.36 or lower).
All structs are in the host's byte order, as the kernel's are. Imports only os and struct, because the keeper
answers FUSE_INIT with it.
"""

from __future__ import annotations

import errno
import os
import struct

MAJOR = 7
MINOR = 36

# Operations (enum fuse_opcode)
LOOKUP = 1
FORGET = 2
GETATTR = 3
OPEN = 14
READ = 15
STATFS = 17
RELEASE = 18
FLUSH = 25
INIT = 26
OPENDIR = 27
READDIR = 28
RELEASEDIR = 29
INTERRUPT = 36
DESTROY = 38
BATCH_FORGET = 42

ROOT_ID = 1

# fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
IN_HEADER = struct.Struct("=IIQQIIIHxx")
# fuse_out_header: len, error (minus errno), unique
OUT_HEADER = struct.Struct("=IiQ")
# fuse_read_in: fh, offset, size, read_flags, lock_owner, flags, padding; only the first three are of use
READ_IN = struct.Struct("=QQI")
# fuse_init_in: major, minor, max_readahead, flags (, flags2, unused[11])
_INIT_IN = struct.Struct("=4I")
# fuse_init_out: major, minor, max_readahead, flags, max_background, congestion_threshold, max_write,
# time_gran, max_pages, map_alignment, flags2, unused[7]
_INIT_OUT = struct.Struct("=4IHHIIHHI28x")
# fuse_attr: ino, size, blocks, atime, mtime, ctime, 3 x nsec, mode, nlink, uid, gid, rdev, blksize, flags
_ATTR = struct.Struct("=6Q10I")
# fuse_entry_out without attr: nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec
_ENTRY = struct.Struct("=4QII")
# fuse_attr_out without attr: attr_valid, attr_valid_nsec, dummy
_ATTR_OUT = struct.Struct("=QII")
# fuse_statfs_out: blocks, bfree, bavail, files, ffree, bsize, namelen, frsize, padding, spare[6]
_STATFS = struct.Struct("=5QIIII24x")
# fuse_dirent: ino, off, namelen, type
_DIRENT = struct.Struct("=QQII")

NOTIFY_RESEND = 7  # enum fuse_notify_code, Linux 6.9

# FUSE_INIT flags
_ASYNC_READ = 1 << 0
_ASYNC_DIO = 1 << 15
_NO_OPEN_SUPPORT = 1 << 17
_PARALLEL_DIROPS = 1 << 18
_MAX_PAGES = 1 << 22
_NO_OPENDIR_SUPPORT = 1 << 24
_WANTED = _ASYNC_READ | _ASYNC_DIO | _NO_OPEN_SUPPORT | _PARALLEL_DIROPS | _MAX_PAGES | _NO_OPENDIR_SUPPORT

PAGE_BYTES = 4096
MAX_READ_PAGES = 256  # 1 MiB a READ: the kernel's default limit (fs.fuse.max_pages_limit)
MAX_BACKGROUND = 256  # READs in flight; the kernel queues further ones
_CONGESTION = 192
_MAX_WRITE = PAGE_BYTES  # nothing is ever written; the smallest the kernel takes

# The kernel refuses reads into a smaller buffer (FUSE_MIN_READ_BUFFER, or header + max_write).
REQUEST_BUFFER_BYTES = 16384

FOREVER_S = 1 << 31  # seconds: content addressed files never change
_FILE_MODE = 0o100400
_DIRECTORY_MODE = 0o40500
DT_DIR = 4
DT_REG = 8


class WireError(Exception):
    """The connection is broken: the kernel sent or refused something against the protocol."""


def reply(fuse_fd: int, unique: int, *parts: bytes | memoryview) -> bool:
    """Answers a request. False if the request or the connection is gone. Raises WireError."""
    return _write(fuse_fd, OUT_HEADER.pack(OUT_HEADER.size + sum(map(len, parts)), 0, unique), *parts)


def reply_error(fuse_fd: int, unique: int, number: int) -> bool:
    """Answers a request with errno `number`."""
    return _write(fuse_fd, OUT_HEADER.pack(OUT_HEADER.size, -number, unique))


def _write(fuse_fd: int, *parts: bytes | memoryview) -> bool:
    try:
        os.writev(fuse_fd, parts)
    except OSError as error:
        # ENOENT: interrupted, or another process answered it; ENODEV: unmounted
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return False
        raise WireError(f"answering a FUSE request: {os.strerror(error.errno or 0)}") from error
    return True


def resend(fuse_fd: int) -> None:
    """Makes the kernel queue again every request that was read but not answered (FUSE_NOTIFY_RESEND).
    Raises OSError: ENODEV if the mount is gone, EINVAL before Linux 6.9."""
    os.writev(fuse_fd, (OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0),))


def answer_init(fuse_fd: int) -> None:
    """Reads the first request of a new connection, FUSE_INIT, and answers it. Raises OSError, WireError."""
    request = os.read(fuse_fd, REQUEST_BUFFER_BYTES)
    _, opcode, unique, *_ = IN_HEADER.unpack_from(request)
    if opcode != INIT:
        raise WireError(f"operation {opcode} before FUSE_INIT")
    major, minor, max_readahead, flags = _INIT_IN.unpack_from(request, IN_HEADER.size)
    if major != MAJOR or minor < MINOR:
        reply_error(fuse_fd, unique, errno.EPROTO)
        raise WireError(f"the kernel's FUSE protocol is {major}.{minor}, {MAJOR}.{MINOR} is needed")
    out_bytes = _INIT_OUT.pack(
        MAJOR,
        MINOR,
        max_readahead,
        flags & _WANTED,
        MAX_BACKGROUND,
        _CONGESTION,
        _MAX_WRITE,
        1,
        MAX_READ_PAGES,
        0,
        0,
    )
    if not reply(fuse_fd, unique, out_bytes):
        raise WireError("the connection ended during FUSE_INIT")


def attributes(nodeid: int, size_bytes: int | None, uid: int = 0, gid: int = 0) -> bytes:
    """struct fuse_attr of a file, or with None of the root directory."""
    size, mode = (0, _DIRECTORY_MODE) if size_bytes is None else (size_bytes, _FILE_MODE)
    links = 2 if size_bytes is None else 1
    sectors = -(-size // 512)
    return _ATTR.pack(nodeid, size, sectors, 0, 0, 0, 0, 0, 0, mode, links, uid, gid, 0, PAGE_BYTES, 0)


def entry_out(nodeid: int, generation: int, attribute_bytes: bytes) -> bytes:
    """Answer to LOOKUP: valid for ever."""
    return _ENTRY.pack(nodeid, generation, FOREVER_S, FOREVER_S, 0, 0) + attribute_bytes


def attr_out(attribute_bytes: bytes) -> bytes:
    """Answer to GETATTR."""
    return _ATTR_OUT.pack(FOREVER_S, 0, 0) + attribute_bytes


def statfs_out() -> bytes:
    return _STATFS.pack(0, 0, 0, 0, 0, PAGE_BYTES, 255, PAGE_BYTES, 0)


def dirent(nodeid: int, next_offset: int, name: bytes, kind: int) -> bytes:
    """One struct fuse_dirent, padded."""
    entry = _DIRENT.pack(nodeid, next_offset, len(name), kind) + name
    return entry + bytes(-len(entry) % 8)
