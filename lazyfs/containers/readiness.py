"""When a container that was just started is ready: what to wait for, and the watch that waits.

The network of containers is the host's, so an answer could be another program's. Therefore nothing may answer before
the container is started, and an answer counts only while the container runs.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

from lazyfs.containers.runc import Ended
from lazyfs.errors import ImageError, LazyfsError, UserError

POLL_S = 0.01  # between the end of one attempt and the next one
ATTEMPT_S = 2.0  # for one connection, and for its answer: a server that is starting may accept and be silent
_PIECE_BYTES = 64 << 10
_BODY_BYTES = 1 << 20  # of a page that is read to its end
_REST_S = 2.0  # for output that is in the pipes when the container has ended


class Exit(NamedTuple):
    """It ends, with status 0."""

    def __str__(self) -> str:
        return "it has ended"


class Line(NamedTuple):
    """It writes a line with this text, to standard output or standard error."""

    text: str

    def __str__(self) -> str:
        return f"it writes {self.text!r}"


class Seconds(NamedTuple):
    """So much time has gone since its start, or it has ended with status 0."""

    seconds: float

    def __str__(self) -> str:
        return f"it has run for {self.seconds:g} s"


class Port(NamedTuple):
    """It takes connections at a TCP port of this host's loopback addresses."""

    number: int

    def __str__(self) -> str:
        return f"it takes connections at port {self.number}"

    def answers(self, wait_s: float) -> bool:
        """Whether it does now."""
        for host in ("127.0.0.1", "::1"):
            with contextlib.suppress(OSError), socket.create_connection((host, self.number), wait_s):
                return True
        return False


