"""HTTP requests with retries, checked redirects and lazily made TLS contexts. The only importer of httpx.

One `HttpClient` serves one source. It knows nothing of registries: callers give URLs and headers and get
status, headers and body. Every failure leaves as RemoteError. Query strings (signed URLs) and headers never
appear in messages.

Strategy: a request is one attempt (`_attempt`) inside one loop (`_retrying`). An attempt follows redirects by
hand, because whether credentials may travel on is decided per hop.
"""

from __future__ import annotations

import copy
import http.cookiejar
import logging
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import httpx
import trio

from lazyfs.errors import RemoteError
from lazyfs.sources.failures import Failed, RetryPolicy, explain
from lazyfs.sources.transfer import TransferCounters
from lazyfs.sources.transports import CERTS_DIRS, HOSTS_AT_ONCE, Transports, http_transport, peer_of
from lazyfs.sources.urls import is_loopback, led_to, origin, redact, retry_after_s
from lazyfs.tasks import Slots

MAX_REDIRECTS = 5  # registry -> blob store is one hop; proxies add one or two
MAX_ERROR_BODY_BYTES = 64 << 10
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0  # of silence, not of the whole answer: the caller bounds that
MAX_RETRY_AFTER_S = 60.0  # a server that wants more is answered with an error, not with waiting
TEMPORARY_STATUS = frozenset({408, 429, 500, 502, 503, 504})

# httpx logs each URL at INFO, query string and all: signed URLs are credentials.
for _name in ("httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def preload() -> None:
    """Imports what the first request would import, for a daemon that has nothing else to do."""
    http_transport(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), httpx.Limits(), None)


