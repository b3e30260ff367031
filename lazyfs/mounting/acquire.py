"""Gets the root of an image from a process of lazyfs, starting it if need be.

    kernel          the cache's daemon hands out a detached EROFS mount
    fuse, root      a fuse process mounts at a private place, and the client takes a detached clone of that; a later
                    lease of the image clones an attached mount (same superblock, same process)
    fuse, user      a fuse process mounts at the target itself, by fusermount3

A detached mount ends with its holder, so an interrupted client leaves nothing.
"""

from __future__ import annotations

from lazyfs.control.client import Connection, DaemonGone
from lazyfs.errors import LazyfsError, Unsupported
from lazyfs.mounting import launch
from lazyfs.mounting.lease import SILENT, Lease, Reporter, Wanted, until_indexed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_TRIES = 3


def acquire(wanted: Wanted, reporter: Reporter = SILENT, meanwhile: Callable[[], None] | None = None) -> Lease:
    """A lease of the root; the caller releases it. `meanwhile` is called while a daemon works, if one is asked: it may
    load what is needed later. Raises LazyfsError."""
    if wanted.backend == "fuse":
        return _fuse(wanted, reporter)
    try:
        return _kernel(wanted, reporter, meanwhile)
    except Unsupported as error:  # no file-backed EROFS, say
        if wanted.backend != "auto":
            raise
        reporter.progress(f"the kernel backend failed ({error.message}): trying backend=fuse")
        try:
            return _fuse(wanted, reporter)
        except LazyfsError:
            raise error from None


def _fuse(wanted: Wanted, reporter: Reporter) -> Lease:
    from lazyfs.mounting.fuseroot import fuse_lease

    return fuse_lease(wanted, reporter)


def _kernel(wanted: Wanted, reporter: Reporter, meanwhile: Callable[[], None] | None) -> Lease:
    connection: Connection | None = None

    def ask() -> dict[str, Any]:
        nonlocal connection
        for attempt in range(1, _TRIES + 1):
            if connection is not None:
                connection.close()
            connection = launch.connect_or_start(wanted.cache, wanted.runtime)
            try:
                connection.send({"op": "lease", **wanted.request()})
                from lazyfs.system import detached  # noqa: F401 - needed to attach; loaded while the daemon works

                if meanwhile is not None:
                    meanwhile()
                return connection.answer(wanted.silence_s(), reporter.progress)
            except DaemonGone:  # it was just ending, or was killed: the next one answers
                if attempt == _TRIES:
                    raise
        raise AssertionError("unreachable")

    try:
        reply = until_indexed(wanted, ask, reporter)
        assert connection is not None
        lease = Lease(wanted, connection, reply, "kernel")
        lease.joined = reply.get("joined") is True
        lease.fd = connection.take_fd()
        return lease
    except BaseException:
        if connection is not None:
            connection.close()
        raise
