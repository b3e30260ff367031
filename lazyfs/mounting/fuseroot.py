"""A root from a fuse process."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from lazyfs.control import messages, rundir
from lazyfs.control.client import Connection, DaemonGone
from lazyfs.errors import HostError, LazyfsError
from lazyfs.mounting import launch
from lazyfs.mounting.job import Acquired, MountRequest, dev_of, until_indexed
from lazyfs.mounting.launch import StartError
from lazyfs.system import host


def any_fuse_root(job: MountRequest) -> Acquired:
    return _fuse_root(job) if host.is_root() else start_fuse(job, job.target)


def start_fuse(job: MountRequest, place: str) -> Acquired:
    """A fusemount process that serves at `place`; the mount is there when this returns."""
    connection: Connection | None = None
    process: launch.Child | None = None

    def ask() -> dict[str, Any]:
        nonlocal connection, process
        if connection is not None and process is not None:
            connection.close()
            process.end()
        connection, process = launch.start_fusemount(job.cache, job.runtime, job.image, place)
        request = {
            "op": "fuse_mount",
            **job.request(),
            "target": place,
            # Root's mounts are for everybody, as those of the kernel backend are; modes are checked.
            "allow_other": job.options.allow_other or host.is_root(),
            "exec": job.options.executable,
        }
        try:
            return connection.ask(request, job.silence_s(), job.progress)
        except DaemonGone:
            log = rundir.log_file(job.runtime)
            raise StartError(
                f"the fuse process ended: {launch.last_words(log) or 'it said nothing'}", f"see {log}"
            ) from None

    try:
        reply = until_indexed(job, ask)
    except BaseException:
        if connection is not None:
            connection.close()  # it ends by that; but it may hang
        if process is not None and process.poll() is None:
            process.end()
        raise
    assert connection is not None and process is not None
    return Acquired(None, connection, reply, "fuse", False)


def _fuse_root(job: MountRequest) -> Acquired:
    from lazyfs.system.mountapi import MNT_DETACH, open_tree_clone, umount2

    joined = _join_fuse(job)
    if joined is not None:
        return joined
    place = os.path.join(job.runtime, f"root-{os.urandom(8).hex()}")
    os.mkdir(place, 0o700)
    try:
        root = start_fuse(job, place)
        try:
            fd = open_tree_clone(place)
            umount2(place, MNT_DETACH)
        except BaseException:
            root.connection.close()
            raise
        return root._replace(fd=fd)
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(place)  # a mount that never came off is the fusemount process's to remove


def _join_fuse(job: MountRequest) -> Acquired | None:
    """A detached clone of an attached fuse mount of the same image, if there is one."""
    from lazyfs.core.oci.reference import parse_reference

    wanted = str(parse_reference(job.image))
    for path in rundir.fuse_sockets(job.runtime):
        connection: Connection | None = None
        try:
            connection = Connection.open(path, 2.0)
            for entry in connection.ask({"op": "list"}, 5.0).get("mounts", []):
                if entry.get("image") == wanted and entry.get("platform") == job.options.access.platform:
                    fd = _clone_of(messages.parse_dev(entry.get("dev")))
                    if fd is not None:
                        return Acquired(fd, connection, entry, "fuse", True)
        except DaemonGone:
            rundir.remove_dead_socket(path)
        except (LazyfsError, AttributeError, TypeError):
            pass  # it is ending, or talks another version: a new process serves us
        if connection is not None:
            connection.close()
    return None


def _clone_of(dev: tuple[int, int]) -> int | None:
    """A detached clone of any mount of the file system `dev`; None if there is none to be seen."""
    from lazyfs.system.mountapi import open_tree_clone
    from lazyfs.system.mountinfo import mounts

    for entry in mounts():
        if entry.dev == dev and entry.root == "/":
            try:
                fd = open_tree_clone(entry.mountpoint)
            except HostError:
                continue
            if dev_of(fd) == dev:  # else something lies over it
                return fd
            os.close(fd)
    return None
