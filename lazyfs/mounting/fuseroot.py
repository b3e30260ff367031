"""A root from a fuse process."""

from __future__ import annotations

import os

from lazyfs.control import messages, rundir
from lazyfs.control.client import Connection, DaemonGone
from lazyfs.errors import HostError, LazyfsError
from lazyfs.mounting import launch
from lazyfs.mounting.launch import StartError
from lazyfs.mounting.lease import Lease, Reporter, Wanted, until_indexed
from lazyfs.system import host
from lazyfs.system.devices import dev_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def fuse_lease(wanted: Wanted, reporter: Reporter) -> Lease:
    """A lease of a root from a fuse process, detached for root, at `wanted.place` for others. Raises LazyfsError."""
    if not host.is_root():
        assert wanted.place is not None, "an ordinary user's root has to be mounted at its place"
        return _start(wanted, wanted.place, reporter)
    from lazyfs.system.mountapi import MNT_DETACH, open_tree_clone, umount2

    joined = _join(wanted)
    if joined is not None:
        return joined
    place = os.path.join(wanted.runtime, f"root-{os.urandom(8).hex()}")
    os.mkdir(place, 0o700)
    try:
        lease = _start(wanted, place, reporter)
        try:
            lease.fd = open_tree_clone(place)
            umount2(place, MNT_DETACH)
        except BaseException:
            lease.release()
            raise
        return lease
    finally:
        try:  # noqa: SIM105 - contextlib takes 2 ms to import
            os.rmdir(place)
        except OSError:
            pass  # a mount is still there, which the fuse process removes


def _start(wanted: Wanted, place: str, reporter: Reporter) -> Lease:
    """A fuse process that serves at `place`; the mount is there when this returns."""
    connection: Connection | None = None
    process: launch.Child | None = None

    def ask() -> dict[str, Any]:
        nonlocal connection, process
        if connection is not None and process is not None:
            connection.close()
            process.end()
        connection, process = launch.start_fuse_process(wanted.cache, wanted.runtime, wanted.image, place)
        request = {
            "op": "fuse_mount",
            **wanted.request(),
            "target": place,
            # Root's mounts are for all users, as with the kernel backend; the kernel checks modes.
            "allow_other": wanted.allow_other or host.is_root(),
            "exec": wanted.executable,
        }
        try:
            return connection.ask(request, wanted.silence_s(), reporter.progress)
        except DaemonGone:
            log = rundir.log_file(wanted.runtime)
            raise StartError(
                f"the fuse process ended: {launch.last_words(log) or 'it said nothing'}", f"see {log}"
            ) from None

    try:
        reply = until_indexed(wanted, ask, reporter)
    except BaseException:
        if connection is not None:
            connection.close()  # that ends the process, unless it hangs
        if process is not None and process.poll() is None:
            process.end()
        raise
    assert connection is not None and process is not None
    return Lease(wanted, connection, reply, "fuse")


def _join(wanted: Wanted) -> Lease | None:
    """A detached clone of an attached fuse mount of the same image, if there is one."""
    from lazyfs.core.oci.reference import parse_reference

    image = str(parse_reference(wanted.image))
    for path in rundir.fuse_sockets(wanted.runtime):
        connection: Connection | None = None
        try:
            connection = Connection.open(path, 2.0)
            for entry in connection.ask({"op": "list"}, 5.0).get("mounts", []):
                if entry.get("image") == image and entry.get("platform") == wanted.access.platform:
                    fd = _clone_of(messages.parse_dev(entry.get("dev")))
                    if fd is not None:
                        lease = Lease(wanted, connection, entry, "fuse")
                        lease.fd, lease.joined = fd, True
                        return lease
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
