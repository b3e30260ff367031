"""Upper directories of writable mounts without ``upperdir=``: records on disk, whose one owner is this module.

    <cache>/uppers/<random>/record   what it was made for: JSON, see `Record`
                           /lock     flock: shared by the processes that hold it, exclusive for removing
                           /upper    what was written
                           /work     overlayfs' own
                           /probe    for asking the kernel, see `_kernel_uses`

An upper directory is held while a process has its lock shared, or while the kernel has an overlay on it. The lock
covers the time until the overlay is there: the client holds it, then the process that serves the mount. The kernel
covers what nobody can count: overlays in other mount namespaces, and those that live on when every process of lazyfs
was killed. What is not held is of no use to anybody, for it was to end with its mount: `sweep` removes it.

The client, for a mount:    upper = make(cache, image, manifest_digest); ...; upper.close() or upper.discard()
Daemon and fuse process:    held = HeldUppers(cache); held.hold(path); ...; held.release(path); sweep(cache)
"""

from __future__ import annotations

import fcntl
import os
import time

from lazyfs.cache.locks import Exclusive, lock_shared
from lazyfs.cache.places import LOCK, REMOVED, TMP, UPPERS
from lazyfs.core import lightjson
from lazyfs.errors import LazyfsError, UserError
from lazyfs.records import NamedTuple
from lazyfs.system.detached import overlay_mount_detached
from lazyfs.system.mountapi import open_tree_clone
from lazyfs.system.private import make_private

# Names in an upper directory's directory, besides LOCK.
RECORD, UPPER, WORK, PROBE = "record", "upper", "work", "probe"
_MAX_RECORD_BYTES = 64 << 10


class Upper(NamedTuple):
    """A new upper directory, held through `lock_fd`, which is the caller's."""

    path: str  # its directory in <cache>/uppers; reported to the daemon as "ephemeral_upper"
    lock_fd: int
    cache: str

    @property
    def upper(self) -> str:
        return os.path.join(self.path, UPPER)

    @property
    def work(self) -> str:
        return os.path.join(self.path, WORK)

    def close(self) -> None:
        """The mount is there, and its daemon knows: from now on others hold it."""
        os.close(self.lock_fd)

    def discard(self) -> None:
        """There will be no mount. Call it when the overlay, if there was one, has been closed."""
        self.close()
        remove(self.cache, self.path)


class Record(NamedTuple):
    """An upper directory as it lies there. Image and digest are empty if that cannot be read."""

    path: str
    image: str
    manifest_digest: str
    made_at_s: float  # since the epoch
    held: bool


def _directory(cache: str) -> str:
    return os.path.join(cache, UPPERS)


