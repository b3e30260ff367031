"""A threaded HTTP/1.1 reverse proxy that logs each request and injects faults by rule.

It stands in front of a real server, so tests count real requests and meet real broken answers.
Use it through `tests.servers`.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

CHUNK_BYTES = 1 << 16
UPSTREAM_TIMEOUT_S = 60.0
# RFC 9110 section 7.6.1: these belong to one connection and are never forwarded.
HOP_HEADERS = frozenset({"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"})

FaultKind = Literal[
    "status",  # answer `status` (and `headers`) without asking the upstream
    "reset",  # TCP RST after `after_bytes` of the body; None = before any answer
    "truncate",  # orderly close after `after_bytes` of the body, Content-Length says more
    "stall",  # stop sending after `after_bytes` of the body (None = before any answer) until close()
    "whole",  # drop Range, so the upstream answers 200 instead of 206
    "flip",  # invert the byte at `after_bytes` of the body
    "redirect",  # 307 to `location` + the request's path
    "slow",  # `latency_s` before the answer, then `bytes_per_s`
    "content_range",  # keep the answer, replace Content-Range by headers["Content-Range"]
]


@dataclass
class Rule:
    """A fault for the requests whose method matches and whose path `path` (a regex) is found in.

    The first `skip` matches pass; then `times` requests are hit (None = all).
    """

    fault: FaultKind
    path: str = ""
    method: str = ""  # "" = any
    skip: int = 0
    times: int | None = 1
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    after_bytes: int | None = None
    location: str = ""
    body: bytes = b'{"errors":[]}'  # of "status"
    latency_s: float = 0.0
    bytes_per_s: int | None = None
    hits: int = 0  # requests this rule was applied to


@dataclass
class LoggedRequest:
    """One request as seen by the proxy. `bytes` is the length of the body sent to the client."""

    method: str
    path: str
    range: str | None
    status: int
    bytes: int
    headers: dict[str, str]  # the request's, keys in lower case


class _Abort(Exception):
    """The connection to the client was broken on purpose."""


class FaultProxy:
    """`with FaultProxy("127.0.0.1:5000") as proxy:` then use `proxy.host` / `proxy.url` as the server.

    `upstream` is host:port (plain http) or an object with such a `host`. `latency_s` and `bytes_per_s`
    shape every answer, for benchmarks. `rules` may be changed at any time; the first match is applied.
    """

    def __init__(
        self, upstream: object, *rules: Rule, latency_s: float = 0.0, bytes_per_s: int | None = None
    ) -> None:
        self.upstream = upstream if isinstance(upstream, str) else str(upstream.host)  # type: ignore[attr-defined]
        self.rules: list[Rule] = list(rules)
        self.latency_s = latency_s
        self.bytes_per_s = bytes_per_s
        self.requests: list[LoggedRequest] = []
        self.host = ""
        self.url = ""
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> FaultProxy:
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"http://{self.host}"
        # 10 ms poll: shutdown() waits for one; the stdlib default of 500 ms would dominate the tests.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop accepting and break all connections, also stalled ones. Idempotent."""
        self._closing.set()
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self.break_connections()
        self._server.server_close()
        self._thread.join()
        self._server = None

    def break_connections(self) -> None:
        """Cut every open client connection now, as a rebooting server would."""
        with self._lock:
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def clear(self) -> None:
        """Forget rules and logged requests."""
        with self._lock:
            self.rules.clear()
            self.requests.clear()

    def count(self, method: str = "", path: str = "") -> int:
        """Number of logged requests with this method (any if empty) whose path matches the regex."""
        return len(self.matching(method, path))

    def matching(self, method: str = "", path: str = "") -> list[LoggedRequest]:
        """The logged requests with this method (any if empty) whose path matches the regex."""
        with self._lock:
            return [r for r in self.requests if method in ("", r.method) and re.search(path, r.path)]

    @property
    def bytes_sent(self) -> int:
        """Body bytes sent to clients so far."""
        with self._lock:
            return sum(request.bytes for request in self.requests)

    def _pick(self, method: str, path: str) -> Rule | None:
        with self._lock:
            for rule in self.rules:
                if (rule.method and rule.method != method) or not re.search(rule.path, path):
                    continue
                if rule.skip > 0:
                    rule.skip -= 1
                    continue
                if rule.times is None or rule.hits < rule.times:
                    rule.hits += 1
                    return rule
        return None

    def _log(self, request: LoggedRequest) -> None:
        with self._lock:
            self.requests.append(request)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is part of the tests: nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        with self.owner._lock:
            self.owner._sockets.add(self.request)
        self._upstream: http.client.HTTPConnection | None = None

    def finish(self) -> None:
        with self.owner._lock:
            self.owner._sockets.discard(self.request)
        if self._upstream is not None:
            self._upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Requests are in FaultProxy.requests, not on stderr."""

    def _relay(self) -> None:
        body = self._request_body()
        rule = self.owner._pick(self.command, self.path)
        logged = LoggedRequest(
            self.command,
            self.path,
            self.headers.get("Range"),
            0,
            0,
            {k.lower(): v for k, v in self.headers.items()},
        )
        self.owner._log(logged)
        try:
            self._answer(rule, body, logged)
        except _Abort:
            self.close_connection = True
        except (OSError, http.client.HTTPException):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _relay

    def _request_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, rule: Rule | None, body: bytes, logged: LoggedRequest) -> None:
        latency_s = self.owner.latency_s + (rule.latency_s if rule else 0.0)
        if latency_s:
            self.owner._closing.wait(latency_s)
        if rule is not None:
            if rule.fault == "status":
                self._plain(rule.status, rule.headers, rule.body, logged)
                return
            if rule.fault == "redirect":
                self._plain(307, {"Location": rule.location.rstrip("/") + self.path}, b"", logged)
                return
            if rule.after_bytes is None and rule.fault in ("reset", "stall"):
                self._break(rule)
        response = self._ask_upstream(body, whole=rule is not None and rule.fault == "whole")
        logged.status = response.status
        self.send_response_only(response.status, response.reason)
        replaced = rule.headers if rule is not None and rule.fault == "content_range" else {}
        for name, value in response.getheaders():
            if name.lower() not in HOP_HEADERS and name not in replaced:
                self.send_header(name, value)
        for name, value in replaced.items():
            self.send_header(name, value)
        has_body = self.command != "HEAD" and response.status not in (204, 304) and response.status >= 200
        chunked = has_body and response.headers.get("Content-Length") is None
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if not has_body:
            response.read()
            return
        for chunk in self._shaped(response, rule):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk) if chunked else chunk)
            logged.bytes += len(chunk)
        if response.length:  # the upstream broke off
            raise _Abort
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _ask_upstream(self, body: bytes, whole: bool) -> http.client.HTTPResponse:
        headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_HEADERS}
        if whole:
            headers = {k: v for k, v in headers.items() if k.lower() != "range"}
        reused = self._upstream is not None
        if self._upstream is None:
            self._upstream = http.client.HTTPConnection(self.owner.upstream, timeout=UPSTREAM_TIMEOUT_S)
        try:
            self._upstream.request(self.command, self.path, body or None, headers)
            return self._upstream.getresponse()
        except (http.client.RemoteDisconnected, ConnectionError):
            self._upstream.close()
            if not reused:  # a kept connection may have been closed meanwhile: once more on a new one
                raise
            self._upstream.request(self.command, self.path, body or None, headers)
            return self._upstream.getresponse()

    def _plain(self, status: int, headers: dict[str, str], body: bytes, logged: LoggedRequest) -> None:
        if self.command == "HEAD":
            body = b""
        logged.status = status
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        logged.bytes = len(body)

    def _shaped(self, response: http.client.HTTPResponse, rule: Rule | None) -> Iterator[bytes]:
        rate = (rule.bytes_per_s if rule else None) or self.owner.bytes_per_s
        position = 0
        cut = rule.after_bytes if rule is not None and rule.fault in ("reset", "truncate", "stall") else None
        while chunk := response.read(CHUNK_BYTES if rate is None else min(CHUNK_BYTES, max(1, rate // 50))):
            if rule is not None and rule.fault == "flip":
                at = (rule.after_bytes or 0) - position
                if 0 <= at < len(chunk):
                    chunk = chunk[:at] + bytes([chunk[at] ^ 0xFF]) + chunk[at + 1 :]
            if cut is not None and rule is not None and position + len(chunk) >= cut:
                if cut > position:
                    yield chunk[: cut - position]
                self._break(rule)
            yield chunk
            position += len(chunk)
            if rate is not None:
                self.owner._closing.wait(len(chunk) / rate)

    def _break(self, rule: Rule) -> None:
        self.wfile.flush()
        if rule.fault == "stall":
            self.owner._closing.wait()
        elif rule.fault == "reset":
            # SO_LINGER with time 0 makes close() send RST (socket(7)).
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        raise _Abort
