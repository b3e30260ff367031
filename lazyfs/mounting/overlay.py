"""Upper directories of writable mounts, and the overlay that joins one with an image's root."""

from __future__ import annotations

import errno
import os

from lazyfs.cache import uppers
from lazyfs.errors import HostError, UserError
from lazyfs.mounting.lease import Lease
from lazyfs.mounting.options import MountOptions
from lazyfs.records import NamedTuple
from lazyfs.system.detached import overlay_mount_detached
from lazyfs.system.syscalls import SyscallError

# metacopy: a chmod or chown copies up no data, so fetches none. index=off: an upper directory can be used again on
# another mount of the image, whatever the distribution's default is.
_OPTIONS = ("index=off", "metacopy=on")
_PLAIN_OPTIONS = ("index=off",)


class Upper(NamedTuple):
    """An upper directory and its work directory, on one file system. `ephemeral`: their record in the cache, which ends
    with the mount; None if the user named them."""

    upper: str
    work: str
    ephemeral: uppers.Upper | None

    @property
    def ephemeral_path(self) -> str | None:
        return self.ephemeral.path if self.ephemeral is not None else None

    def close(self) -> None:
        """Releases it, once the mount is there and its daemon holds it."""
        if self.ephemeral is not None:
            self.ephemeral.close()

    def discard(self) -> None:
        """Removes an ephemeral one, because there will be no mount. The user's own stays as it is."""
        if self.ephemeral is not None:
            self.ephemeral.discard()


def prepare_upper(options: MountOptions, lease: Lease) -> Upper:
    """The upper directory that `options` name, or a new one in the cache. An empty one gets owner, mode, times and
    attributes of the lease's root, because overlayfs shows those of the upper root. Raises UserError, HostError."""
    assert lease.fd is not None, "an ordinary user's root has no overlay"
    cache, lower_fd = lease.wanted.cache, lease.fd
    if options.upperdir is None:
        made: uppers.Upper | None = None
        try:
            made = uppers.make(cache, lease.image, lease.manifest_digest)
            _take_over_root(lower_fd, made.upper)
        except OSError as error:
            if made is not None:
                made.discard()
            raise HostError(
                f"cannot make an upper directory below {cache}: {error.strerror}", "give one with upperdir="
            ) from None
        return Upper(made.upper, made.work, made)
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
    """A descriptor of a detached overlay mount; the caller owns it. Raises HostError."""
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
