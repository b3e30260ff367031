"""Detached mounts: file systems that are mounted and reachable through a descriptor, but attached nowhere.

No mount table shows them and they end with their last user, so a crash leaves nothing behind. The path of a file
in one is ``/proc/self/fd/N/name``, valid in the process that holds descriptor N.

Before Linux 6.15 the kernel refuses to clone a detached mount or to build an overlay on one (EINVAL). Then a thread
with its own mount namespace does the same: there it can attach the mount unseen.
"""

from __future__ import annotations

import errno
import os

from lazyfs.system.mountapi import (
    MOUNT_NODEV,
    MOUNT_NOSUID,
    MOUNT_RDONLY,
    fsconfig_create,
    fsconfig_fd,
    fsconfig_flag,
    fsconfig_string,
    fsmount,
    fsopen,
    mount_setattr,
    move_mount,
    open_tree_clone,
    unshare_mounts,
)
from lazyfs.system.syscalls import SyscallError, UnsupportedCall, failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SAFE = MOUNT_RDONLY | MOUNT_NOSUID | MOUNT_NODEV

# Where the fallback attaches, in a namespace that only its thread sees: a directory that every Linux system has and
# that holds no images, caches or upper directories.
_HIDDEN_MOUNT_POINT = "/sys"


def fuse_mount_detached(fuse_fd: int, source: str = "lazyfs", subtype: str = "lazyfs") -> int:
    """Mounts the FUSE connection of `fuse_fd` (a fresh /dev/fuse); returns the mount's descriptor.

    The kernel queues FUSE_INIT, which the caller answers on `fuse_fd`. Only root's processes may use the
    mount (no allow_other): EROFS opens the files with the daemon's credentials, once.
    """
    context_fd = fsopen("fuse")
    try:
        fsconfig_string(context_fd, "source", source)
        fsconfig_string(context_fd, "subtype", subtype)
        fsconfig_string(context_fd, "fd", str(fuse_fd))  # as a string: by descriptor only since 6.10
        fsconfig_string(context_fd, "rootmode", "40000")
        fsconfig_string(context_fd, "user_id", str(os.geteuid()))
        fsconfig_string(context_fd, "group_id", str(os.getegid()))
        fsconfig_flag(context_fd, "ro")
        fsconfig_create(context_fd, "fuse")
        return fsmount(context_fd, SAFE)
    finally:
        os.close(context_fd)


def erofs_mount_detached(namespace_path: str, device_paths: Sequence[str], directio: bool = True) -> int:
    """Mounts the EROFS metadata file with its data devices, in the order of its device table.

    Files back it without loop devices (Linux 6.12, CONFIG_EROFS_FS_BACKED_BY_FILE). `directio` keeps the devices'
    pages out of the page cache, which would otherwise hold everything twice. The mount is read-only, nosuid and
    nodev; `clone_mount` makes a copy with other attributes. Each path has at most 255 bytes. Raises UnsupportedCall
    if the kernel cannot do it, another SyscallError if it fails.
    """
    try:
        return _erofs_by_file(namespace_path, device_paths, directio)
    except SyscallError as error:
        if error.errno == errno.ENOTBLK:  # the file system lacks read_folio, or the kernel file-backed EROFS
            message = "the kernel cannot mount EROFS from a file on the cache's file system (tmpfs?)"
            hint = "choose a cache=DIR on a disk, or backend=fuse"
            raise UnsupportedCall(message, error.errno, hint) from None
        if error.errno in (errno.EINVAL, errno.EACCES):  # an unknown option or feature; forbidden
            hint = "use backend=fuse; the kernel log (dmesg) may say why"
            raise UnsupportedCall(error.message, error.errno, hint) from None
        raise


def _erofs_by_file(namespace_path: str, device_paths: Sequence[str], directio: bool) -> int:
    context_fd = fsopen("erofs")
    try:
        fsconfig_string(context_fd, "source", namespace_path)
        for path in device_paths:
            fsconfig_string(context_fd, "device", path)
        if directio:
            fsconfig_flag(context_fd, "directio")
        fsconfig_create(context_fd, f"EROFS from {namespace_path}")
        return fsmount(context_fd, SAFE)
    finally:
        os.close(context_fd)


