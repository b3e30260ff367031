"""The daemon's side of the control protocol on trio (control/messages.py): clients' connections, and one `answer` for
all of them, in the daemon as in fuse processes."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Awaitable, Callable, Hashable, Mapping
from typing import Any, NamedTuple

import trio

from lazyfs.control.messages import LineBuffer, ProtocolError
from lazyfs.control.replies import failure, ok
from lazyfs.control.requests import Request, op_of, parse_request
from lazyfs.errors import HostError, LazyfsError, UserError
from lazyfs.system.sockets import send_fds

log = logging.getLogger("lazyfs.control")

# A client that is silent for this long, or does not read its answer, is dropped. Between "lease" and "attached" it
# makes an overlay and attaches a file system.
_PATIENCE_S = 60.0
_MAX_CLIENTS = 64


class ControlStream:
    """One client's connection, and the leases that end with it. Used by one task."""

    def __init__(self, connection: socket.socket | trio.socket.SocketType, patience_s: float = _PATIENCE_S) -> None:
        ours = trio.socket.from_stdlib_socket(connection) if isinstance(connection, socket.socket) else connection
        self._socket = ours
        self._patience_s = patience_s
        self._lines = LineBuffer()
        self._leases: dict[Hashable, Callable[[], None]] = {}

    def keep(self, key: Hashable, release: Callable[[], None]) -> None:
        """Calls `release` once: when the connection ends, or by `release(key)`."""
        self.release(key)
        self._leases[key] = release

    def release(self, key: Hashable) -> None:
        """Ends the lease `key`, if there is one."""
        if release := self._leases.pop(key, None):
            release()

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()
        for key in list(self._leases):
            self.release(key)

    async def line(self, patience_s: float | None = None) -> bytes | None:
        """The next line; None when the client has closed or says nothing in time. Raises OSError; ProtocolError for
        too long ones."""
        with trio.move_on_after(self._patience_s if patience_s is None else patience_s):
            while (line := self._lines.next_line()) is None:
                data = await self._socket.recv(65536)
                if not data:
                    return None
                self._lines.feed(data)
            return line
        return None

    async def send(self, line: bytes, fds: tuple[int, ...] = ()) -> None:
        """Sends a whole line; descriptors travel with its first byte. OSError if the client is gone."""
        with trio.fail_after(self._patience_s):
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


class Reply(NamedTuple):
    """One final line, the descriptors that go with it (closed once it is sent), and what to do after that."""

    line: bytes
    fds: tuple[int, ...] = ()
    then: Callable[[], None] | None = None


def answered(**fields: Any) -> Reply:
    return Reply(ok(**fields))


# By the kind of record. LazyfsErrors become error replies.
Handler = Callable[[ControlStream, Any], Awaitable[Reply]]
Handlers = Mapping[type[Request], Handler]


class Service:
    """Who answers, and what. `name` and `hint` are for the refusal of requests without a handler: who does not answer
    them, and who does."""

    def __init__(self, name: str, handlers: Handlers, hint: str = "") -> None:
        self.name = name
        self.handlers = handlers
        self.hint = hint
        self.answering = 0  # requests whose answer is not sent yet


async def answer(stream: ControlStream, line: bytes, service: Service) -> None:
    """Answers one request. Raises OSError and TooSlowError if the client does not take the answer."""
    service.answering += 1
    try:
        reply = await _reply(stream, line, service)
        try:
            await stream.send(reply.line, reply.fds)
        finally:
            for fd in reply.fds:
                os.close(fd)
    finally:
        service.answering -= 1
    if reply.then is not None:
        reply.then()


async def _reply(stream: ControlStream, line: bytes, service: Service) -> Reply:
    try:
        request = parse_request(line)
        handler = service.handlers.get(type(request))
        if handler is None:
            raise UserError(f"{service.name} does not do {op_of(request)!r}", service.hint)
        return await handler(stream, request)
    except LazyfsError as error:
        return Reply(failure(error))


async def converse(stream: ControlStream, service: Service) -> None:
    """Answers what one client asks until it closes, falls silent or breaks the protocol; closes the stream. An
    exception that no handler expected is logged and reported as a bug."""
    try:
        while (line := await stream.line()) is not None:
            await answer(stream, line, service)
    except (OSError, trio.TooSlowError, trio.ClosedResourceError, ProtocolError) as error:
        log.info("a client was dropped: %s", error)
    except Exception as error:
        log.exception("handling a request failed")
        bug = HostError(f"the daemon failed: {type(error).__name__}: {error}", "report this as a bug")
        with trio.move_on_after(1):
            await _try_to_send(stream, failure(bug))
    finally:
        stream.close()


async def _try_to_send(stream: ControlStream, line: bytes) -> None:
    try:
        await stream.send(line)
    except (OSError, trio.TooSlowError) as error:
        log.info("a client was dropped: %s", error)


async def serve(listener: socket.socket, service: Service) -> None:
    """Accepts clients and answers them, until cancelled or until the listener is closed."""
    listener.setblocking(False)
    accepting = trio.socket.from_stdlib_socket(listener)
    limiter = trio.CapacityLimiter(_MAX_CLIENTS)

    async def client(connection: trio.socket.SocketType) -> None:
        stream = ControlStream(connection)
        try:
            async with limiter:
                await converse(stream, service)
        finally:
            stream.close()

    async with trio.open_nursery() as nursery:
        while True:
            try:
                connection, _ = await accepting.accept()
            except trio.ClosedResourceError:
                return
            except OSError as error:
                if listener.fileno() < 0:
                    return
                log.warning("accepting a client failed: %s", error)
                await trio.sleep(0.1)  # EMFILE and the like pass
                continue
            nursery.start_soon(client, connection)
