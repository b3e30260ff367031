"""The directory to mount at."""

from __future__ import annotations

import errno
import os

from lazyfs.errors import HostError, UserError


class AlreadyMounted(UserError):
    exit_code = 32  # what mount(8) says of EBUSY


def check_target(target: str) -> str:
    """The real path of a directory that can be mounted on. Raises UserError, AlreadyMounted."""
    path = os.path.realpath(target)
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        os.close(fd)
        covered = os.path.ismount(path)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise UserError(
                f"{target} is a mount whose daemon has died", f"lazyfs umount --lazy {target}"
            ) from None
        raise UserError(f"cannot mount on {target}: {error.strerror}", "give an existing directory") from None
    if covered:
        from lazyfs.mounting import unmount  # rare: most targets are plain directories

        if unmount.find(path) is not None:
            raise AlreadyMounted(f"{target} is already a lazyfs mount", f"lazyfs umount {target}")
    return path


def enter_mount_namespace(path: str) -> None:
    """Moves this (single-threaded) process into the mount namespace `path`, e.g. /proc/PID/ns/mnt; if `path` is a
    number, into that of the process. Raises UserError, HostError."""
    import ctypes

    from lazyfs.system.mountapi import CLONE_NEWNS

    if path.isdecimal():
        path = f"/proc/{path}/ns/mnt"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(
            f"cannot open the namespace {path}: {error.strerror}", "give /proc/PID/ns/mnt"
        ) from None
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNS) != 0:
            raise HostError(
                f"cannot enter the namespace {path}: {os.strerror(ctypes.get_errno())}", "run as root"
            )
    finally:
        os.close(fd)
