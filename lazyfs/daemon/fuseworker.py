"""A process that serves one image's root through FUSE (pyfuse3 has one mount per process).

    python -m lazyfs.daemon.fuseworker --cache DIR --runtime DIR --status-fd N -- IMAGE TARGET

1. It reads one "fuse_mount" request (control/messages.py) from socket N, opens the image, mounts it at the request's
   target and answers once the kernel's FUSE_INIT was answered, so that the mount is usable.
2. It waits for an "attached" request on the same socket. If that ends first, the mount is dropped.
3. It serves until nothing uses the mount any more, for whatever reason: umount, fusermount3 -u, the end of the last
   clone. SIGTERM, or "stop" on its own socket <runtime>/fuse-<pid>.sock, unmounts lazily; users of open files then
   have DRAIN_S to finish.

IMAGE and TARGET are there for ps(1). The process that starts it gives it its session and the log.
"""

from __future__ import annotations

from lazyfs.system import startup

if __name__ == "__main__":
    startup.begin()  # before all that is large

# isort: split

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import trio

from lazyfs.control import messages, replies
from lazyfs.control.requests import FuseMount, Mount, op_of, parse_request
from lazyfs.control.server import ControlStream, Service, converse
from lazyfs.control.server import serve as serve_clients
from lazyfs.core.erofs.metadata import Metadata
from lazyfs.daemon.arguments import parse_arguments
from lazyfs.daemon.attachments import Attachments, FuseRequests
from lazyfs.errors import HostError, LazyfsError
from lazyfs.fuse import tuning
from lazyfs.fuse.device import LayerData
from lazyfs.fuse.root import MAX_TASKS, RootOperations, may_have_acls
from lazyfs.fuse.session import close, mount, serve_requests, unmount_lazily
from lazyfs.images.documents import Missing
from lazyfs.system.sockets import listen_private
from lazyfs.tasks import open_nursery

log = logging.getLogger("lazyfs.daemon.fuseworker")

REQUEST_S = 30.0  # for the request to arrive; it is sent right after the start
INIT_S = 30.0  # for the kernel's FUSE_INIT; it comes within a millisecond
ATTACH_S = 120.0  # for the client to attach the mount: an overlay may have to be made
TRACE_S = 5.0  # for what the start touched to be kept, once nothing is served any more
DRAIN_S = 5.0  # from a lazy unmount to the end of the connection
# One request carries at most 1 MiB. Programs start a fifth sooner than with the kernel's 128 KiB, by half as many
# requests (docs/MEASUREMENTS.md, "daemon").
READ_AHEAD_KIB = 1024
# With the kernel's 12, reads of cached data queue behind 12 reads that wait for the network.
MAX_BACKGROUND = 1024
# libfuse reads /dev/fuse once it is readable. If the caller of the only request is killed in between, nothing is left
# to read, and read(2) blocks the whole process. A signal ends that wait (tests/daemon/test_fuse_root.py provokes it).
WAKE_S = 1.0


class OpenedImage(Protocol):
    """What is served: see serving/image.py."""

    @property
    def reference(self) -> str: ...
    @property
    def manifest_digest(self) -> str: ...
    @property
    def index_place(self) -> str | None: ...
    @property
    def stale(self) -> str: ...
    @property
    def namespace_path(self) -> str: ...
    @property
    def layers(self) -> Sequence[LayerData]: ...
    def statistics(self) -> dict[str, Any]: ...
    async def end_trace(self) -> int: ...


Opener = Callable[[str, Mount], AbstractAsyncContextManager[OpenedImage | Missing]]


@contextlib.asynccontextmanager
async def open_image(cache: str, request: Mount) -> AsyncIterator[OpenedImage | Missing]:
    """The image of `request`, from the cache directory `cache`. Raises LazyfsError."""
    from lazyfs.cache.directory import CacheDirectory
    from lazyfs.serving.store import ImageStore

    # The client started this process for this image, so it has the client's environment, and helpers get all of it.
    access = request.access._replace(environ=None)
    async with open_nursery() as nursery:
        store = ImageStore(CacheDirectory(cache), nursery)
        image = await store.open(
            request.image, access, request.timeout_s, make_index=not request.push_index, play=True
        )
        if not isinstance(image, Missing):
            image.begin_trace(access=access, recorded=request.traced)
        try:
            yield image
        finally:
            with trio.CancelScope(shield=True):
                await store.traces.finish(TRACE_S)
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                if not isinstance(image, Missing):
                    await store.close(image)
                await store.aclose()


async def serve(cache: str, runtime: str, status: socket.socket, opener: Opener = open_image) -> int:
    """Does what the module describes; returns the exit code. Closes `status`."""
    client = ControlStream(status, ATTACH_S)
    try:
        line = await client.line(REQUEST_S)
        if line is None:
            return 1
        request = parse_request(line)
        if not isinstance(request, FuseMount):
            raise messages.ProtocolError(f"a fuse process cannot do {op_of(request)!r}")
        async with opener(cache, request.mount) as image:
            if isinstance(image, Missing):
                await client.send(replies.needs_index(image.manifest_digest, image.reasons))
            else:
                await _Session(image, request, cache, runtime, client).run()
    except Exception as error:
        return await _report(error, client)
    finally:
        client.close()
    return 0


async def _report(error: Exception, client: ControlStream) -> int:
    """Tells the client, if it still listens, and the log what ended the process; returns the exit code."""
    if not isinstance(error, LazyfsError):
        log.error("unexpected", exc_info=error)
        error = HostError(f"the fuse process failed: {error!r:.200}", "see daemon.log; please report it")
    log.error("%s", error)
    with contextlib.suppress(OSError, trio.TooSlowError, trio.ClosedResourceError):
        await client.send(replies.failure(error))
    return error.exit_code


