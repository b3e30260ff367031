"""Links: what a download, a request and a new connection cost, how connections end, and that nothing is left."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import host as machine
from benchmarks.hellobench import links
from benchmarks.hellobench.links import LINKS, Link, Route, connected, measured
from benchmarks.hellobench.relay import RESET
from tests import realimages
from tests.conftest import Lazyfs
from tests.layout import push
from tests.servers import RegistryServer

DEADLINE_S = 20.0
BITS_S = 80_000_000
RTT_S = 0.05
LINK = Link("test", BITS_S, RTT_S, "80 Mbit/s, 50 ms")
OPEN = Link("open", BITS_S, RTT_S, "windows are open from the start", slow_start=False)
FAST = Link("fast", 1_000_000_000, 0.002, "1 Gbit/s, 2 ms", slow_start=False)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


@contextlib.contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server whose connections, one at a time, are `answer`ed; gives its "127.0.0.1:port"."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client, contextlib.suppress(OSError):
                    client.settimeout(DEADLINE_S)
                    answer(client)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
            thread.join(DEADLINE_S)


def dial(route: Route) -> socket.socket:
    address, port = route.host.split(":")
    return socket.create_connection((address, int(port)), timeout=DEADLINE_S)


def received(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(1 << 20), b""))


def devices() -> str:
    return "\n".join(name for _, name in socket.if_nameindex())


def ended(process: int) -> bool:
    """Gone, or a zombie that its new parent has not waited for yet."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def await_that(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.02)


def test_both_directions_have_the_rate_and_bytes_are_counted() -> None:
    sent = os.urandom(1_500_000)
    got: list[bytes] = []

    def swap(client: socket.socket) -> None:
        got.append(received(client))  # until the half-close
        client.sendall(sent)

    with serving(swap) as host, connected(OPEN, host) as route, dial(route) as sock:
        started = time.monotonic()
        sock.sendall(sent[::-1])
        sock.shutdown(socket.SHUT_WR)
        assert received(sock) == sent
        seconds = time.monotonic() - started
        assert got == [sent[::-1]]
        counts = route.counts()
    assert counts is not None
    assert counts[:3] == (len(sent), len(sent), 1)
    assert counts.blobs == {"": len(sent)}
    # Two transfers one after the other, and two round trips: the connection, question and answer.
    assert seconds > 2 * RTT_S + 0.9 * 2 * len(sent) * 8 / BITS_S


def test_a_request_costs_one_round_trip_and_a_new_connection_another(registry: RegistryServer) -> None:
    with connected(LINK, registry.host) as route:
        seconds = []
        connection = http.client.HTTPConnection(route.host, timeout=DEADLINE_S)
        with contextlib.closing(connection):
            for _ in range(6):
                started = time.monotonic()
                connection.request("GET", "/v2/")
                assert connection.getresponse().read() == b"{}"
                seconds.append(time.monotonic() - started)
    assert seconds[0] > 2 * RTT_S
    assert min(seconds[1:]) > RTT_S
    assert min(seconds[1:]) < 1.8 * RTT_S


def test_who_waits_for_the_handshake_does_not_pay_twice() -> None:
    with (
        serving(lambda client: client.sendall(client.recv(9))) as host,
        connected(LINK, host) as route,
        dial(route) as sock,
    ):
        select.select([sock], [], [], 2 * RTT_S)
        started = time.monotonic()
        sock.sendall(b"question")
        assert sock.recv(9) == b"question"
        assert RTT_S < time.monotonic() - started < 1.9 * RTT_S


def test_a_new_connection_starts_slowly() -> None:
    size = 14_480 * 31  # windows of 1, 2, 4, 8, 16 times ten segments

    def seconds(slow_start: bool) -> float:
        link = Link("slow", 1_000_000_000, RTT_S, "", slow_start)
        with serving(lambda client: client.sendall(bytes(size))) as host, connected(link, host) as route:
            started = time.monotonic()
            with dial(route) as sock:
                assert len(received(sock)) == size
            return time.monotonic() - started

    assert seconds(True) > (1.5 + 4) * RTT_S
    assert 1.5 * RTT_S < seconds(False) < 4 * RTT_S