def make(cache: str, image: str, manifest_digest: str) -> Upper:
    """A new, empty upper directory for a mount of `image`. On the cache's disk, and below a directory that only its
    owner may enter (set-id files: CVE-2021-41103). Raises OSError, HostError."""
    name = os.urandom(8).hex()
    temporary = os.path.join(cache, TMP)
    for directory in (_directory(cache), temporary):
        make_private(directory)
    # It appears complete and locked, so that nobody takes it for one that was left behind.
    new = os.path.join(temporary, f"upper-{name}")
    lock_fd = -1
    try:
        for path in (new, os.path.join(new, UPPER), os.path.join(new, WORK)):
            os.mkdir(path, 0o700)
        with open(os.path.join(new, RECORD), "w", encoding="ascii") as file:
            record = {"image": image, "manifest_digest": manifest_digest, "made_at_s": time.time()}
            file.write(lightjson.dumps(record))
        lock_fd = os.open(os.path.join(new, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock_fd, fcntl.LOCK_SH)
        path = os.path.join(_directory(cache), name)
        os.rename(new, path)
    except BaseException:
        if lock_fd >= 0:
            os.close(lock_fd)
        _delete(new)
        raise
    return Upper(path, lock_fd, cache)


class HeldUppers:
    """The upper directories that this process holds for the mounts that it serves."""

    def __init__(self, cache: str) -> None:
        self.cache = cache
        self._lock_fds: dict[str, int] = {}

    def hold(self, path: str) -> None:
        """Idempotent. Raises UserError if `path` is none of the cache's: it would be removed in the end."""
        if path in self._lock_fds:
            return
        if os.path.realpath(os.path.dirname(path)) != os.path.realpath(_directory(self.cache)):
            raise UserError(f"{path} is not an upper directory of the cache")
        lock = os.path.join(path, LOCK)
        try:
            lock_fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UserError(f"the upper directory {path} cannot be held: {error.strerror}") from None
        if not lock_shared(lock_fd, lock):
            os.close(lock_fd)
            raise UserError(f"the upper directory {path} was removed", "mount again")
        self._lock_fds[path] = lock_fd

    def release(self, path: str) -> None:
        """Nothing happens if it is not held. It lies there until somebody sweeps."""
        lock_fd = self._lock_fds.pop(path, None)
        if lock_fd is not None:
            os.close(lock_fd)

    def release_all(self) -> None:
        for path in list(self._lock_fds):
            self.release(path)


def records(cache: str) -> list[Record]:
    """All that lie there, held or not; the oldest first."""
    found = []
    for path in _paths(cache):
        try:
            found.append(_record(path))
        except OSError:
            continue  # removed just now
    return sorted(found, key=lambda record: record.made_at_s)


def _paths(cache: str) -> list[str]:
    try:
        return [os.path.join(_directory(cache), name) for name in os.listdir(_directory(cache))]
    except OSError:  # there never was one
        return []


def _record(path: str) -> Record:
    image, manifest_digest, made_at_s = "", "", os.stat(path).st_mtime
    try:
        with open(os.path.join(path, RECORD), "rb") as file:
            said = lightjson.loads(file.read(_MAX_RECORD_BYTES).decode())
        image, manifest_digest = str(said["image"]), str(said["manifest_digest"])
        made_at_s = float(said["made_at_s"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # made by an earlier version, or torn
    with _Unheld(path) as free:
        return Record(path, image, manifest_digest, made_at_s, not free)


class _Unheld(Exclusive):
    """A context manager that says whether nobody holds it. While the context lasts no process can begin to."""

    def __init__(self, path: str) -> None:
        self._directory = path
        super().__init__(os.path.join(path, LOCK))

    def __enter__(self) -> bool:
        try:  # noqa: SIM105 - contextlib takes 4 ms to import
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError:
            pass  # it is gone
        if not super().__enter__():
            return False
        try:
            return not _kernel_uses(self._directory)
        except BaseException:
            self.__exit__()
            raise


def _kernel_uses(path: str) -> bool:
    """Whether an overlay on it lives, in whatever mount namespace. With index=on the kernel refuses (EBUSY) to use an
    upper directory twice, so one is tried, attached nowhere. If that fails for another reason we do not know."""
    upper, probe = os.path.join(path, UPPER), os.path.join(path, PROBE)
    if not os.path.isdir(upper):
        return False
    lower, work = os.path.join(probe, "lower"), os.path.join(probe, "work")
    try:
        for directory in (probe, lower, work):
            make_private(directory)
        lower_fd = open_tree_clone(lower)
        try:
            os.close(overlay_mount_detached(lower_fd, upper, work, ("index=on",)))
        finally:
            os.close(lower_fd)
    except LazyfsError:
        return True
    return False


def remove(cache: str, path: str) -> bool:
    """Removes an upper directory unless it is held; says whether it is gone. May take long: it may hold a lot."""
    grave = os.path.join(cache, TMP, f"{REMOVED}{os.getpid()}-{os.path.basename(path)}")
    with _Unheld(path) as free:
        if not free:
            return not os.path.lexists(path)
        try:
            make_private(os.path.dirname(grave))
            os.rename(path, grave)
        except (OSError, LazyfsError):
            return False
    _delete(grave)
    return True


def sweep(cache: str) -> None:
    """Removes what nobody holds: of mounts that have ended, or whose processes were killed. May take long."""
    for path in _paths(cache):
        remove(cache, path)


def _delete(path: str) -> None:
    import shutil  # rarely wanted by the client, to which it costs milliseconds

    shutil.rmtree(path, ignore_errors=True)
