"""When a started workload is useful: its output is there, or a client of its own protocol is answered.

The paper's harness looked for a line in the log. That line can come early (Apache prints it before it serves),
or come from the temporary server that initialises a data base. A client's answer cannot.

Everything a probe needs is imported here, before any clock runs.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pg8000.native
import pymysql

from benchmarks.hellobench.workloads import Amqp, Http, Output, Readiness, Redis, Sql

LOOPBACK = "127.0.0.1"
POLL_S = 0.01  # between the end of one attempt and the next one, as in the paper
ATTEMPT_S = 2.0  # for one connection, and for each answer on it: a server under way may accept and be silent
KEPT_BYTES = 64 << 10  # of the output
REST_S = 2.0  # for output that is still in the pipe when the process has ended
BODY_BYTES = 1 << 20  # of a page; the start pages of web servers are far smaller


class NotReady(Exception):
    """The workload ended without being ready, or failed, or did not get there in time."""


class _NotYet(Exception):
    """An answer, but not the one of a server that is ready."""


# What a server that is still starting does to a client: it refuses, resets, is silent, or answers with an error.
# The last three are the data base drivers' on an answer that is cut short or none of their protocol.
_NOT_YET = (
    _NotYet, OSError, http.client.HTTPException, pg8000.exceptions.Error, pymysql.MySQLError,
    struct.error, LookupError, ValueError,
)  # fmt: skip


def wait_until_ready(ready: Readiness, process: subprocess.Popen[bytes], deadline_s: float) -> float:
    """Wait until the workload in `process` is ready; returns when that was, in seconds of time.perf_counter.

    `process` ends when the container ends; its standard output is a pipe. The pipe is read to its end, also after
    this has returned, so that a server that writes much is never held up; the caller still closes `process.stdout`,
    ends the process and waits for it. `deadline_s`: seconds from now. Raises NotReady, with the end of the output.
    """
    deadline = time.perf_counter() + deadline_s
    output = _Output(process)
    with _ending(process) as ending:
        if isinstance(ready, Output):
            return _wait_for_output(ready.text, process, ending, output, deadline)
        return _wait_for_answer(ready, process, ending, output, deadline)


def port_of(ready: Readiness) -> int | None:
    """The port of the host that is probed, if it is a server."""
    return None if isinstance(ready, Output) else ready.port


def check_unused(ready: Readiness) -> None:
    """RuntimeError if something listens at the port already: its answer would be taken for the workload's.

    To be called before the workload is started.
    """
    port = port_of(ready)
    if port is not None:
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), ATTEMPT_S):
            raise RuntimeError(f"port {port} is in use; the workload cannot be measured")


class _Output:
    """Reads a process's standard output until it ends, in a thread, and keeps the end of it.

    The thread has a descriptor of its own, so that nobody else's close disturbs it. It ends with the last writer.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        self._kept = bytearray()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._drain, args=(os.dup(process.stdout.fileno()),), daemon=True)
        self._thread.start()

    def _drain(self, descriptor: int) -> None:
        try:
            while piece := os.read(descriptor, KEPT_BYTES):
                with self._lock:
                    self._kept += piece
                    del self._kept[:-KEPT_BYTES]
        finally:
            os.close(descriptor)

    def text(self, wait_s: float = 0.0) -> str:
        """What was printed, the last KEPT_BYTES of it; waits `wait_s` seconds at most for the end of the output."""
        self._thread.join(wait_s)
        with self._lock:
            return self._kept.decode(errors="replace")


@contextlib.contextmanager
def _ending(process: subprocess.Popen[bytes]) -> Iterator[Callable[[float], bool]]:
    """A function that waits so many seconds for the end of a process and says whether it has ended.

    Popen.wait with a time-out looks at growing intervals of up to 50 ms; this sees the end at once.
    """
    if process.poll() is not None:
        yield lambda _: True
        return
    descriptor = os.pidfd_open(process.pid)
    try:
        yield lambda wait_s: bool(select.select([descriptor], [], [], max(0.0, wait_s))[0])
    finally:
        os.close(descriptor)


def _wait_for_output(
    text: str, process: subprocess.Popen[bytes], ending: Callable[[float], bool], output: _Output, deadline: float
) -> float:
    if not ending(deadline - time.perf_counter()):
        raise NotReady(f"still running at the deadline; its output:\n{output.text()}")
    seen = time.perf_counter()
    code = process.wait()
    printed = output.text(REST_S)
    if code != 0:
        raise NotReady(f"ended with code {code}; its output:\n{printed}")
    if text not in printed:
        raise NotReady(f"ended without printing {text!r}; its output:\n{printed}")
    return seen


