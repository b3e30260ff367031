"""A process that serves one image's root through FUSE (pyfuse3 has one mount per process).

    python -m lazyfs.daemon.fuseworker --cache DIR --runtime DIR --status-fd N -- IMAGE TARGET

1. It reads one "fuse_mount" request (control/messages.py) from socket N, opens the image, mounts it at the request's
   target and answers once the kernel's FUSE_INIT was answered, so that the mount is usable.
2. It waits for {"attached": ...} on the same socket. If that ends first, the mount is dropped.
3. It serves until nothing uses the mount any more, however that came about: umount, fusermount3 -u, the last
   clone gone. SIGTERM, or "stop" on its own socket <runtime>/fuse-<pid>.sock, unmounts lazily; who still
   uses files then has DRAIN_S to finish.

IMAGE and TARGET are there for ps(1). Who starts it gives it its session, its working directory and the log.
"""

from __future__ import annotations

from lazyfs.system import startup

if __name__ == "__main__":
    startup.begin()  # before all that is large

# isort: split

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import trio

from lazyfs.control import messages
from lazyfs.core.erofs.reader import ErofsReader
from lazyfs.daemon.attachments import Attachments, ControlServer
from lazyfs.errors import HostError, LazyfsError
from lazyfs.fuse import tuning
from lazyfs.fuse.device import LayerData
from lazyfs.fuse.root import MAX_TASKS, RootOperations, may_have_acls
from lazyfs.fuse.session import close, mount, serve_requests, unmount_lazily
from lazyfs.images.documents import Missing

log = logging.getLogger("lazyfs.daemon.fuseworker")

REQUEST_S = 30.0  # for the request to arrive; it is sent right after the start
INIT_S = 30.0  # for the kernel's FUSE_INIT; it comes within a millisecond
ATTACH_S = 120.0  # for the client to attach the mount: an overlay may have to be made
DRAIN_S = 5.0  # from a lazy unmount to the end of the connection
# One request carries at most 1 MiB. Measured on 2 cores with the layer in the page cache, 128 -> 1024 KiB:
# 500 MB in sequence 512 -> 1,500-3,000 MB/s; cold python3 reads 17 -> 21 MB in 299 -> 169 requests,
# node 43 -> 55 MB in 617 -> 155, and both start a fifth sooner. 4096 KiB only makes node read 67 MB.
# Over a network a saved request is worth more still. Small files do not care: `find` over 10,000 of them
# takes 0.12 s cold, `cat` 2.5 s cold (open, read, release: 80 us each) and 1.5 s warm.
READ_AHEAD_KIB = 1024
# With the kernel's 12, just 12 of 200 reads reach us while they wait for data. (The process has 31 MB with
# 200 of them waiting, as much as when idle.)
MAX_BACKGROUND = 1024
# A read(2) on /dev/fuse that finds nothing blocks the whole process, and libfuse reads when it was readable.
# If the caller of the only request was killed meanwhile, nothing is left to read. A signal ends that wait.
# (tests/daemon/test_fuse_root.py provokes it in half of its tries; without the signal all then stands still.)
WAKE_S = 1.0


_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


class OpenedImage(Protocol):
    """What is served: see serving/image.py."""

    @property
    def reference(self) -> str: ...
    @property
    def manifest_digest(self) -> str: ...
    @property
    def namespace_path(self) -> str: ...
    @property
    def layers(self) -> Sequence[LayerData]: ...
    def statistics(self) -> dict[str, Any]: ...


Opener = Callable[[str, messages.Request], AbstractAsyncContextManager[OpenedImage | Missing]]


@contextlib.asynccontextmanager
async def open_image(cache: str, request: messages.Request) -> AsyncIterator[OpenedImage | Missing]:
    """The image of `request`, from the cache directory `cache`. Raises LazyfsError."""
    from lazyfs.cache.directory import BlockCache
    from lazyfs.serving.store import ImageStore

    # This process has this one image, so the client's environment is its own.
    os.environ.update(request.access.environ or {})
    access = request.access._replace(environ=None)
    async with trio.open_nursery() as nursery:
        store = ImageStore(BlockCache(cache), nursery)
        image = await store.open(request.image, access, request.timeout_s, make_index=not request.push_index)
        try:
            yield image
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                if not isinstance(image, Missing):
                    await store.close(image)
                await store.aclose()


