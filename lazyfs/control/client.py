"""The client's end of a conversation with a daemon: blocking, with a deadline for every wait."""

from __future__ import annotations

import os
import time

from lazyfs.control.messages import (
    KINDS,
    MAX_FDS,
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    VERSIONS,
    LineBuffer,
    ProtocolError,
    decode,
    encode,
)
from lazyfs.errors import HostError, LazyfsError
from lazyfs.system.sockets import Socket, connect, peer_pid, peer_uid, recv_fds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

_RECEIVE_BYTES = 65536


class DaemonSilent(HostError):
    """The daemon is there, but does not read or does not answer in time."""


class DaemonGone(HostError):
    """Nobody listens, or the connection ended before the answer."""


def error_from(reply: Mapping[str, Any]) -> LazyfsError:
    """The error that the daemon reported. A malformed one is a ProtocolError (returned, not raised)."""
    value = reply.get("error")
    if isinstance(value, dict):
        message, hint = value.get("message"), value.get("hint", "")
        known = [name for name in (value.get("code"), value.get("kind")) if isinstance(name, str) and name in KINDS]
        if known and isinstance(message, str) and isinstance(hint, str):
            return KINDS[known[0]](message, hint)
    return ProtocolError("the daemon reported an error in an unknown form", "see its daemon.log")


class Connection:
    """A blocking connection to a daemon. Owns its socket, and received descriptors until they are taken."""

    def __init__(self, connection: Socket) -> None:
        self._socket = connection
        self._lines = LineBuffer(MAX_REPLY_BYTES)
        self._fds: list[int] = []

    @classmethod
    def open(cls, path: str, timeout_s: float = 5.0) -> Connection:
        """Connects to the socket at `path`. Raises DaemonGone if nobody listens, HostError if another user
        does."""
        try:
            connection = connect(path, timeout_s)
        except OSError as error:
            raise DaemonGone(f"no daemon answers at {path}: {error.strerror or error}") from None
        if peer_uid(connection) not in (os.geteuid(), 0):
            connection.close()
            raise HostError(f"{path} belongs to another user's process", "remove its directory")
        return cls(connection)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent. Closes descriptors that nobody took, too, so that a detached mount ends."""
        self._socket.close()
        while self._fds:
            os.close(self._fds.pop())

    def fileno(self) -> int:
        return self._socket.fileno()

    def peer_pid(self) -> int:
        return peer_pid(self._socket)

    def take_fd(self) -> int:
        """The descriptor that came with the last reply; the caller owns it now. Raises ProtocolError."""
        if not self._fds:
            raise ProtocolError("the daemon sent no descriptor with its reply", "see its daemon.log")
        return self._fds.pop(0)

    def send(self, message: Mapping[str, Any], timeout_s: float = 10.0) -> None:
        line = encode(message, MAX_REQUEST_BYTES)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.sendall(line)
        except TimeoutError:
            raise DaemonSilent("the daemon does not read its requests", "see its daemon.log") from None
        except OSError as error:
            raise DaemonGone(f"the daemon closed the connection: {error.strerror}") from None

    def receive(self, silence_s: float) -> dict[str, Any]:
        """The next message. Raises DaemonGone at the end of the stream, DaemonSilent after `silence_s`
        without a whole message, ProtocolError."""
        deadline = time.monotonic() + silence_s
        while (line := self._lines.next_line()) is None:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                data, fds = recv_fds(self._socket, _RECEIVE_BYTES, MAX_FDS)
            except TimeoutError:
                raise DaemonSilent(
                    f"the daemon did not answer within {silence_s:g} s",
                    "see its daemon.log, or raise timeout=",
                ) from None
            except OSError as error:
                message = f"the connection to the daemon broke: {error.strerror}"
                raise DaemonGone(message, "see its daemon.log") from None
            except HostError:
                raise ProtocolError("the daemon sent too many descriptors", "see its daemon.log") from None
            self._fds += fds
            if len(self._fds) > MAX_FDS:
                raise ProtocolError("the daemon sent too many descriptors", "see its daemon.log")
            if not data:
                raise DaemonGone("the daemon ended before it answered", "see its daemon.log")
            self._lines.feed(data)
        return decode(line)

    def ask(
        self,
        message: Mapping[str, Any],
        silence_s: float = 10.0,
        on_progress: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """Sends a request and returns its final reply ("ok" or "needs_index"). `silence_s` bounds the time between two
        messages: a working daemon sends progress. Raises the error that the daemon reports, as its own class."""
        self.send(message)
        return self.answer(silence_s, on_progress)

    def answer(self, silence_s: float, on_progress: Callable[[str], None] | None = None) -> dict[str, Any]:
        """The second half of `ask`, for callers that do something else while the daemon works."""
        while True:
            reply = self.receive(silence_s)
            if "progress" in reply:
                if on_progress is not None and isinstance(reply["progress"], str):
                    on_progress(reply["progress"])
            elif "error" in reply:
                raise error_from(reply)
            elif reply.get("ok") is True or reply.get("needs_index") is True:
                return reply
            else:
                raise ProtocolError("the daemon answered in an unknown form", VERSIONS)


def ask_once(path: str, message: Mapping[str, Any], silence_s: float = 10.0) -> dict[str, Any]:
    """One request on its own connection."""
    with Connection.open(path, min(silence_s, 5.0)) as connection:
        return connection.ask(message, silence_s)
