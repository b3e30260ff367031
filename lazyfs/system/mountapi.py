"""Linux' new mount API and mount attributes, which Python lacks. `system/detached.py` builds whole mounts with it.

Standard library only, because the light `mount` client imports this module (4 ms, nearly all of it ctypes).

Every function raises `SyscallError`, whose `errno` callers may branch on. Returned descriptors are close-on-exec and
belong to the caller, as do those that are passed in. Paths are host paths.
"""

from __future__ import annotations

import ctypes
import os
import struct

from lazyfs.system.syscalls import c_int, c_ptr, checked, failure, libc, syscall

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

# The same on every architecture except alpha: these calls are younger than the unified tables.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
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


# -- building a mount (fsopen ... fsmount) ---------------------------------------------------------------


def fsopen(fstype: str) -> int:
    """A new, empty file system context; close it after `fsmount`."""
    what = f"opening file system {fstype}"
    return checked(what, _SYS_FSOPEN, c_ptr(fstype.encode()), c_int(_FSOPEN_CLOEXEC))


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
    result = syscall(
        _SYS_FSCONFIG,
        c_int(context_fd),
        c_int(command),
        c_ptr(None if key is None else key.encode()),
        c_ptr(None if value is None else os.fsencode(value)),
        c_int(aux),
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
    """A detached mount (an O_PATH descriptor of its root). It lives until its last descriptor is closed or, once
    attached, like any mount. `attributes`: MOUNT_RDONLY, ..."""
    return checked(
        "creating the mount", _SYS_FSMOUNT, c_int(context_fd), c_int(_FSMOUNT_CLOEXEC), c_int(attributes)
    )


# -- mounts that exist -----------------------------------------------------------------------------------


def move_mount(mount_fd: int, target: str | int) -> None:
    """Attaches a detached mount at `target`: a path (a symlink in its last part is not followed), or a descriptor
    of the directory, which nobody can swap in the meantime."""
    by_fd = isinstance(target, int)
    checked(
        f"attaching the mount at {'descriptor ' if by_fd else ''}{target}",
        _SYS_MOVE_MOUNT,
        c_int(mount_fd),
        c_ptr(b""),
        c_int(target if isinstance(target, int) else AT_FDCWD),
        c_ptr(b"" if isinstance(target, int) else os.fsencode(target)),
        c_int(_MOVE_MOUNT_F_EMPTY_PATH | (_MOVE_MOUNT_T_EMPTY_PATH if by_fd else 0)),
    )


def open_tree_clone(source: str | int) -> int:
    """A detached copy of the mount at `source` (path, or descriptor of a mount's root), same superblock.
    A source that is itself detached needs Linux 6.15 (EINVAL before): see `detached.clone_mount`."""
    by_fd = isinstance(source, int)
    return checked(
        "cloning the mount",
        _SYS_OPEN_TREE,
        c_int(source if isinstance(source, int) else AT_FDCWD),
        c_ptr(b"" if isinstance(source, int) else os.fsencode(source)),
        c_int(_OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | (AT_EMPTY_PATH if by_fd else 0)),
    )


def mount_setattr(mount_fd: int, attributes: int) -> None:
    """Sets exactly these of RDONLY, NOSUID, NODEV, NOEXEC on the mount and clears the others of the four."""
    if attributes & ~_SETTABLE:
        raise ValueError(f"attributes {attributes:#x}")
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
    request = struct.pack("=QQQQ", attributes, _SETTABLE & ~attributes, 0, 0)
    checked(
        "setting mount attributes",
        _SYS_MOUNT_SETATTR,
        c_int(mount_fd),
        c_ptr(b""),
        c_int(AT_EMPTY_PATH),
        c_ptr(request),
        c_int(len(request)),
    )


def umount2(target: str, flags: int = 0) -> None:
    """Unmounts. MNT_DETACH detaches the mount now; it ends with its last user."""
    if libc.umount2(c_ptr(os.fsencode(target)), ctypes.c_int(flags)) != 0:
        raise failure(f"unmounting {target}", ctypes.get_errno())


def unshare_mounts() -> None:
    """Gives the calling *thread* its own, private copy of the mount table."""
    if libc.unshare(ctypes.c_int(CLONE_NEWNS)) != 0:
        raise failure("making a mount namespace", ctypes.get_errno())
    if libc.mount(None, c_ptr(b"/"), None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None) != 0:
        raise failure("making mounts private", ctypes.get_errno())