@dataclass(frozen=True)
class Response:
    """A whole answer. `url` is where it came from, after redirects, `peer` the address of who sent it ("" behind a
    proxy). Header names are case-insensitive."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str
    peer: str


@dataclass(frozen=True)
class StreamResponse:
    """As `Response`, with the body still coming: `chunks` yields it once, RemoteError when it breaks."""

    status: int
    headers: Mapping[str, str]
    url: str
    peer: str
    chunks: AsyncIterator[bytes]


class BodyTooLarge(RemoteError):
    """The body is larger than the caller allows; it was not read."""


_Answer = TypeVar("_Answer")


class HttpClient:
    """Owned by one source; `aclose()` it. Safe for many tasks of one trio run.

    Sources may share connections: see `sibling`. `max_connections` bounds requests in flight to one host;
    streams have as many connections of their own, so whoever holds a stream can always fetch something else.
    """

    def __init__(
        self,
        *,
        insecure: bool = False,
        ca_files: Sequence[str] = (),
        max_connections: int = 8,
        counters: TransferCounters | None = None,
        retry: RetryPolicy | None = None,
        certs_dirs: Sequence[str] = CERTS_DIRS,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        self._owner = True
        self.insecure = insecure
        self.counters = counters if counters is not None else TransferCounters()
        self.retry = retry or RetryPolicy()
        self._slots = Slots(max_connections)  # by origin: a silent host holds up nobody but who asks it
        self._stream_slots = Slots(max_connections)
        self._stream_silence = self._silence = _silence(read_timeout_s)
        # No cookies: nothing here needs them, and they would travel between repositories.
        no_cookies = http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=()))
        self._client = httpx.AsyncClient(
            transport=Transports(
                insecure, tuple(ca_files), 2 * max_connections * HOSTS_AT_ONCE, tuple(certs_dirs)
            ),
            cookies=no_cookies,
            headers={"User-Agent": "lazyfs", "Accept-Encoding": "identity", "Accept": "*/*"},
        )

    def sibling(self, patience_s: float = READ_TIMEOUT_S) -> HttpClient:
        """A client that uses this one's connections and limits, and counts for itself; closing it closes
        nothing. `patience_s`: silence in an answer that is not a stream, after which it asks again; nor does
        it wait longer between two attempts."""
        sibling = copy.copy(self)
        sibling._silence = _silence(patience_s)
        sibling.retry = replace(self.retry, cap_s=min(self.retry.cap_s, patience_s))
        sibling.counters = TransferCounters()
        sibling._owner = False
        return sibling

    async def aclose(self) -> None:
        """Close all connections, unless they are somebody else's."""
        if self._owner:
            await self._client.aclose()

    async def send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        max_body_bytes: int = MAX_ERROR_BODY_BYTES,
        check: Callable[[Response], str | None] | None = None,
        retry: bool = True,
        secret: bool = False,
    ) -> Response:
        """One request and its whole answer, whatever its (lasting) status.

        `secret`: `content` holds credentials, which no redirect carries to another origin.
        `check` may find the answer unusable: what it returns is the problem, and the request is tried again.
        Raises RemoteError when the attempts or the caller's deadline are used up, BodyTooLarge at once.
        """

        async def attempt() -> Response:
            async with self._slots.of(origin(url)):
                raw = await self._attempt(method, url, headers or {}, content, self._silence, secret)
                try:
                    limit = max_body_bytes if raw.status_code < 300 else MAX_ERROR_BODY_BYTES
                    body = await self._read_body(raw, limit)
                finally:
                    await raw.aclose()
            response = Response(raw.status_code, raw.headers, body, str(raw.url), peer_of(raw))
            if check is not None and (problem := check(response)):
                raise Failed(problem, "the server or the network damages answers", temporary=True)
            return response

        return await self._retrying(method, url, attempt, self.retry.attempts if retry else 1)

    @asynccontextmanager
    async def stream(
        self, url: str, *, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[StreamResponse]:
        """GET with the body as it comes. Retries until the answer begins; then breaks are the caller's."""

        async def attempt() -> httpx.Response:
            return await self._attempt("GET", url, headers or {}, None, self._stream_silence)

        async with self._stream_slots.of(origin(url)):
            raw = await self._retrying("GET", url, attempt, self.retry.attempts)
            chunks = self._chunks(raw)
            try:
                yield StreamResponse(raw.status_code, raw.headers, str(raw.url), peer_of(raw), chunks)
            finally:
                await chunks.aclose()
                await raw.aclose()

    async def _retrying(
        self, method: str, url: str, attempt: Callable[[], Awaitable[_Answer]], attempts: int
    ) -> _Answer:
        tried = 0
        while True:
            tried += 1
            try:
                return await attempt()
            except Failed as error:
                failed = error
            except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
                failed = explain(error)
            delay_s = self.retry.delay_s(tried) if failed.wait_s is None else failed.wait_s
            left_s = trio.current_effective_deadline() - trio.current_time()
            # Waiting longer than the caller would only turn a telling error into a time-out.
            if not failed.temporary or tried >= attempts or delay_s > min(left_s, MAX_RETRY_AFTER_S):
                times = f" ({tried} attempts)" if tried > 1 else ""
                raise RemoteError(
                    f"{method} {redact(url)}: {failed.problem}{times}",
                    failed.hint,
                    status=failed.status,
                    temporary=failed.temporary,
                )
            self.counters.retries += 1
            await trio.sleep(delay_s)

    async def _attempt(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        content: bytes | None,
        silence: httpx.Timeout,
        secret: bool = False,
    ) -> httpx.Response:
        """One attempt up to the answer's headers; the caller closes it. Redirects are followed."""
        first = origin(url)
        headers = dict(headers)
        for _ in range(MAX_REDIRECTS + 1):
            self._check_scheme(url)
            self.counters.requests += 1
            request = self._client.build_request(
                method, url, headers=headers, content=content, timeout=silence
            )
            raw = await self._client.send(request, stream=True)
            try:
                target = self._redirect_target(method, raw)
                if target is None:
                    await self._refuse_temporary(raw)
                    return raw
                await self._read_body(raw, MAX_ERROR_BODY_BYTES)  # a read connection can be used again
            except BaseException:
                await raw.aclose()
                raise
            await raw.aclose()
            url = target
            if origin(url) != first:  # distribution-spec, RFC 9110 section 15.4
                if secret:
                    raise Failed("redirected with a login", "report it to the server's operator", temporary=False)
                headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
        raise Failed(f"more than {MAX_REDIRECTS} redirects", "report it to the operator", temporary=False)

    def _check_scheme(self, url: str) -> None:
        scheme, host, _ = origin(url)
        if scheme == "http" and not self.insecure and not is_loopback(host):
            raise Failed(
                f"plain http to {host} is refused",
                "anybody on the way could read and change it; allow it with the option insecure",
                temporary=False,
            )

    @staticmethod
    def _redirect_target(method: str, raw: httpx.Response) -> str | None:
        location: str | None = raw.headers.get("Location")
        # 301-303 turn other methods into GET, which no upload survives: those answers go to the caller.
        followed = (301, 302, 303, 307, 308) if method in ("GET", "HEAD") else (307, 308)
        if raw.status_code not in followed or location is None:
            return None
        return led_to(str(raw.url), location, peer_of(raw))

    async def _refuse_temporary(self, raw: httpx.Response) -> None:
        """Turn an answer that may be better next time into Failed."""
        status = raw.status_code
        if status not in TEMPORARY_STATUS:
            return
        await self._read_body(raw, MAX_ERROR_BODY_BYTES)
        hint = "the server is in trouble; try again later"
        if status == 429:
            hint = "the server limits requests; try again later, or log in for a higher limit"
        wait_s = retry_after_s(raw.headers.get("Retry-After"))
        raise Failed(f"the server answered {status}", hint, temporary=True, status=status, wait_s=wait_s)

    async def _raw_chunks(self, raw: httpx.Response) -> AsyncGenerator[bytes, None]:
        """The body as it comes, counted. Closed early, it closes the answer; httpx's exceptions pass."""
        body = raw.aiter_raw()
        try:
            async for chunk in body:
                self.counters.bytes_fetched += len(chunk)
                yield chunk
        except GeneratorExit:
            # httpx's body is a chain of generators, and closing the outermost leaves the others to the
            # garbage collector. Reading on from the closed answer ends them all, without any I/O.
            with trio.CancelScope(shield=True):
                await raw.aclose()
                with suppress(httpx.HTTPError, httpx.StreamError):
                    async for _ in body:
                        pass
            raise

    async def _chunks(self, raw: httpx.Response) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(self._raw_chunks(raw)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except (httpx.HTTPError, httpx.StreamError) as error:
            failed = explain(error)
            raise RemoteError(f"GET {redact(str(raw.url))}: {failed.problem}", failed.hint) from None

    async def _read_body(self, raw: httpx.Response, limit_bytes: int) -> bytes:
        """The body, at most `limit_bytes`; of an error answer as much of its beginning as can be had."""
        length = raw.headers.get("Content-Length", "")
        ok = raw.status_code < 300
        if raw.request.method == "HEAD":
            length = ""  # of the body that GET would have; reading the empty one keeps the connection usable
        if ok and length.isascii() and length.isdigit() and int(length[:20]) > limit_bytes:
            raise self._too_large(raw, limit_bytes)
        pieces: list[bytes] = []
        size = 0
        try:
            async with aclosing(self._raw_chunks(raw)) as chunks:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > limit_bytes:
                        if ok:
                            raise self._too_large(raw, limit_bytes)
                        break
                    pieces.append(chunk)
        except httpx.TransportError:
            # docker-registry answers 416 with the length of the blob, then closes: the status is what counts.
            if ok:
                raise
        return b"".join(pieces)

    def _too_large(self, raw: httpx.Response, limit_bytes: int) -> BodyTooLarge:
        return BodyTooLarge(
            f"GET {redact(str(raw.url))}: the answer is larger than {limit_bytes} bytes",
            status=raw.status_code,
            temporary=False,
        )


def _silence(read_timeout_s: float) -> httpx.Timeout:
    # pool=None: the semaphores do the waiting, inside the caller's deadline.
    connect_s = min(CONNECT_TIMEOUT_S, read_timeout_s)
    return httpx.Timeout(read_timeout_s, connect=connect_s, pool=None)
