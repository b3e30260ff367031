"""System calls that Python lacks, by ctypes, and what their errors mean."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from lazyfs.errors import HostError, Unsupported

_SYS_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS = 0x2
_RESOLVE_IN_ROOT = 0x10

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
c_int = ctypes.c_long  # each integer must fill a register: syscall(2) is variadic
c_ptr = ctypes.c_char_p


class SyscallError(HostError):
    """A system call failed; `errno` says why."""

    def __init__(self, message: str, number: int, hint: str = "") -> None:
        super().__init__(message, hint)
        self.errno = number


class UnsupportedCall(SyscallError, Unsupported):
    """The kernel lacks the call or the file system, or does not allow it to this process."""


_UNSUPPORTED = (errno.EPERM, errno.ENOSYS, errno.ENODEV, errno.EOPNOTSUPP)
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
    """The error for errno `number`, with the kernel's own message (`detail`) if it gave one."""
    reason = f"{os.strerror(number)}: {detail}" if detail else os.strerror(number)
    kind = UnsupportedCall if number in _UNSUPPORTED else SyscallError
    return kind(f"{what} failed: {reason}", number, _HINTS.get(number, "see the kernel log (dmesg)"))


def syscall(number: int, *arguments: object) -> int:
    """The call's result, or minus errno."""
    result: int = libc.syscall(c_int(number), *arguments)
    return -ctypes.get_errno() if result < 0 else result


def checked(what: str, number: int, *arguments: object) -> int:
    """The call's result. Raises SyscallError, whose message begins with `what`."""
    result = syscall(number, *arguments)
    if result < 0:
        raise failure(what, -result)
    return result


def openat2_in_root(directory_fd: int, path: str, flags: int, mode: int = 0) -> int:
    """Opens `path` as if `directory_fd` were "/": "..", absolute symlinks and magic links do not lead out of it
    (openat2(2), RESOLVE_IN_ROOT). For walking an image's contents on the host."""
    # struct open_how: flags, mode, resolve
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    for _ in range(100):
        result = syscall(
            _SYS_OPENAT2, c_int(directory_fd), c_ptr(os.fsencode(path)), c_ptr(how), c_int(len(how))
        )
        if result != -errno.EAGAIN:  # EAGAIN: the kernel could not rule out a race with a rename
            break
    if result < 0:
        raise failure(f"opening {path} inside the root", -result)
    return result
