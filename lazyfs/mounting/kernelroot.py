"""A root from the cache's daemon: a detached EROFS mount."""

from __future__ import annotations

from typing import Any

from lazyfs.control.client import Connection, DaemonGone
from lazyfs.errors import LazyfsError, Unsupported
from lazyfs.mounting import launch
from lazyfs.mounting.fuseroot import any_fuse_root
from lazyfs.mounting.job import Acquired, MountRequest, until_indexed


def _kernel_root(job: MountRequest) -> Acquired:
    connection: Connection | None = None

    def ask() -> dict[str, Any]:
        nonlocal connection
        request = {"op": "mount", **job.request()}
        for attempt in (1, 2, 3):
            if connection is not None:
                connection.close()
            connection = launch.connect_or_start(job.cache, job.runtime)
            try:
                return connection.ask(request, job.silence_s(), job.progress)
            except DaemonGone:  # it was just ending, or was killed: the next one answers
                if attempt == 3:
                    raise
        raise AssertionError("unreachable")

    try:
        reply = until_indexed(job, ask)
        assert connection is not None
        return Acquired(connection.take_fd(), connection, reply, "kernel", reply.get("joined") is True)
    except BaseException:
        if connection is not None:
            connection.close()
        raise


def kernel_root_or_fuse(job: MountRequest) -> Acquired:
    try:
        return _kernel_root(job)
    except Unsupported as error:  # no file-backed EROFS, say
        if job.options.backend != "auto":
            raise
        job.progress(f"the kernel backend failed ({error.message}): trying backend=fuse")
        try:
            return any_fuse_root(job)
        except LazyfsError:
            raise error from None
