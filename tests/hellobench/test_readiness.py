"""Readiness as the benchmark sees it: real processes that print, serve, fail, end early or are silent."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.hellobench import readiness
from benchmarks.hellobench.readiness import KEPT_BYTES, NotReady, check_unused, wait_until_ready
from benchmarks.hellobench.workloads import Amqp, Http, Output, Readiness, Redis, Sql

DEADLINE_S = 10.0
SLEEPING = (sys.executable, "-c", "import time; time.sleep(60)")
POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=Path("/usr/bin"))

# An HTTP server that writes more than a pipe holds before each answer, and is unavailable at first.
TALKATIVE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    answers = 0
    def do_GET(self):
        sys.stdout.write("x" * 200_000)
        sys.stdout.flush()
        Handler.answers += 1
        self.send_response(200 if Handler.answers > 3 and self.path == "/index" else 503)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"hi")
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@contextlib.contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def answering(*answers: bytes, close: bool = True, greet: bool = False) -> Iterator[int]:
    """A server that gives each connection the next of `answers` after a first request, or at once to `greet` (the last
    one for all others), then closes, or waits for more. Gives its port."""
    left, ended = list(answers), threading.Event()

    def serve(listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            if ended.is_set():
                connection.close()
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(DEADLINE_S)
                if not greet:
                    connection.recv(4096)
                connection.sendall(left.pop(0) if len(left) > 1 else left[0])
                if not close:
                    connection.recv(4096)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield port
        finally:
            ended.set()
            socket.create_connection(("127.0.0.1", port)).close()
            thread.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def wait(ready: Readiness, command: Sequence[str] = SLEEPING, deadline_s: float = DEADLINE_S) -> float:
    """Seconds until readiness."""
    started = time.perf_counter()
    with running(*command) as process:
        return wait_until_ready(ready, process, deadline_s) - started


def test_output_is_there_when_the_process_has_ended_well() -> None:
    assert 0.1 < wait(Output("hello"), ("sh", "-c", "echo hello; sleep 0.1")) < DEADLINE_S


def test_output_after_much_else_is_found() -> None:
    wait(Output("hello"), ("sh", "-c", "head -c 1000000 /dev/zero; echo hello"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo hello; exit 3", "ended with code 3.*hello"),
        ("echo something", "without printing 'hello'.*something"),
        ("kill -9 $$", "ended with code -9"),
        ("echo hello; exec sleep 60", "at the deadline.*hello"),
    ],
)
def test_output_that_fails(command: str, message: str) -> None:
    with pytest.raises(NotReady, match=f"(?s){message}"):
        wait(Output("hello"), ("sh", "-c", command), 0.3)


def test_output_of_a_child_that_lives_on_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "REST_S", 0.2)
    assert wait(Output("hello"), ("sh", "-c", "echo hello; sleep 1 &")) < 0.9


def test_http_is_ready_with_the_status_and_path_asked_for() -> None:
    port = free_port()
    command = (sys.executable, "-c", TALKATIVE, str(port))
    wait(Http(port, "/index"), command)
    with pytest.raises(NotReady, match="HTTP status 503"):
        wait(Http(port, "/other"), command, 0.6)


def test_output_is_read_on_after_readiness_and_only_its_end_is_kept() -> None:
    port = free_port()
    with running(sys.executable, "-c", TALKATIVE, str(port)) as process:
        wait_until_ready(Http(port, "/index"), process, DEADLINE_S)
        for _ in range(5):
            wait_until_ready(Http(port, "/index"), process, DEADLINE_S)
        process.kill()
        with pytest.raises(NotReady, match="ended early with code -9") as error:
            wait_until_ready(Http(port, "/index"), process, DEADLINE_S)
    assert len(str(error.value)) < KEPT_BYTES + 1000


def test_server_that_ends_early_fails_at_once() -> None:
    started = time.perf_counter()
    with pytest.raises(NotReady, match=r"(?s)ended early with code 1.*ConnectionRefused.*no licence"):
        wait(Http(free_port()), ("sh", "-c", "echo no licence; exit 1"))
    assert time.perf_counter() - started < DEADLINE_S / 2


def test_answer_of_another_process_is_not_the_workloads() -> None:
    with answering(b"+PONG\r\n") as port:
        with running("true") as process:
            process.wait()
            with pytest.raises(NotReady, match="another process"):
                wait_until_ready(Redis(port), process, DEADLINE_S)
        with pytest.raises(RuntimeError, match="in use"):
            check_unused(Redis(port))
    check_unused(Redis(port))
    check_unused(Output("x"))


def test_redis_is_ready_when_it_has_loaded() -> None:
    with answering(b"-LOADING Redis is loading the dataset in memory\r\n", b"", b"+PO", b"+PONG\r\n") as port:
        wait(Redis(port))


def frame(class_id: int, method_id: int) -> bytes:
    payload = struct.pack(">HHBB", class_id, method_id, 0, 9)
    return struct.pack(">BHI", 1, 0, len(payload)) + payload + b"\xce"


def test_amqp_is_ready_with_connection_start() -> None:
    with answering(b"", frame(10, 10)[:9], frame(10, 10)) as port:
        wait(Amqp(port))


def postgres_error(severity: str, text: str) -> bytes:
    fields = f"S{severity}\0C57P03\0M{text}\0\0".encode()
    return b"E" + struct.pack(">I", len(fields) + 4) + fields


def mariadb_error(text: str) -> bytes:
    return struct.pack("<I", 3 + len(text))[:3] + b"\0" + b"\xff" + struct.pack("<H", 1130) + text.encode()


@pytest.mark.parametrize(
    ("ready", "answer", "message"),
    [
        (Redis, b"-NOAUTH Authentication required.\r\n", "NOAUTH"),
        (Redis, b"", "answered with b''"),
        (Amqp, b"AMQP\x00\x00\x09\x01....", "header is answered"),
        (Amqp, frame(10, 50), "header is answered"),
        (Amqp, b"", "unpack requires"),
        (Http, b"", "RemoteDisconnected"),
        (Http, b"nonsense\r\n\r\n", "BadStatusLine"),
        (lambda port: Sql(port, "postgres"), postgres_error("FATAL", "the database system is starting up"), "starting"),
        (lambda port: Sql(port, "postgres"), b"", "network error"),
        (lambda port: Sql(port, "postgres"), b"HTTP/1.1 400 Bad Request\r\n\r\n", ""),
        (lambda port: Sql(port, "mariadb"), mariadb_error("Host is not allowed to connect"), "not allowed"),
        (lambda port: Sql(port, "mariadb"), b"", "timed out"),
        (lambda port: Sql(port, "mariadb"), b"HTTP/1.1 400 Bad Request\r\n\r\n", ""),
    ],
)
def test_any_other_answer_is_not_yet(ready: Callable[[int], Readiness], answer: bytes, message: str) -> None:
    greet = answer.endswith(b"to connect")
    with answering(answer, greet=greet) as port, pytest.raises(NotReady, match=f"at the deadline.*{message}"):
        wait(ready(port), deadline_s=0.2)


@pytest.mark.parametrize("ready", [Redis, Amqp, Http, lambda port: Sql(port, "postgres")])
def test_silent_server_does_not_outlast_the_deadline(ready: Callable[[int], Readiness]) -> None:
    with answering(b"", close=False) as port, pytest.raises(NotReady, match=r"(?i)timed? ?out|network error"):
        wait(ready(port), deadline_s=0.3)


def test_real_postgresql_answers_select(tmp_path: Path) -> None:
    if not (POSTGRES / "initdb").exists():
        pytest.skip("without PostgreSQL's server")
    port, data = free_port(), tmp_path / "data"
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    data.mkdir()
    subprocess.run(["chown", "postgres:", str(data)], check=True, timeout=DEADLINE_S)
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]
    initialise = [*as_user, f"{POSTGRES}/initdb", "-N", "-A", "trust", "-D", str(data)]
    subprocess.run(initialise, check=True, capture_output=True, timeout=30, cwd="/")
    serve = [*as_user, f"{POSTGRES}/postgres", "-F", "-D", str(data), "-p", str(port), "-k", ""]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/") as process:
        try:
            wait_until_ready(Sql(port, "postgres"), process, DEADLINE_S)
        finally:
            process.terminate()
            process.wait(DEADLINE_S)