class _Session:
    """One mount, from mount(2) to the end of its connection."""

    def __init__(
        self, image: OpenedImage, request: FuseMount, cache: str, runtime: str, client: ControlStream
    ) -> None:
        # In memory rather than mapped: if somebody truncates the file, a mapping kills the process with SIGBUS.
        with open(image.namespace_path, "rb") as file:
            namespace = file.read()
        self._operations = RootOperations(
            Metadata(namespace), image.layers, enable_acl=may_have_acls(namespace)
        )
        self._image = image
        self._request = request
        self._cache = cache
        self._runtime = runtime
        self._client = client
        self._stopping = trio.Event()
        self._hurry = trio.Event()  # a second signal

    async def run(self) -> None:
        """Mounts, answers the client, serves. Raises LazyfsError if it cannot mount."""
        request = self._request
        dev = mount(
            self._operations,
            request.target,
            self._image.reference,
            allow_other=request.allow_other,
            executable=request.executable,
        )
        attachments = Attachments(dev, self._cache)
        requests = FuseRequests(
            self._entry(dev), self._counters, self._image.end_trace, attachments, self._stopping
        )
        service = Service("the process of a fuse mount", requests.handlers(), "ask the daemon")
        path = os.path.join(self._runtime, f"fuse-{os.getpid()}.sock")
        try:
            with _listening(path) as listener:
                async with open_nursery() as nursery:
                    nursery.start_soon(self._signals)
                    nursery.start_soon(self._stop, nursery.cancel_scope, dev, attachments)
                    nursery.start_soon(serve_clients, listener, service)
                    nursery.start_soon(self._introduce, dev, attachments, service)
                    startup.finish()
                    await serve_requests(MAX_TASKS)
                    nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(unmount_lazily, dev, attachments.places())
                close()
                await trio.to_thread.run_sync(attachments.let_go_of_uppers)

    async def _introduce(self, dev: tuple[int, int], attachments: Attachments, service: Service) -> None:
        """Tells the client that the mount is usable, and learns from it where it was attached. Until then the client's
        connection holds the mount."""

        def drop() -> None:
            if not attachments.targets():
                log.warning("nobody attached the mount of %s: it is dropped", self._image.reference)
                self._stopping.set()

        self._client.keep(dev, drop)
        with trio.move_on_after(INIT_S) as waiting:
            await self._operations.initialised.wait()
            await trio.to_thread.run_sync(tuning.set_read_ahead, dev, READ_AHEAD_KIB)
            await trio.to_thread.run_sync(tuning.set_max_background, dev, MAX_BACKGROUND)
        if waiting.cancelled_caught:
            self._client.close()
            return
        answer = replies.ok(
            manifest_digest=self._image.manifest_digest,
            image=self._image.reference,
            index_place=self._image.index_place,
            stale=self._image.stale,
            joined=False,
            dev=messages.format_dev(dev),
        )
        with contextlib.suppress(OSError, trio.TooSlowError):  # an interrupted client, whose end comes next
            await self._client.send(answer)
        await converse(self._client, service)

    def _entry(self, dev: tuple[int, int]) -> replies.Entry:
        return replies.Entry(
            dev=dev,
            image=self._image.reference,
            manifest_digest=self._image.manifest_digest,
            backend="fuse",
            platform=self._request.mount.access.platform,
            pid=os.getpid(),
            targets=(),
            holds=(),
        )

    def _counters(self) -> dict[str, Any]:
        return {**self._image.statistics(), "fuse": self._operations.counters.as_dict()}

    async def _signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                (self._hurry if self._stopping.is_set() else self._stopping).set()

    async def _stop(self, scope: trio.CancelScope, dev: tuple[int, int], attachments: Attachments) -> None:
        """Once asked to: unmounts lazily, and ends the connection when its users had time to finish."""
        await self._stopping.wait()
        await trio.to_thread.run_sync(unmount_lazily, dev, attachments.places())
        with trio.move_on_after(DRAIN_S):
            await self._hurry.wait()
        log.warning("%s was still in use when its process ended", self._image.reference)
        scope.cancel()


@contextlib.contextmanager
def _listening(path: str) -> Iterator[socket.socket]:
    """A listening socket, removed in the end. Raises HostError."""
    try:
        listener = listen_private(path)
    except OSError as error:
        raise HostError(f"cannot listen at {path}: {error}", "check the runtime directory") from None
    with listener:
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)


def run(cache: str, runtime: str, status_fd: int, opener: Opener = open_image) -> int:
    """`serve` as the whole program: logging, the wake-up signal, and an exit code for everything."""
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s fuse[{os.getpid()}] %(levelname)s %(message)s"
    )
    logging.raiseExceptions = False  # a full disk under the log is no reason to end
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the parent may have blocked some: `lazyfs run` does
    signal.signal(signal.SIGALRM, _wake)
    signal.setitimer(signal.ITIMER_REAL, WAKE_S, WAKE_S)
    status = socket.socket(fileno=status_fd)
    status.set_inheritable(False)
    try:
        return trio.run(serve, cache, runtime, status, opener)
    except BaseException as error:
        log.critical("the process ends: %r", error, exc_info=error)
        return HostError.exit_code


def _wake(*_: object) -> None:
    """Does nothing: the signal's arrival is what interrupts a blocked read(2)."""


def main(arguments: Sequence[str] | None = None) -> int:
    os.chdir("/")
    options = parse_arguments(list(sys.argv[1:] if arguments is None else arguments))
    return run(options["cache"], options["runtime"], int(options["status-fd"]))


if __name__ == "__main__":
    sys.exit(main())
