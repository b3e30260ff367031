"""Upper directories of writable mounts, and the overlay that joins one with an image's root."""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from lazyfs.cache import places
from lazyfs.errors import HostError, UserError
from lazyfs.mounting.options import MountOptions
from lazyfs.system.detached import overlay_mount_detached
from lazyfs.system.syscalls import SyscallError

# metacopy: a chmod or chown copies up no data, so fetches none. index=off: whatever the distribution's
# default, an upper directory may be used again on another mount of the image.
_OPTIONS = ("index=off", "metacopy=on")
_PLAIN_OPTIONS = ("index=off",)


class Upper(NamedTuple):
    """An upper directory and its work directory, on one file system. `ephemeral`: their parent, which is to
    be removed when the mount has gone; None: the user's own."""

    upper: str
    work: str
    ephemeral: str | None


def prepare_upper(options: MountOptions, cache: str, lower_fd: int) -> Upper:
    """The upper directory that `options` name, or a new one below `cache`. An empty one takes over the owner,
    mode, times and attributes of the root of `lower_fd`, because overlayfs shows those of the upper root.
    Raises UserError, HostError."""
    if options.upperdir is None:
        ephemeral = os.path.join(places.uppers_directory(cache), os.urandom(8).hex())
        result = Upper(os.path.join(ephemeral, "upper"), os.path.join(ephemeral, "work"), ephemeral)
        try:
            os.mkdir(ephemeral, 0o700)
            os.mkdir(result.upper, 0o700)
            os.mkdir(result.work, 0o700)
            _take_over_root(lower_fd, result.upper)
        except OSError as error:
            discard(result)
            raise HostError(
                f"cannot make an upper directory below {cache}: {error.strerror}", "give one with upperdir="
            ) from None
        return result
    work = options.workdir or f"{options.upperdir.rstrip('/')}.work"
    result = Upper(options.upperdir, work, None)
    try:
        for path in (result.upper, work):
            os.makedirs(path, mode=0o700, exist_ok=True)
        if os.stat(result.upper).st_dev != os.stat(work).st_dev:
            raise UserError(
                f"{result.upper} and {work} are on different file systems", "choose another workdir="
            )
        if not os.listdir(result.upper):
            _take_over_root(lower_fd, result.upper)
    except OSError as error:
        raise UserError(
            f"cannot use the upper directory {error.filename or result.upper}: {error.strerror}",
            "upperdir= and workdir= must be directories on one local, writable file system",
        ) from None
    return result


def _take_over_root(lower_fd: int, upper: str) -> None:
    lower = f"/proc/self/fd/{lower_fd}"
    status = os.stat(lower)
    os.chown(upper, status.st_uid, status.st_gid)
    os.chmod(upper, status.st_mode & 0o7777)
    for name in os.listxattr(lower):
        if not name.startswith("trusted.overlay."):
            try:
                os.setxattr(upper, name, os.getxattr(lower, name))
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EPERM):  # the upper's file system lacks the kind
                    raise
    os.utime(upper, ns=(status.st_mtime_ns, status.st_mtime_ns))


def overlay(lower_fd: int, upper: Upper, attributes: int) -> int:
    """A detached overlay mount; its descriptor is the caller's. Raises HostError."""
    # An ephemeral upper is thrown away, so it need never be synced to disk (volatile).
    extra = ("volatile",) if upper.ephemeral else ()
    try:
        return overlay_mount_detached(lower_fd, upper.upper, upper.work, (*_OPTIONS, *extra), attributes)
    except SyscallError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        try:
            return overlay_mount_detached(
                lower_fd, upper.upper, upper.work, (*_PLAIN_OPTIONS, *extra), attributes
            )
        except SyscallError:
            raise HostError(
                f"no overlay can be made with {upper.upper}: {error.message}",
                "its file system must support overlayfs: use a local one (ext4, xfs, btrfs, tmpfs)",
            ) from None


def discard(upper: Upper) -> None:
    """Removes an ephemeral upper directory; nothing happens to the user's own."""
    if upper.ephemeral is not None:
        import shutil

        shutil.rmtree(upper.ephemeral, ignore_errors=True)
