"""Linux system calls that Python lacks: the new mount API, mount attributes, openat2, passing descriptors.

Standard library only, because the light `mount` client imports this module (``import lazyfs.linux`` takes
about 4 ms, nearly all of it ctypes). Ready-made detached mounts are in `lazyfs.detached`.

Every function raises `SyscallError`, whose `errno` callers may branch on. Descriptors that are returned are
close-on-exec and belong to the caller. Paths are host paths; descriptors stay the caller's.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from lazyfs.errors import HostError

TYPE_CHECKING = False  # not from typing, which takes 8 ms to import
if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000  # include/uapi/linux/fcntl.h

MOUNT_RDONLY = 0x1  # include/uapi/linux/mount.h, MOUNT_ATTR_*
MOUNT_NOSUID = 0x2
MOUNT_NODEV = 0x4
MOUNT_NOEXEC = 0x8
_SETTABLE = MOUNT_RDONLY | MOUNT_NOSUID | MOUNT_NODEV | MOUNT_NOEXEC

MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

CLONE_NEWNS = 0x20000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

# One number on every architecture (they came after the tables were unified), except alpha.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_SYS_OPENAT2 = 437
_SYS_MOUNT_SETATTR = 442

_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_SET_FD = 5
_FSCONFIG_CMD_CREATE = 6
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_RESOLVE_NO_MAGICLINKS = 0x2
_RESOLVE_IN_ROOT = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_int = ctypes.c_long  # syscall(2) is variadic: each integer must fill a register
_ptr = ctypes.c_char_p


class SyscallError(HostError):
    """A system call failed; `errno` tells how."""

    def __init__(self, message: str, number: int, hint: str = "") -> None:
        super().__init__(message, hint)
        self.errno = number


_HINTS = {
    errno.EPERM: "run as root, or use the fuse backend",
    errno.EACCES: "check the permissions of the path",
    errno.ENOSYS: "this kernel is too old: the kernel backend needs Linux 6.12, use the fuse backend",
    errno.ENODEV: "the kernel lacks this file system: load its module or use the fuse backend",
    errno.ENOENT: "check that the path exists",
    errno.EBUSY: "something still uses it: close its files or unmount what is mounted below",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (fs.file-max)",
    errno.ENOSPC: "raise the limit of mounts (fs.mount-max)",
}


def failure(what: str, number: int, detail: str = "") -> SyscallError:
    """The error for `number`, with the kernel's own words (`detail`) where it gave some."""
    reason = f"{os.strerror(number)}: {detail}" if detail else os.strerror(number)
    return SyscallError(f"{what} failed: {reason}", number, _HINTS.get(number, "see the kernel log (dmesg)"))


def _syscall(number: int, *arguments: object) -> int:
    """The result, or minus errno."""
    result: int = _libc.syscall(_int(number), *arguments)
    return -ctypes.get_errno() if result < 0 else result


def _checked(what: str, number: int, *arguments: object) -> int:
    result = _syscall(number, *arguments)
    if result < 0:
        raise failure(what, -result)
    return result


# -- building a mount (fsopen ... fsmount) ---------------------------------------------------------------


def fsopen(fstype: str) -> int:
    """A new, empty file system context; close it after `fsmount`."""
    what = f"opening file system {fstype}"
    return _checked(what, _SYS_FSOPEN, _ptr(fstype.encode()), _int(_FSOPEN_CLOEXEC))


def _messages(context_fd: int) -> str:
    """What the kernel logged on the context: lines such as "e overlay: No lowerdir specified"."""
    found: list[str] = []
    while len(found) < 16:
        try:
            line = os.read(context_fd, 4096)
        except OSError:  # ENODATA: no more
            break
        if not line:
            break
        kind, _, text = line.decode("utf-8", "replace").strip().partition(" ")
        if kind != "i":
            found.append(text)
    return "; ".join(found)


def _fsconfig(context_fd: int, command: int, key: str | None, value: str | None, aux: int, what: str) -> None:
    result = _syscall(
        _SYS_FSCONFIG,
        _int(context_fd),
        _int(command),
        _ptr(None if key is None else key.encode()),
        _ptr(None if value is None else os.fsencode(value)),
        _int(aux),
    )
    if result < 0:
        raise failure(what, -result, _messages(context_fd))


def fsconfig_string(context_fd: int, key: str, value: str) -> None:
    """Sets option key=value. The kernel accepts at most 255 bytes of value."""
    _fsconfig(context_fd, _FSCONFIG_SET_STRING, key, value, 0, f"mount option {key}={value}")


def fsconfig_flag(context_fd: int, key: str) -> None:
    _fsconfig(context_fd, _FSCONFIG_SET_FLAG, key, None, 0, f"mount option {key}")


def fsconfig_fd(context_fd: int, key: str, value_fd: int) -> None:
    """Sets an option to an open descriptor; the kernel takes its own reference."""
    _fsconfig(context_fd, _FSCONFIG_SET_FD, key, None, value_fd, f"mount option {key} (descriptor)")


def fsconfig_create(context_fd: int, fstype: str = "the file system") -> None:
    """Creates the superblock: here the kernel reads the medium and complains."""
    _fsconfig(context_fd, _FSCONFIG_CMD_CREATE, None, None, 0, f"mounting {fstype}")


def fsmount(context_fd: int, attributes: int = 0) -> int:
    """A detached mount (an O_PATH descriptor of its root). It lives until the last descriptor is closed,
    or, once attached, as any mount. `attributes`: MOUNT_RDONLY, ..."""
    return _checked(
        "creating the mount", _SYS_FSMOUNT, _int(context_fd), _int(_FSMOUNT_CLOEXEC), _int(attributes)
    )


