"""One start of a container that is recorded: what it touches until it is ready goes into the image's profile.

The container is served by a daemon of its own over the same cache, so that no page cache that another container filled
hides a touch, and sealed layers are read through it. The daemon, the container and its files end with the command,
whatever ends that.
"""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from typing import NamedTuple

from lazyfs.containers import run
from lazyfs.containers.bundle import MountedImage
from lazyfs.containers.readiness import StartWatch, Until
from lazyfs.containers.roots import MountedRoots
from lazyfs.containers.run import RunRequest
from lazyfs.containers.store import ContainerStore
from lazyfs.control import client, messages, query, rundir
from lazyfs.errors import HostError
from lazyfs.mounting.lease import Reporter
from lazyfs.mounting.options import MountOptions
from lazyfs.mounting.owndaemon import end_daemon
from lazyfs.system.guard import guarded

_PROFILE_S = 60.0  # to name the blocks of a start, in an image of millions of files
_HELD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Recorded(NamedTuple):
    """A start. `ready_s`: seconds from the request for the mount until it was ready, and its touches are in the image's
    profile; None: it was interrupted, or could not be started, as `status` says (see run())."""

    status: int
    ready_s: float | None
    image: MountedImage | None


def record_start(
    request: RunRequest, until: Until, timeout_s: float, reporter: Reporter, say: Callable[[str], None]
) -> Recorded:
    """Runs a container until it is ready, at most `timeout_s`, and ends it. What it writes goes to standard error.

    Raises LazyfsError: it did not become ready, or could not be recorded. On return nothing of it is left but the
    profile and what of the image is in the cache. To be called in the main thread, while there is no other.
    """
    name = request.name or f"record-{os.urandom(4).hex()}"
    store = ContainerStore()
    runtime = rundir.own_runtime_directory()
    roots = _TracedRoots(reporter, runtime)
    with guarded(functools.partial(_clean_up, name, store, roots, runtime)):
        try:
            watch = StartWatch(until, timeout_s, roots.keep_profile, 2)
            status = run.run(request._replace(name=name, remove=True), store, roots, say, watch)
        finally:
            _end(runtime)
    if watch.failure is not None:
        raise watch.failure
    return Recorded(status, watch.ready_s, roots.image)


class _TracedRoots(MountedRoots):
    """Has the daemon write what was touched into the image's profile while the root is still mounted."""

    def __init__(self, reporter: Reporter, runtime: str) -> None:
        super().__init__(reporter, runtime)
        self.image: MountedImage | None = None
        self._target = ""

    def attach(self, image: str, target: str, options: MountOptions) -> MountedImage:
        learning = options.having(learn="local")  # as it is asked for here, whatever holds for other starts
        self.image, self._target = super().attach(image, target, learning), target
        return self.image

    def keep_profile(self) -> None:
        """Returns when the profile is in the cache. Raises LazyfsError."""
        daemon = query.daemon_of(query.required_mount(self._target).dev)
        if daemon is None:
            raise HostError("the daemon of the recorded container does not answer", "it may have died: try again")
        request = {"op": "profile", "dev": messages.format_dev(query.required_mount(self._target).dev)}
        client.ask_once(daemon.socket_path, request, _PROFILE_S)


def _end(runtime: str) -> None:
    """Ends the daemon. A signal is held until it has ended."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        end_daemon(runtime)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _clean_up(name: str, store: ContainerStore, roots: MountedRoots, runtime: str) -> None:
    """What is to be done if this process is killed, in another one."""
    try:
        run.remove(name, store, roots)
    finally:
        end_daemon(runtime)
