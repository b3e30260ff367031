"""The daemon's side of the control protocol on trio: accept, read request lines, answer (control/messages.py)."""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable

import trio

from lazyfs.control.messages import LineBuffer, ProtocolError, Request, failure, parse_request
from lazyfs.errors import HostError, LazyfsError
from lazyfs.system.sockets import send_fds

log = logging.getLogger("lazyfs.control")

# A client that says nothing for this long, or does not read its answer, is dropped. Between the two lines of
# a mount it has an overlay to build and a file system to attach.
_PATIENCE_S = 60.0
_MAX_CLIENTS = 64


class ControlStream:
    """One client's connection. Closed by `serve`, which made it."""

    def __init__(self, connection: trio.socket.SocketType) -> None:
        self._socket = connection
        self._lines = LineBuffer()

    async def line(self) -> bytes | None:
        """The next line; None when the client has closed. Raises ProtocolError for too long ones."""
        with trio.move_on_after(_PATIENCE_S):
            while (line := self._lines.next_line()) is None:
                data = await self._socket.recv(65536)
                if not data:
                    return None
                self._lines.feed(data)
            return line
        return None

    async def send(self, line: bytes, fds: tuple[int, ...] = ()) -> None:
        """Sends a whole line; descriptors travel with its first byte. OSError if the client is gone."""
        with trio.fail_after(_PATIENCE_S):
            if fds:
                await trio.lowlevel.wait_writable(self._socket)
                duplicate = socket.socket(fileno=self._socket.fileno())
                try:
                    send_fds(duplicate, line[:1], fds)
                finally:
                    duplicate.detach()
                line = line[1:]
            while line:
                line = line[await self._socket.send(line) :]


Handler = Callable[[ControlStream, Request], Awaitable[None]]


async def serve(listener: socket.socket, handle: Handler) -> None:
    """Accepts clients until cancelled or until the listener is closed. Each request goes to `handle`, whose
    LazyfsErrors become error replies; any other exception is logged and reported as a bug."""
    listener.setblocking(False)
    accepting = trio.socket.from_stdlib_socket(listener)
    limiter = trio.CapacityLimiter(_MAX_CLIENTS)
    async with trio.open_nursery() as nursery:
        while True:
            try:
                connection, _ = await accepting.accept()
            except OSError as error:
                if listener.fileno() < 0 or isinstance(error, trio.ClosedResourceError):
                    return
                log.warning("accepting a client failed: %s", error)
                await trio.sleep(0.1)  # EMFILE and the like pass
                continue
            nursery.start_soon(_client, connection, handle, limiter)


async def _client(connection: trio.socket.SocketType, handle: Handler, limiter: trio.CapacityLimiter) -> None:
    with connection:
        stream = ControlStream(connection)
        async with limiter:
            try:
                while (line := await stream.line()) is not None:
                    try:
                        await handle(stream, parse_request(line))
                    except LazyfsError as error:
                        await stream.send(failure(error))
            except (OSError, trio.TooSlowError, ProtocolError) as error:
                log.info("a client was dropped: %s", error)
            except Exception as error:
                log.exception("handling a request failed")
                bug = HostError(f"the daemon failed: {type(error).__name__}: {error}", "report this as a bug")
                with trio.move_on_after(1):
                    await stream.send(failure(bug))
