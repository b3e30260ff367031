"""The worker of the kernel backend: serves all images of one cache directory. Started by the keeper.

It owns no mount, so that it may die at any moment: the keeper holds the FUSE connection, its detached mount and, for
each image, the EROFS mount. Its successor reads what it served (state.py); everything else is in the cache.

An image is let go some seconds after its last mount has vanished from mountinfo; private mount namespaces may still use
it, and the kernel counts them. When no image is left, the daemon lets go of everything and ends with the FUSE
connection.

The parts, each the one owner of its state: roots.py (mounted images, and who holds them), devices.py (the layers that
the FUSE server reads), uppers.py (upper directories), life.py (how it ends). requests.py answers clients, watch.py
notices what has changed, state.py is what a successor is told. This module puts them together, and ends them.
"""

from __future__ import annotations

from lazyfs.system import startup

# isort: split

import logging
import os
import socket
import sys

import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.control.server import Service, serve
from lazyfs.daemon import state
from lazyfs.daemon.arguments import parse_arguments
from lazyfs.daemon.devices import DeviceTable
from lazyfs.daemon.handover import EXIT_ENDED, EXIT_SUCCESSOR
from lazyfs.daemon.keeperlink import KeeperLink
from lazyfs.daemon.life import Life
from lazyfs.daemon.requests import Requests
from lazyfs.daemon.roots import Roots
from lazyfs.daemon.uppers import StaleUppers
from lazyfs.daemon.watch import Watch
from lazyfs.errors import LazyfsError
from lazyfs.fuse.devices import DeviceServer
from lazyfs.serving.store import ImageStore
from lazyfs.sources.source import preload

log = logging.getLogger("lazyfs.daemon")

DEFAULT_LINGER_S = 5.0
_START_S = 2.0  # usually the first image is open by then
# While it drains, a worker takes no new requests, cached or not. The kernel sends requests that wait longer for a
# registry to the successor again.
_DRAIN_S = 3.0
_TRACES_S = 5.0  # for the profiles of starts that are being traced: some 50 ms each


class Daemon:
    """The parts of one worker process."""

    def __init__(
        self, link: KeeperLink, cache: CacheDirectory, runtime: str, linger_s: float, nursery: trio.Nursery
    ) -> None:
        self.link = link
        self.life = Life()
        self.store = ImageStore(cache, nursery)
        self.devices = DeviceTable(self.store)
        self.uppers = StaleUppers(cache.path)
        self.roots = Roots(self.store, self.devices, link, self.uppers, runtime, self._save)
        self.watch = Watch(self.roots, self.life, linger_s, lambda: self.service.answering > 0)
        requests = Requests(self.store, self.roots, self.watch, link, self.life)
        self.service = Service("this daemon", requests.handlers())

    def _save(self) -> None:
        roots = [root.saved() for root in self.roots]
        state.save(self.link, state.State(roots, self.devices.released()))

    async def restore(self) -> None:
        """Takes over what the predecessor served."""
        left = state.load(self.link)
        self.devices.remember(left.released)
        await self.roots.restore(left.roots)

    def let_go(self, server: DeviceServer) -> None:
        """Lets go of all mounts, when nobody needs the daemon: from now on the kernel alone decides how long the FUSE
        connection lives. Devices that a private mount namespace still reads are revived."""
        server.release_mount()
        self.roots.forget_all()
        self.link.let_go()
        self._save()


async def run(cache_path: str, runtime: str, linger_s: float) -> int:
    """The worker's main task; returns its exit status."""
    link = KeeperLink.from_environment()
    async with trio.open_nursery() as nursery:
        daemon = Daemon(link, CacheDirectory(cache_path), runtime, linger_s, nursery)
        await daemon.restore()
        server = DeviceServer(link.fuse_fd, daemon.devices, link.mount_fd, log=log.error)
        nursery.start_soon(daemon.life.until_signalled)
        nursery.start_soon(_finish_start, daemon)
        nursery.start_soon(_end, daemon, server)
        if link.listen_fd is not None:
            nursery.start_soon(serve, socket.socket(fileno=os.dup(link.listen_fd)), daemon.service)
            nursery.start_soon(daemon.watch.run)
            nursery.start_soon(daemon.watch.seal)
            nursery.start_soon(daemon.uppers.run)
        try:
            ended = await server.run()
            if ended:
                await daemon.uppers.finish()
        finally:
            await daemon.store.aclose()
        nursery.cancel_scope.cancel()
    return EXIT_ENDED if ended else EXIT_SUCCESSOR


async def _end(daemon: Daemon, server: DeviceServer) -> None:
    """Ends the worker. If nobody needs it: lets everything go, and serves until the kernel ends the connection. If a
    successor is wanted: answers what was read, and makes way."""
    await daemon.life.ending.wait()
    # The starts that go on are not traced by a successor. Until this is done, all reads are served.
    await daemon.store.traces.finish(_TRACES_S, partial=daemon.life.status == EXIT_SUCCESSOR)
    if daemon.life.status == EXIT_ENDED and not daemon.life.interrupted.is_set():
        daemon.let_go(server)
        await daemon.life.interrupted.wait()
    await server.drain(_DRAIN_S)


async def _finish_start(daemon: Daemon) -> None:
    """Loads the HTTP client if the daemon is idle (a service manager started it), so that its first mount need not."""
    await trio.sleep(_START_S)
    if daemon.watch.is_idle():
        try:
            preload()  # in this thread, as all imports are: a second thread might see half-loaded modules
        except ImportError as error:  # images that need it will fail; others are served
            log.error("the HTTP client cannot be loaded: %s", error)
    startup.finish()


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the worker: `python -m lazyfs.daemon --cache DIR --runtime DIR [--linger S]`."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    form = "%(asctime)s daemon[%(process)d] %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form)
    logging.raiseExceptions = False  # a full disk under the log is no reason to end
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return trio.run(run, options["cache"], options["runtime"], float(options.get("linger", DEFAULT_LINGER_S)))
    except LazyfsError as error:
        log.critical("%s", error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