class Http(NamedTuple):
    """It answers GET with a status from 200 to 399, as Kubernetes' probes have it: a server that is still starting
    often says 404 or 503. Redirects are not followed, and certificates not verified."""

    url: str

    def __str__(self) -> str:
        return f"{self.url} answers"

    def answers(self, wait_s: float) -> bool:
        """Whether it does now."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None, "checked_url was not called"
        deadline_s = time.monotonic() + wait_s
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            unverified = ssl._create_unverified_context()
            connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=wait_s, context=unverified)
        else:
            connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=wait_s)
        try:
            connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
            response = connection.getresponse()
            left_bytes = _BODY_BYTES
            while left_bytes > 0 and time.monotonic() < deadline_s and (piece := response.read1(_PIECE_BYTES)):
                left_bytes -= len(piece)
            return 200 <= response.status < 400
        except (OSError, http.client.HTTPException, ValueError):
            return False
        finally:
            connection.close()


Until = Exit | Line | Seconds | Port | Http


def checked_line(text: str) -> Line:
    """Raises UserError."""
    if not text or "\n" in text:
        raise UserError("--until-line needs a part of one line", "give some words that the container writes")
    return Line(text)


def checked_port(number: int) -> Port:
    """Raises UserError."""
    if not 1 <= number <= 65535:
        raise UserError(f"{number} is not a TCP port", "give one from 1 to 65535")
    return Port(number)


def checked_url(text: str) -> Http:
    """Raises UserError."""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or not text.isascii() or not text.isprintable() or " " in text:
        raise UserError(f"{text:.200} is not a URL that can be asked", "write http://127.0.0.1:8080/")
    return Http(text)


class StartWatch:
    """Watches the start of one container, and has it stopped once it is ready, or if it is not in time.

    Runc.run calls `streams`, `begun` and `ended`, in this order; two threads of its own live from `begun` to `ended`.
    After that `ready_s` says when it was ready, in seconds since the watch was made, or `failure` why it was not; if
    both are None, it was interrupted or never ran. What the container writes goes to `show_fd`.
    """

    def __init__(self, until: Until, timeout_s: float, on_ready: Callable[[], None], show_fd: int) -> None:
        """`timeout_s`: from the container's start until it is given up. `on_ready` is called once, in whatever thread,
        while the container's root is still mounted; if it raises LazyfsError, that is the failure.

        Raises UserError if something answers already in place of the container.
        """
        if isinstance(until, Port | Http) and until.answers(ATTEMPT_S):
            raise UserError(
                f"something else is there already: {until}, though nothing was started",
                "end it, or choose another port",
            )
        self.until = until
        self.ready_s: float | None = None
        self.failure: LazyfsError | None = None
        self._timeout_s = timeout_s
        self._on_ready = on_ready
        self._show_fd = show_fd
        self._made_s = time.monotonic()
        self._written = False  # the line that is waited for
        self._news = threading.Event()  # it was written, or the container has ended
        self._over = threading.Event()  # the container has ended
        self._pipe_fds: list[int] = []  # ends of pipes to read
        self._streams: list[int] = []
        self._threads: list[threading.Thread] = []
        self._process_fd = -1
        self._stop: Callable[[], None] = lambda: None

    # -- the container's life ------------------------------------------------------------------------------

    def streams(self) -> tuple[int, int, int]:
        """Standard input, output and error for the container; this object closes them in `begun` or `ended`."""
        self._streams.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        for _ in range(2):
            read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
            self._pipe_fds.append(read_fd)
            self._streams.append(write_fd)
        stdin, stdout, stderr = self._streams
        return stdin, stdout, stderr

    def begun(self, pid: int, stop: Callable[[], None]) -> None:
        """The container's runtime runs as `pid`, a child of this process. `stop` may be called from any thread."""
        self._close_streams()
        self._process_fd = os.pidfd_open(pid)
        self._stop = stop
        self._threads = [threading.Thread(target=self._show), threading.Thread(target=self._watch)]
        for thread in self._threads:
            thread.start()

    def ended(self, ended: Ended | None) -> None:
        """It has ended; None: it could not be run, or nobody knows how it ended. Idempotent."""
        self._close_streams()
        self._over.set()
        self._news.set()
        for thread in self._threads:
            thread.join()
        self._threads = []
        if self._process_fd >= 0:
            os.close(self._process_fd)
            self._process_fd = -1
        for fd in self._pipe_fds:
            os.close(fd)
        self._pipe_fds = []
        if ended is not None and ended.started and not ended.interrupted and self._undecided():
            self._judge(ended.status)

    def _close_streams(self) -> None:
        while self._streams:
            os.close(self._streams.pop())

    def _undecided(self) -> bool:
        return self.ready_s is None and self.failure is None

    def _judge(self, status: int) -> None:
        """It has ended by itself."""
        if self._written or (status == 0 and isinstance(self.until, Exit | Seconds)):
            self._succeed()
        elif isinstance(self.until, Exit):
            self.failure = ImageError(
                f"the container failed with status {status}, so nothing was recorded",
                "a failure that is expected: sh -c 'COMMAND || true'",
            )
        else:
            self.failure = ImageError(
                f"the container ended with status {status} before {self.until}", "what it wrote is above"
            )

    def _succeed(self) -> None:
        ready_s = time.monotonic() - self._made_s
        try:
            self._on_ready()
            self.ready_s = ready_s
        except LazyfsError as error:
            self.failure = error

    # -- the two threads -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Waits until it is ready or has ended, or time is up; has it stopped in the first and the last case."""
        deadline_s = time.monotonic() + self._timeout_s
        ready = self._wait(deadline_s)
        if self._over.is_set() and not ready:
            return
        if ready:
            self._succeed()
        else:
            self.failure = ImageError(
                f"the container was not ready in time: {self._timeout_s:g} s are over before {self.until}",
                "what it wrote is above; --timeout gives it longer, other --until-... wait for something else",
            )
        self._stop()

    def _wait(self, deadline_s: float) -> bool:
        """Whether it became ready."""
        until = self.until
        if isinstance(until, Seconds):
            return not self._over.wait(until.seconds)
        if isinstance(until, Exit):
            self._over.wait(deadline_s - time.monotonic())
            return False
        if isinstance(until, Line):
            self._news.wait(deadline_s - time.monotonic())
            return self._written
        while (rest_s := deadline_s - time.monotonic()) > 0 and not self._over.wait(min(POLL_S, rest_s)):
            # Once it has ended, it was another program that answered.
            if until.answers(min(ATTEMPT_S, rest_s)) and not select.select([self._process_fd], [], [], 0)[0]:
                return True
        return False

    def _show(self) -> None:
        """Passes on what the container writes, to the end, so that it is never held up; looks for the line."""
        wanted = self.until.text.encode() if isinstance(self.until, Line) else b""
        tails = dict.fromkeys(self._pipe_fds, b"")  # what of each may be the beginning of the line
        poller = select.poll()
        for fd in tails:
            poller.register(fd, select.POLLIN)
        while tails:
            ready = poller.poll(_REST_S * 1000)
            if not ready and self._over.is_set():
                return  # whoever still has the pipe does not write
            for fd, _ in ready:
                piece = os.read(fd, _PIECE_BYTES)
                if not piece:
                    poller.unregister(fd)
                    del tails[fd]
                    continue
                self._pass_on(piece)
                if wanted and not self._written:
                    seen = tails[fd] + piece
                    tails[fd] = seen[max(0, len(seen) - len(wanted) + 1) :]
                    if wanted in seen:
                        self._written = True
                        self._news.set()

    def _pass_on(self, piece: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody looks at it any more
            while piece:
                piece = piece[os.write(self._show_fd, piece) :]
