"""Connections: kept and given up, TLS, proxies, and answers of servers that do odd things."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
import trustme

from lazyfs.sources import connections
from lazyfs.sources.connections import Connections
from lazyfs.sources.failures import Failed

DEADLINE_S = 10.0
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Server:
    """Answers every request by `answers` in turn, the last one again and again. `requests`: heads, by connection."""

    def __init__(self, *answers: bytes, then_close: bool = False) -> None:
        self.answers = list(answers)
        self.then_close = then_close
        self.requests: list[list[bytes]] = []
        self.port = 0

    async def serve(self, stream: trio.abc.Stream) -> None:
        heads: list[bytes] = []
        self.requests.append(heads)
        pending = b""
        with contextlib.suppress(trio.BrokenResourceError, ssl.SSLError):
            while data := await stream.receive_some():
                pending += data
                while b"\r\n\r\n" in pending:
                    head, _, pending = pending.partition(b"\r\n\r\n")
                    heads.append(head)
                    answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                    await stream.send_all(answer)
                    if self.then_close:
                        await trio.aclose_forcefully(stream)
                        return

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/x"


@contextlib.asynccontextmanager
async def listening(handler: Callable[[trio.SocketStream], object]) -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, handler, 0)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def running(server: Server) -> AsyncIterator[Connections]:
    with trio.fail_after(DEADLINE_S):
        async with listening(server.serve) as server.port:
            used = Connections()
            yield used
            await used.aclose()


async def asked(used: Connections, url: str, method: str = "GET") -> tuple[int, bytes]:
    answer = await used.send(method, url, {}, None, 5)
    try:
        return answer.status, b"".join([piece async for piece in answer.chunks()])
    finally:
        await answer.aclose()


async def test_a_connection_is_used_again() -> None:
    server = Server(OK)
    async with running(server) as used:
        assert [await asked(used, server.url) for _ in range(3)] == [(200, b"ok")] * 3
    assert [len(heads) for heads in server.requests] == [3]
    assert server.requests[0][0].startswith(b"GET /x HTTP/1.1\r\nHost: 127.0.0.1:")


@pytest.mark.parametrize(
    "answer",
    [
        OK.replace(b"OK", b"OK\r\nConnection: close"),
        OK + b"more",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ],
)
async def test_a_doubtful_connection_is_not(answer: bytes) -> None:
    server = Server(answer)
    async with running(server) as used:
        assert [await asked(used, server.url) for _ in range(2)] == [(200, b"ok")] * 2
    assert [len(heads) for heads in server.requests] == [1, 1]


async def test_nor_one_that_was_idle_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(OK)
    async with running(server) as used:
        await asked(used, server.url)
        monkeypatch.setattr(connections, "KEEPALIVE_S", -1.0)
        await asked(used, server.url)
    assert [len(heads) for heads in server.requests] == [1, 1]


async def test_nor_one_that_the_server_ended() -> None:
    server = Server(OK, then_close=True)
    async with running(server) as used:
        for _ in range(3):
            assert await asked(used, server.url) == (200, b"ok")
            await trio.testing.wait_all_tasks_blocked()
    assert len(server.requests) == 3


async def test_nor_one_whose_answer_was_not_read() -> None:
    server = Server(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok", OK)
    async with running(server) as used:
        await (await used.send("GET", server.url, {}, None, 5)).aclose()
        assert await asked(used, server.url) == (200, b"ok")
    assert [len(heads) for heads in server.requests] == [1, 1]


async def test_an_answer_that_ends_with_its_connection() -> None:
    server = Server(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 100_000, then_close=True)
    async with running(server) as used:
        assert await asked(used, server.url) == (200, b"x" * 100_000)


async def test_answers_without_a_body() -> None:
    server = Server(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
    async with running(server) as used:
        assert [await asked(used, server.url, "HEAD") for _ in range(2)] == [(200, b"")] * 2
    assert [len(heads) for heads in server.requests] == [2]


async def test_interim_answers_are_passed_over() -> None:
    server = Server(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK)
    async with running(server) as used:
        assert await asked(used, server.url) == (200, b"ok")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok", "broke off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n", "broke off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n!\r\n", "malformed chunk"),
        (b"HTTP/1.1 200", "ended before an answer"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP/1 answer"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "another protocol"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 20, "another protocol"),
    ],
)
async def test_broken_answers(answer: bytes, message: str) -> None:
    server = Server(answer, then_close=True)
    async with running(server) as used:
        with pytest.raises(Failed, match=message) as caught:
            await asked(used, server.url)
    assert caught.value.temporary


async def test_a_silent_server_is_given_up() -> None:
    server = Server(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok")
    async with running(server) as used:
        answer = await used.send("GET", server.url, {}, None, 0.05)
        with pytest.raises(Failed, match="no answer in time"):
            _ = [piece async for piece in answer.chunks()]


async def test_a_closed_one_keeps_nothing() -> None:
    server = Server(OK)
    async with running(server) as used:
        answer = await used.send("GET", server.url, {}, None, 5)
        await used.aclose()
        assert [piece async for piece in answer.chunks()] == [b"ok"]
        assert await asked(used, server.url) == (200, b"ok")
    assert [len(heads) for heads in server.requests] == [1, 1]


@pytest.mark.parametrize("url", ["ftp://h/", "http:///x", "http://h:x/", "http://h:99999/", "http://[::1/"])
async def test_what_is_no_address(url: str) -> None:
    with pytest.raises(Failed, match="not a valid request"):
        await Connections().send("GET", url, {}, None, 5)


async def test_odd_paths_are_escaped() -> None:
    server = Server(OK)
    async with running(server) as used:
        await asked(used, server.url + "/\xe4 b%20c?q=\xfc&r=1")
    assert server.requests[0][0].startswith(b"GET /x/%C3%A4%20b%20c?q=%C3%BC&r=1 HTTP/1.1\r\n")


# -- TLS and proxies -------------------------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path) -> tuple[trustme.CA, str]:
    ca = trustme.CA()
    path = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(path)
    return ca, str(path)


def behind_tls(server: Server, ca: trustme.CA, name: str) -> Callable[[trio.SocketStream], object]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(name).configure_cert(context)

    async def handler(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await server.serve(trio.SSLStream(stream, context, server_side=True, https_compatible=True))

    return handler


async def test_much_comes_at_once_by_tls(authority: tuple[trustme.CA, str]) -> None:
    """TLS has records of 16 KiB; they are not passed on one by one."""
    ca, path = authority
    big = bytes(range(256)) * 16_000
    server = Server(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(big) + big, OK)
    with trio.fail_after(DEADLINE_S):
        async with listening(behind_tls(server, ca, "127.0.0.1")) as port:
            used = Connections(ca_files=[path])
            answer = await used.send("GET", f"https://127.0.0.1:{port}/x", {}, None, 5)
            pieces = [piece async for piece in answer.chunks()]
            assert await asked(used, f"https://127.0.0.1:{port}/y") == (200, b"ok")
            await used.aclose()
    assert b"".join(pieces) == big and max(len(piece) for piece in pieces) > 32 << 10
    assert [len(heads) for heads in server.requests] == [2]


async def test_a_strange_certificate_is_refused(authority: tuple[trustme.CA, str]) -> None:
    ca, path = authority
    with trio.fail_after(DEADLINE_S):
        async with listening(behind_tls(Server(OK), ca, "elsewhere.test")) as port:
            for used in (Connections(), Connections(ca_files=[path])):
                with pytest.raises(Failed, match="certificate is not trusted") as caught:
                    await asked(used, f"https://127.0.0.1:{port}/x")
                assert not caught.value.temporary
            insecure = Connections(insecure=True)
            assert await asked(insecure, f"https://127.0.0.1:{port}/x") == (200, b"ok")
            await insecure.aclose()


class ConnectProxy:
    """Takes CONNECT to any host to `port`, if `answer` is a 200; keeps the heads that it got."""

    def __init__(self, port: int, answer: bytes = b"HTTP/1.1 200 Connection established\r\n\r\n") -> None:
        self.heads: list[bytes] = []
        self._port = port
        self._answer = answer

    async def serve(self, client: trio.abc.Stream) -> None:
        self.heads.append(bytes(await client.receive_some()))
        await client.send_all(self._answer)
        async with await trio.open_tcp_stream("127.0.0.1", self._port) as server, trio.open_nursery() as nursery:
            for source, sink in ((client, server), (server, client)):
                nursery.start_soon(self._pipe, source, sink, nursery)

    @staticmethod
    async def _pipe(source: trio.abc.Stream, sink: trio.abc.Stream, nursery: trio.Nursery) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await source.receive_some():
                await sink.send_all(data)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("secure", [False, True], ids=["http proxy", "https proxy"])
async def test_tls_through_a_proxy(
    authority: tuple[trustme.CA, str], monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    ca, path = authority
    server = Server(OK)
    with trio.fail_after(DEADLINE_S):
        async with listening(behind_tls(server, ca, "registry.test")) as port:
            proxy = ConnectProxy(port)
            handler = behind_tls(proxy, ca, "127.0.0.1") if secure else proxy.serve  # type: ignore[arg-type]
            async with listening(handler) as proxy_port:
                monkeypatch.setenv("https_proxy", f"http{'s' * secure}://me:p%40ss@127.0.0.1:{proxy_port}")
                monkeypatch.delenv("no_proxy", raising=False)
                used = Connections(ca_files=[path])
                answer = await used.send("GET", "https://registry.test/x", {}, None, 5)
                assert answer.peer == "" and [piece async for piece in answer.chunks()] == [b"ok"]
                assert await asked(used, "https://registry.test/y") == (200, b"ok")
                await used.aclose()
    assert len(proxy.heads) == 1 and proxy.heads[0].startswith(b"CONNECT registry.test:443 HTTP/1.1\r\n")
    assert b"\r\nProxy-Authorization: Basic bWU6cEBzcw==\r\n" in proxy.heads[0]
    assert [len(heads) for heads in server.requests] == [2]
    assert not any(b"Proxy" in head for heads in server.requests for head in heads)


async def test_a_proxy_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(OK)
    with trio.fail_after(DEADLINE_S):
        async with listening(server.serve) as port:
            proxy = ConnectProxy(port, b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            async with listening(proxy.serve) as proxy_port:
                monkeypatch.delenv("no_proxy", raising=False)
                monkeypatch.setenv("https_proxy", f"127.0.0.1:{proxy_port}")
                with pytest.raises(Failed, match="the proxy failed"):
                    await asked(Connections(), "https://registry.test/x")
                monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:1")
                with pytest.raises(Failed, match="the proxy failed"):
                    await asked(Connections(), "https://registry.test/x")
    assert server.requests in ([], [[]])