def _wait_for_answer(
    ready: Http | Sql | Redis | Amqp,
    process: subprocess.Popen[bytes],
    ending: Callable[[float], bool],
    output: _Output,
    deadline: float,
) -> float:
    probe, reason = _PROBES[type(ready)], "no attempt was made"
    while (rest := deadline - time.perf_counter()) > 0:
        try:
            probe(ready, min(ATTEMPT_S, rest))
            answered, reason = time.perf_counter(), "it was another process that answered"
        except _NOT_YET as error:
            answered, reason = None, _cause(error)
        if ending(0.0 if answered is not None else POLL_S):
            code = process.wait()
            raise NotReady(f"ended early with code {code} ({reason}); its output:\n{output.text(REST_S)}")
        if answered is not None:
            return answered
    raise NotReady(f"no answer at the deadline ({reason}); its output:\n{output.text()}")


def _cause(error: BaseException) -> str:
    """The first of a chain of errors: a driver's farewell to a server that has hung up fails, too."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}"


# Probes. Each makes one connection, and returns if the answer is that of a server that is ready.


def _probe_http(ready: Http, wait_s: float) -> None:
    with contextlib.closing(http.client.HTTPConnection(LOOPBACK, ready.port, timeout=wait_s)) as connection:
        connection.request("GET", ready.path)
        response = connection.getresponse()
        response.read(BODY_BYTES)
        if response.status != ready.status:
            raise _NotYet(f"HTTP status {response.status}")


def _probe_sql(ready: Sql, wait_s: float) -> None:
    # The socket is ours: the drivers leave theirs open in some errors.
    with socket.create_connection((LOOPBACK, ready.port), wait_s) as connection:
        row = (_select_postgres if ready.dialect == "postgres" else _select_mariadb)(connection, wait_s)
    if list(row) != [1]:
        raise _NotYet(f"SELECT 1 is answered with {row!r}")


def _select_postgres(connection: socket.socket, wait_s: float) -> list[object]:
    client = pg8000.native.Connection("postgres", sock=connection, timeout=wait_s, ssl_context=False)
    with contextlib.closing(client):
        rows: list[list[object]] = client.run("SELECT 1")
    return rows[0]


def _select_mariadb(connection: socket.socket, wait_s: float) -> tuple[object, ...]:
    client = pymysql.Connection(user="root", read_timeout=wait_s, write_timeout=wait_s, defer_connect=True)
    client.connect(connection)
    with contextlib.closing(client), client.cursor() as cursor:
        cursor.execute("SELECT 1")
        row: tuple[object, ...] = cursor.fetchone() or ()
    return row


def _probe_redis(ready: Redis, wait_s: float) -> None:
    with socket.create_connection((LOOPBACK, ready.port), wait_s) as connection:
        connection.sendall(b"PING\r\n")
        answer = _receive(connection, 7)
    if answer != b"+PONG\r\n":  # -LOADING while it reads its data
        raise _NotYet(f"PING is answered with {answer!r}")


def _probe_amqp(ready: Amqp, wait_s: float) -> None:
    """As AMQP 0-9-1 has it, the client sends a protocol header; the server answers with its own if it
    does not speak that version, else with Connection.Start: a frame (type, channel, size, payload) whose
    payload is a method (class and method, 10 and 10 here)."""
    with socket.create_connection((LOOPBACK, ready.port), wait_s) as connection:
        connection.sendall(b"AMQP\x00\x00\x09\x01")
        answer = _receive(connection, 11)
    kind, channel, _, class_id, method_id = struct.unpack(">BHIHH", answer)
    if (kind, channel, class_id, method_id) != (1, 0, 10, 10):
        raise _NotYet(f"the AMQP header is answered with {answer!r}")


def _receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes, or less when the server closes the connection before."""
    answer = b""
    while len(answer) < size and (piece := connection.recv(size - len(answer))):
        answer += piece
    return answer


_PROBES: dict[type, Callable[..., None]] = {
    Http: _probe_http,
    Sql: _probe_sql,
    Redis: _probe_redis,
    Amqp: _probe_amqp,
}