# -- mounts that exist -----------------------------------------------------------------------------------


def move_mount(mount_fd: int, target: str | int) -> None:
    """Attaches a detached mount at `target`: a path (a symlink in its last part is not followed), or a
    descriptor of the directory, which nobody can swap meanwhile."""
    by_fd = isinstance(target, int)
    _checked(
        f"attaching the mount at {'descriptor ' if by_fd else ''}{target}",
        _SYS_MOVE_MOUNT,
        _int(mount_fd),
        _ptr(b""),
        _int(target if isinstance(target, int) else AT_FDCWD),
        _ptr(b"" if isinstance(target, int) else os.fsencode(target)),
        _int(_MOVE_MOUNT_F_EMPTY_PATH | (_MOVE_MOUNT_T_EMPTY_PATH if by_fd else 0)),
    )


def open_tree_clone(source: str | int) -> int:
    """A detached copy of the mount at `source` (path, or descriptor of a mount's root), same superblock.
    A source that is itself detached needs Linux 6.15 (EINVAL before): see `lazyfs.detached.clone_mount`."""
    by_fd = isinstance(source, int)
    return _checked(
        "cloning the mount",
        _SYS_OPEN_TREE,
        _int(source if isinstance(source, int) else AT_FDCWD),
        _ptr(b"" if isinstance(source, int) else os.fsencode(source)),
        _int(_OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | (AT_EMPTY_PATH if by_fd else 0)),
    )


def mount_setattr(mount_fd: int, attributes: int) -> None:
    """Gives the mount exactly these of RDONLY, NOSUID, NODEV, NOEXEC: the others of the four are cleared."""
    if attributes & ~_SETTABLE:
        raise ValueError(f"attributes {attributes:#x}")
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
    request = struct.pack("=QQQQ", attributes, _SETTABLE & ~attributes, 0, 0)
    _checked(
        "setting mount attributes",
        _SYS_MOUNT_SETATTR,
        _int(mount_fd),
        _ptr(b""),
        _int(AT_EMPTY_PATH),
        _ptr(request),
        _int(len(request)),
    )


def umount2(target: str, flags: int = 0) -> None:
    """Unmounts; MNT_DETACH takes it out of the tree now and ends it when its last user goes."""
    if _libc.umount2(_ptr(os.fsencode(target)), ctypes.c_int(flags)) != 0:
        raise failure(f"unmounting {target}", ctypes.get_errno())


def unshare_mounts() -> None:
    """Gives the calling *thread* its own, private copy of the mount table."""
    if _libc.unshare(ctypes.c_int(CLONE_NEWNS)) != 0:
        raise failure("making a mount namespace", ctypes.get_errno())
    if _libc.mount(None, _ptr(b"/"), None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None) != 0:
        raise failure("making mounts private", ctypes.get_errno())


# -- files and sockets -----------------------------------------------------------------------------------


def openat2_in_root(directory_fd: int, path: str, flags: int, mode: int = 0) -> int:
    """Opens `path` as if `directory_fd` were "/": neither "..", nor absolute symlinks, nor magic links lead
    out of it (openat2(2), RESOLVE_IN_ROOT). For walking image contents on the host."""
    # struct open_how: flags, mode, resolve
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    for _ in range(100):
        result = _syscall(
            _SYS_OPENAT2, _int(directory_fd), _ptr(os.fsencode(path)), _ptr(how), _int(len(how))
        )
        if result != -errno.EAGAIN:  # EAGAIN: a rename raced, the kernel was not sure
            break
    if result < 0:
        raise failure(f"opening {path} inside the root", -result)
    return result


_SOL_SOCKET = 1
_SCM_RIGHTS = 1
_MSG_CTRUNC = 0x8
_MSG_CMSG_CLOEXEC = 0x40000000
_FD = struct.Struct("=i")


def send_fds(connection: socket.socket, data_bytes: bytes, fds: Sequence[int]) -> None:
    """Sends all of `data_bytes`, the descriptors with its first byte (SCM_RIGHTS). Descriptors stay open
    here. Raises OSError."""
    rights = b"".join(map(_FD.pack, fds))
    sent = connection.sendmsg([data_bytes], [(_SOL_SOCKET, _SCM_RIGHTS, rights)]) if fds else 0
    if sent < len(data_bytes):
        connection.sendall(memoryview(data_bytes)[sent:])


def recv_fds(connection: socket.socket, size: int, max_fds: int) -> tuple[bytes, list[int]]:
    """At most `size` bytes and the descriptors that came with them, close-on-exec, now the caller's.
    b"" at end of stream. Raises OSError; SyscallError (none kept) if more than `max_fds` came."""
    # CMSG_SPACE: a header of 16 bytes, the descriptors, padded to 8
    space = 16 + -(-max_fds * _FD.size // 8) * 8
    data_bytes, messages, flags, _ = connection.recvmsg(size, space, _MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, rights in messages:
        if level == _SOL_SOCKET and kind == _SCM_RIGHTS:
            fds += [fd for (fd,) in _FD.iter_unpack(rights[: len(rights) // _FD.size * _FD.size])]
    if flags & _MSG_CTRUNC or len(fds) > max_fds:
        for fd in fds:
            os.close(fd)
        raise failure("receiving descriptors", errno.EMSGSIZE, "more than expected, or too many open files")
    return data_bytes, fds