def test_a_reader_that_pauses_holds_the_sender_back_and_loses_nothing() -> None:
    total = 64 << 20
    piece = os.urandom(1 << 20)
    sent = 0

    def pour(client: socket.socket) -> None:
        nonlocal sent
        for _ in range(total // len(piece)):
            client.sendall(piece)
            sent += len(piece)

    with serving(pour) as host, connected(FAST, host) as route, dial(route) as sock:
        before = -1
        while before != sent or not sent:
            before = sent
            select.select([], [], [], 0.3)
        assert sent < total / 2  # the window and kernel buffers
        hashed, whole = hashlib.sha256(), hashlib.sha256()
        while data := sock.recv(1 << 20):
            hashed.update(data)
        for _ in range(total // len(piece)):
            whole.update(piece)
        assert hashed.digest() == whole.digest()


def test_resets_are_passed_on_after_what_was_sent() -> None:
    ends: list[str] = []

    def answer(client: socket.socket) -> None:
        if client.recv(9) == b"reset me":
            client.sendall(b"last words")
            # Arrive first: a reset discards what the receiver has not read.
            select.select([], [], [], 2 * RTT_S)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        else:
            try:
                client.recv(9)
                ends.append("end")
            except ConnectionResetError:
                ends.append("reset")

    with serving(answer) as host, connected(LINK, host) as route:
        with dial(route) as sock:
            sock.sendall(b"reset me")
            assert sock.recv(99) == b"last words"
            with pytest.raises(ConnectionResetError):
                sock.recv(99)
        with dial(route) as sock:
            sock.sendall(b"hold")
            select.select([], [], [], 3 * RTT_S)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        await_that(lambda: ends == ["reset"])


def test_nobody_behind_the_link_is_a_refused_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        host = f"127.0.0.1:{taken.getsockname()[1]}"
    with connected(LINK, host) as route, dial(route) as sock, pytest.raises(ConnectionResetError):
        sock.recv(9)


def test_a_cancelled_download_counts_what_came(registry: RegistryServer) -> None:
    digest = registry.put_blob("links/cancelled", os.urandom(4 << 20))
    with connected(OPEN, registry.host) as route:
        with dial(route) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
            sock.sendall(f"GET /v2/links/cancelled/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert sock.recv(1 << 10)
            select.select([], [], [], 0.3)
        select.select([], [], [], 0.1)
        counts = route.counts()
    assert counts is not None
    assert 1 << 10 <= counts.bytes_down < 512 << 10
    assert counts.requests == 1
    assert counts.blobs == {digest: counts.bytes_down}


def test_loopback_is_direct(registry: RegistryServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "LOOPBACK_CHECK_BYTES", 4 << 20)
    with connected(LINKS["loopback"], registry.host) as route:
        assert route.host == registry.host
        assert route.counts() is None
        assert measured(route, registry).rtt_s == 0.0


def test_a_link_is_measured(registry: RegistryServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "CHECK_S", 0.6)
    monkeypatch.setattr(links, "PINGS", 5)
    with connected(OPEN, registry.host) as route:
        found = measured(route, registry)
    # Half, because a shared machine may pause. Frames carry 95.6 % of payload, and 2 ms pass at once after a pause.
    assert 0.5 * BITS_S / 8 < found.bytes_s < 1.02 * BITS_S / 8
    assert 0.9 * RTT_S < found.rtt_s < 2 * RTT_S


@pytest.mark.parametrize("name", ["lan", "home"])
def test_tools_reach_the_registry(name: str, registry: RegistryServer, lazyfs: Lazyfs, tmp_path: Path) -> None:
    repository = f"links/{name}"
    with connected(LINKS[name], registry.host) as route:
        reference = f"{route.host}/{repository}:latest"
        # Over the slow link, too, would take seconds and show no more.
        push(realimages.busybox(), "gzip", reference if name == "lan" else f"{registry.host}/{repository}:latest")
        pushed = route.counts()
        source = ("--src-tls-verify=false", f"docker://{reference}", f"dir:{tmp_path}/pulled")
        machine.run("skopeo", "--insecure-policy", "copy", *source)
        pulled = route.counts()
        assert repository in machine.run("skopeo", "inspect", "--tls-verify=false", f"docker://{reference}")
        assert "sha256:" in lazyfs("inspect", "-o", "insecure", reference).stdout
        counts = route.counts()
    if pushed is not None and pulled is not None and counts is not None:
        size = sum(file.stat().st_size for file in (tmp_path / "pulled").iterdir())
        assert pulled.bytes_down - pushed.bytes_down > 0.9 * size > 500_000
        assert counts.connections >= pulled.connections + 2
        assert counts.bytes_up > pulled.bytes_up > pushed.bytes_up


def test_an_error_leaves_nothing_behind(registry: RegistryServer) -> None:
    before = devices()
    with pytest.raises(ZeroDivisionError), connected(LINK, registry.host) as route, dial(route):
        assert devices() != before
        raise ZeroDivisionError
    assert devices() == before


def test_a_dead_relay_is_an_error_and_leaves_nothing_behind(registry: RegistryServer) -> None:
    before = devices()
    with connected(LINK, registry.host) as route:
        assert route._relay is not None
        route._relay.kill()
        route._relay.wait()
        with pytest.raises(RuntimeError, match="relay has ended"):
            route.counts()
    assert devices() == before


def test_a_failed_start_says_why(registry: RegistryServer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = devices()
    impossible = Link("impossible", 0, 0.0, "")
    with pytest.raises(RuntimeError, match=r"no link impossible[^$]*tc qdisc"), connected(impossible, registry.host):
        pass
    assert devices() == before
    monkeypatch.setattr(links, "READY_DEADLINE_S", 0.0)
    with pytest.raises(RuntimeError, match="did not answer"), connected(LINK, registry.host):
        pass
    await_that(lambda: devices() == before)


def test_a_killed_harness_takes_its_link_along(registry: RegistryServer) -> None:
    before = devices()
    program = (
        "from benchmarks.hellobench.links import *\nimport sys\n"
        "with connected(LINKS['home'], sys.argv[1]) as route: print(route._relay.pid, flush=True); input()"
    )
    root = Path(links.ROOT)
    command = [sys.executable, "-c", program, registry.host]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as harness:
        assert harness.stdout is not None
        relay = int(harness.stdout.readline())
        assert devices() != before
        harness.send_signal(signal.SIGKILL)
    await_that(lambda: ended(relay) and devices() == before)