class _Client:
    """The command that wants the mount, at the other end of the status socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
        self._lines = messages.LineBuffer()

    async def line(self, deadline_s: float) -> bytes | None:
        """Its next line; None if it has gone or says nothing in time."""
        with trio.move_on_after(deadline_s), contextlib.suppress(*_GONE):
            while (line := self._lines.next_line()) is None:
                data = await self._stream.receive_some()
                if not data:
                    return None
                self._lines.feed(data)
            return line
        return None

    async def say(self, line: bytes) -> bool:
        """Whether it was sent: the client may have been interrupted."""
        with trio.move_on_after(10.0), contextlib.suppress(*_GONE):
            await self._stream.send_all(line)
            return True
        return False

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)


async def serve(cache: str, runtime: str, status: socket.socket, opener: Opener = open_image) -> int:
    """Does all that the module says; returns the exit code. `status` is closed."""
    client = _Client(status)
    try:
        line = await client.line(REQUEST_S)
        if line is None:
            return 1
        try:
            request = messages.parse_request(line)
            if request.op != "fuse_mount":
                raise messages.ProtocolError(f"a fusemount process cannot do {request.op!r}")
            async with opener(cache, request) as image:
                if isinstance(image, Missing):
                    await client.say(messages.needs_index(image.manifest_digest, image.reasons))
                else:
                    await _Session(image, request, cache, runtime, client).run()
        except Exception as error:
            return await _account_for(_cause(error), client)
        return 0
    finally:
        with trio.CancelScope(shield=True):
            await client.aclose()


async def _account_for(error: Exception, client: _Client) -> int:
    """Tells the client (if it still listens) and the log what ended us; returns the exit code."""
    if not isinstance(error, LazyfsError):
        log.error("unexpected", exc_info=error)
        error = HostError(f"the fuse process failed: {error!r:.200}", "see daemon.log; please report it")
    log.error("%s", error)
    await client.say(messages.failure(error))
    return error.exit_code


def _cause(error: Exception) -> Exception:
    """The expected failure inside what nurseries wrapped, if there is one."""
    if isinstance(error, ExceptionGroup):
        causes = [_cause(inner) for inner in error.exceptions]
        expected = [cause for cause in causes if isinstance(cause, LazyfsError)]
        return (expected or causes)[0]
    return error


class _Session:
    """One mount, from mount(2) to the end of its connection."""

    def __init__(
        self, image: OpenedImage, request: messages.Request, cache: str, runtime: str, client: _Client
    ) -> None:
        # In memory rather than mapped: a file that somebody cuts would kill us with SIGBUS.
        with open(image.namespace_path, "rb") as file:
            namespace = file.read()
        self._operations = RootOperations(
            ErofsReader(namespace), image.layers, enable_acl=may_have_acls(namespace)
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
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._signals)
                nursery.start_soon(self._stop, nursery.cancel_scope, dev, attachments)
                server = ControlServer(self._describe(dev), self._counters, attachments, self._stopping)
                await nursery.start(server.run, self._runtime)
                nursery.start_soon(self._introduce, dev, attachments)
                startup.finish()
                await serve_requests(MAX_TASKS)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(unmount_lazily, dev, attachments.places())
                close()
                await trio.to_thread.run_sync(attachments.let_go_of_uppers)

    async def _introduce(self, dev: tuple[int, int], attachments: Attachments) -> None:
        """The client's part: tells it that the mount is usable and hears where it was attached."""
        with trio.move_on_after(INIT_S):
            await self._operations.initialised.wait()
            await trio.to_thread.run_sync(tuning.set_read_ahead, dev, READ_AHEAD_KIB)
            await trio.to_thread.run_sync(tuning.set_max_background, dev, MAX_BACKGROUND)
            if await self._client.say(messages.ok(joined=False, **self._describe(dev))):
                line = await self._client.line(ATTACH_S)
                if line is not None:
                    try:
                        attachments.add(messages.parse_attached(messages.decode(line).get("attached")))
                    except LazyfsError as error:
                        await self._client.say(messages.failure(error))
                    else:
                        await self._client.say(messages.ok())
                        await self._client.aclose()
                        return
        log.warning("nobody attached the mount of %s: it is dropped", self._image.reference)
        self._stopping.set()

    def _describe(self, dev: tuple[int, int]) -> dict[str, Any]:
        return {
            "dev": messages.format_dev(dev),
            "image": self._image.reference,
            "manifest_digest": self._image.manifest_digest,
            "backend": "fuse",
            "platform": self._request.access.platform,
            "pid": os.getpid(),
        }

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


def run(cache: str, runtime: str, status_fd: int, opener: Opener = open_image) -> int:
    """`serve` as the whole program: logging, the wake-up signal, and an exit code for everything."""
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s fusemount[{os.getpid()}] %(levelname)s %(message)s"
    )
    logging.raiseExceptions = False  # a full disk under the log is no reason to end
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # who starts us may have blocked some: `lazyfs run` does
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
    """Its arrival is all: it interrupts a blocked read(2)."""


def main(arguments: Sequence[str] | None = None) -> int:
    os.chdir("/")
    parser = argparse.ArgumentParser(prog="lazyfs.daemon.fuseworker", description="Serve one image through FUSE.")
    parser.add_argument("--cache", required=True)
    parser.add_argument("--runtime", required=True)
    parser.add_argument("--status-fd", type=int, required=True)
    parser.add_argument("image")
    parser.add_argument("target")
    parsed = parser.parse_args(arguments)
    return run(parsed.cache, parsed.runtime, parsed.status_fd)


if __name__ == "__main__":
    sys.exit(main())