def clone_mount(mount_fd: int, attributes: int = SAFE) -> int:
    """Another detached mount of the same superblock, and so of the same page cache. `attributes` are exactly those of
    MOUNT_RDONLY, MOUNT_NOSUID, MOUNT_NODEV, MOUNT_NOEXEC that it gets. `mount_fd` may be detached or attached."""
    try:
        clone_fd = open_tree_clone(mount_fd)
    except SyscallError as error:
        if error.errno != errno.EINVAL:
            raise
        clone_fd = _clone_hidden(mount_fd)
    try:
        mount_setattr(clone_fd, attributes)
    except BaseException:
        os.close(clone_fd)
        raise
    return clone_fd


def attach(mount_fd: int, target: str | int) -> None:
    """Attaches a detached mount at `target` (path or directory descriptor). Then `mount_fd` may be closed; a mount
    that was never attached ends with its descriptor."""
    move_mount(mount_fd, target)


def overlay_mount_detached(
    lower_fd: int,
    upper: str,
    work: str,
    options: Sequence[str] = (),
    attributes: int = MOUNT_NODEV | MOUNT_NOSUID,
) -> int:
    """Makes an overlay on the (detached) mount `lower_fd` and returns it detached. `upper` and `work` are directories
    on one writable file system. `options` are further ones, such as "metacopy=on" or "volatile"."""
    try:
        return _overlay_by_fd(lower_fd, upper, work, options, attributes)
    except SyscallError as error:
        if error.errno != errno.EINVAL:
            raise
        try:
            return _overlay_hidden(lower_fd, upper, work, options, attributes)
        except SyscallError:
            raise error from None  # the first error had another cause than an old kernel


def _set_option(context_fd: int, option: str) -> None:
    key, separator, value = option.partition("=")
    if separator:
        fsconfig_string(context_fd, key, value)
    else:
        fsconfig_flag(context_fd, key)


def _overlay_by_fd(lower_fd: int, upper: str, work: str, options: Sequence[str], attributes: int) -> int:
    """Gives descriptors (Linux 6.13), so that no path needs escaping or can be swapped."""
    context_fd = fsopen("overlay")
    opened: list[int] = []
    try:
        fsconfig_string(context_fd, "source", "lazyfs")
        fsconfig_fd(context_fd, "lowerdir+", lower_fd)
        for key, path in (("upperdir", upper), ("workdir", work)):
            opened.append(_open_directory(path))
            fsconfig_fd(context_fd, key, opened[-1])
        for option in options:
            _set_option(context_fd, option)
        fsconfig_create(context_fd, "overlay")
        return fsmount(context_fd, attributes)
    finally:
        for fd in (context_fd, *opened):
            os.close(fd)


def _open_directory(path: str) -> int:
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise failure(f"opening {path}", error.errno or errno.EIO) from None


def _overlay_by_path(lower: str, upper: str, work: str, options: Sequence[str], attributes: int) -> int:
    context_fd = fsopen("overlay")
    try:
        fsconfig_string(context_fd, "source", "lazyfs")
        fsconfig_string(context_fd, "lowerdir", lower)
        fsconfig_string(context_fd, "upperdir", upper)
        fsconfig_string(context_fd, "workdir", work)
        for option in options:
            _set_option(context_fd, option)
        fsconfig_create(context_fd, "overlay")
        return fsmount(context_fd, attributes)
    finally:
        os.close(context_fd)


def _hidden(mount_fd: int, action: Callable[[], int]) -> int:
    """Runs `action` in a thread whose private mount namespace has the mount at _HIDDEN_MOUNT_POINT. The attached mount
    ends with that namespace, so a fresh detached clone replaces `mount_fd`."""
    import threading  # here, because the light client does not need it

    results: list[int] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            unshare_mounts()
            move_mount(mount_fd, _HIDDEN_MOUNT_POINT)
            fresh_fd = open_tree_clone(_HIDDEN_MOUNT_POINT)
            try:
                results.append(action())
            finally:
                os.dup2(fresh_fd, mount_fd, inheritable=os.get_inheritable(mount_fd))
                os.close(fresh_fd)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _clone_hidden(mount_fd: int) -> int:
    return _hidden(mount_fd, lambda: open_tree_clone(_HIDDEN_MOUNT_POINT))


def _overlay_hidden(lower_fd: int, upper: str, work: str, options: Sequence[str], attributes: int) -> int:
    return _hidden(
        lower_fd, lambda: _overlay_by_path(_HIDDEN_MOUNT_POINT, upper, work, options, attributes)
    )
