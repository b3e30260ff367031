"""HTTP requests with retries and checked redirects.

An `HttpClient` serves one source, with its patience and its counters, over `Connections` that it may share. It knows
nothing of registries: callers give URLs and headers and get status, headers and body. Every failure leaves as
RemoteError. Query strings (signed URLs) and headers never appear in messages.

Strategy: a request is one attempt (`_attempt`) inside one loop (`_retrying`). An attempt follows redirects by
hand, because whether credentials may travel on is decided per hop.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import trio

from lazyfs.core.retries import MAX_REDIRECTS
from lazyfs.errors import RemoteError
from lazyfs.sources.connections import Answer, Connections
from lazyfs.sources.failures import Failed, RetryPolicy
from lazyfs.sources.transfer import PATIENCE_S, Take, TransferCounters
from lazyfs.sources.urls import is_loopback, led_to, origin, redact, retry_after_s

MAX_ERROR_BODY_BYTES = 64 << 10
# A slow link brings a body in hundreds of small pieces, each of which costs 0.2 ms of CPU on its way up. While much is
# still to come, more is let gather before the next read.
SMALL_CHUNK_BYTES = 32 << 10
LARGE_REST_BYTES = 64 << 10
GATHER_S = 0.002
MAX_RETRY_AFTER_S = 60.0  # a longer Retry-After is an error at once
TEMPORARY_STATUS = frozenset({408, 429, 500, 502, 503, 504})


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


# Is told that an answer begins (its body is still empty), and says who takes the body as it comes; None: nobody.
Begin = Callable[[Response], Take | None]


class BodyTooLarge(RemoteError):
    """The body is larger than the caller allows; it was not read."""


_Result = TypeVar("_Result")


class HttpClient:
    """For many tasks of one trio run; `aclose()` it.

    `patience_s`: silence in an answer that is not a stream, after which it asks again; nor does it wait longer
    between two attempts. `shared`: others use the connections, too, so closing the client closes nothing.
    """

    def __init__(
        self,
        connections: Connections,
        *,
        patience_s: float = PATIENCE_S,
        stream_patience_s: float = PATIENCE_S,
        retry: RetryPolicy | None = None,
        shared: bool = False,
    ) -> None:
        retry = retry or RetryPolicy()
        self.retry = replace(retry, cap_s=min(retry.cap_s, patience_s))
        self.counters = TransferCounters()
        self.insecure = connections.insecure
        self._connections = connections
        self._shared = shared
        self._patience_s = patience_s
        self._stream_patience_s = stream_patience_s

    async def aclose(self) -> None:
        """Closes all connections, unless others use them. Idempotent."""
        if not self._shared:
            await self._connections.aclose()

    async def send(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        max_body_bytes: int = MAX_ERROR_BODY_BYTES,
        check: Callable[[Response], str | None] | None = None,
        begin: Begin | None = None,
        retry: bool = True,
        secret: bool = False,
        bulk: bool = False,
    ) -> Response:
        """One request and its whole answer, whatever its (lasting) status.

        `secret`: `content` holds credentials, which no redirect carries to another origin.
        `check` may find the answer unusable: what it returns is the problem, and the request is tried again.
        `begin` may have the body of an attempt taken as it comes; the Response has none then.
        `bulk`: it takes a slot of the streams, so that the others do not wait for it.
        Raises RemoteError when the attempts or the caller's deadline are used up, BodyTooLarge at once.
        """

        slots = self._connections.stream_slots if bulk else self._connections.slots

        async def attempt() -> Response:
            async with slots.of(origin(url)):
                answer = await self._attempt(method, url, headers or {}, content, self._patience_s, secret)
                try:
                    limit = max_body_bytes if answer.status < 300 else MAX_ERROR_BODY_BYTES
                    head = Response(answer.status, answer.headers, b"", answer.url, answer.peer)
                    take = begin(head) if begin is not None and answer.status < 300 else None
                    body = await self._read_body(method, answer, limit, take)
                finally:
                    await answer.aclose()
            response = Response(answer.status, answer.headers, body, answer.url, answer.peer)
            if check is not None and (problem := check(response)):
                raise Failed(problem, "the server or the network damages answers", temporary=True)
            return response

        return await self._retrying(method, url, attempt, self.retry.attempts if retry else 1)

    @asynccontextmanager
    async def stream(
        self, url: str, *, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[StreamResponse]:
        """GET with the body as it comes. Retries until the answer begins; then breaks are the caller's."""

        async def attempt() -> Answer:
            return await self._attempt("GET", url, headers or {}, None, self._stream_patience_s)

        async with self._connections.stream_slots.of(origin(url)):
            answer = await self._retrying("GET", url, attempt, self.retry.attempts)
            chunks = self._chunks(answer)
            try:
                yield StreamResponse(answer.status, answer.headers, answer.url, answer.peer, chunks)
            finally:
                await chunks.aclose()
                await answer.aclose()

    async def _retrying(
        self, method: str, url: str, attempt: Callable[[], Awaitable[_Result]], attempts: int
    ) -> _Result:
        tried = 0
        while True:
            tried += 1
            try:
                return await attempt()
            except Failed as error:
                failed = error
            delay_s = self.retry.delay_s(tried) if failed.wait_s is None else failed.wait_s
            left_s = trio.current_effective_deadline() - trio.current_time()
            # Waiting beyond the caller's deadline would only turn a telling error into a time-out.
            if not failed.temporary or tried >= attempts or delay_s > min(left_s, MAX_RETRY_AFTER_S):
                times = f" ({tried} attempts)" if tried > 1 else ""
                raise RemoteError(
                    f"{method} {redact(url)}: {failed.problem}{times}",
                    failed.hint,
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
        silence_s: float,
        secret: bool = False,
    ) -> Answer:
        """One attempt up to the answer's headers; the caller closes it. Redirects are followed."""
        first = origin(url)
        headers = dict(headers)
        for _ in range(MAX_REDIRECTS + 1):
            self._check_scheme(url)
            self.counters.requests += 1
            answer = await self._connections.send(method, url, headers, content, silence_s)
            try:
                target = self._redirect_target(method, answer)
                if target is None:
                    await self._refuse_temporary(method, answer)
                    return answer
                await self._read_body(method, answer, MAX_ERROR_BODY_BYTES)  # a read connection can be used again
            except BaseException:
                await answer.aclose()
                raise
            await answer.aclose()
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
    def _redirect_target(method: str, answer: Answer) -> str | None:
        location = answer.headers.get("Location")
        # 301-303 turn other methods into GET, which would lose an upload: the caller gets those answers.
        followed = (301, 302, 303, 307, 308) if method in ("GET", "HEAD") else (307, 308)
        if answer.status not in followed or location is None:
            return None
        return led_to(answer.url, location, answer.peer)

    async def _refuse_temporary(self, method: str, answer: Answer) -> None:
        """Raises Failed for an answer that may be another one next time."""
        status = answer.status
        if status not in TEMPORARY_STATUS:
            return
        await self._read_body(method, answer, MAX_ERROR_BODY_BYTES)
        hint = "the server is in trouble; try again later"
        if status == 429:
            hint = "the server limits requests; try again later, or log in for a higher limit"
        wait_s = retry_after_s(answer.headers.get("Retry-After"))
        raise Failed(f"the server answered {status}", hint, temporary=True, wait_s=wait_s)

    async def _chunks(self, answer: Answer) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(answer.chunks()) as chunks:
                async for chunk in chunks:
                    self.counters.bytes_fetched += len(chunk)
                    yield chunk
        except Failed as failed:
            raise RemoteError(f"GET {redact(answer.url)}: {failed.problem}", failed.hint) from None

    async def _read_body(self, method: str, answer: Answer, limit_bytes: int, take: Take | None = None) -> bytes:
        """The body, at most `limit_bytes`. Of an error's body, as much of its beginning as arrives. With `take` that is
        given the pieces, and nothing is returned."""
        length = answer.headers.get("Content-Length", "")
        ok = answer.status < 300
        if method == "HEAD":
            length = ""  # it is that of GET's body; reading the empty one keeps the connection usable
        if ok and length.isascii() and length.isdigit() and int(length[:20]) > limit_bytes:
            raise self._too_large(answer, limit_bytes)
        pieces: list[bytes] = []
        size = 0
        total = int(length[:20]) if length.isascii() and length.isdigit() else 0
        gathers = not answer.url.startswith("https:")  # TLS comes by records of 16 KiB, however long one waits
        try:
            async with aclosing(answer.chunks()) as chunks:
                async for chunk in chunks:
                    self.counters.bytes_fetched += len(chunk)
                    size += len(chunk)
                    if size > limit_bytes:
                        if ok:
                            raise self._too_large(answer, limit_bytes)
                        break
                    if take is None:
                        pieces.append(chunk)
                    else:
                        await take(chunk)
                    if gathers and len(chunk) < SMALL_CHUNK_BYTES and total - size > LARGE_REST_BYTES:
                        await trio.sleep(GATHER_S)
        except Failed:
            # docker-registry answers 416 with the length of the blob, then closes: the status is what counts.
            if ok:
                raise
        return b"".join(pieces)

    def _too_large(self, answer: Answer, limit_bytes: int) -> BodyTooLarge:
        return BodyTooLarge(
            f"GET {redact(answer.url)}: the answer is larger than {limit_bytes} bytes", temporary=False
        )
