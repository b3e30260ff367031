"""Blobs over HTTP: whole, by range, and as a stream that resumes. Shared by registries and web layouts.

A `Locator` says where a blob is at the moment. It is asked again when a server refuses, because a signed URL or a
token has expired.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Protocol

import trio

from lazyfs.core.oci.digests import Digest, DigestCheck, digest_matches
from lazyfs.core.retries import MAX_RESOLVES
from lazyfs.errors import ImageError, NotFound, RemoteError
from lazyfs.sources.http import Begin, BodyTooLarge, HttpClient, Response, StreamResponse
from lazyfs.sources.transfer import Take
from lazyfs.sources.urls import redact

# A server that ignores ranges sends the whole blob for each read. Up to 16 MiB that is tolerated: it costs a fraction
# of a second; with larger blobs, mounting lazily would fetch the image many times over.
MAX_WHOLE_BLOB_BYTES = 16 << 20
STREAM_CHUNK_BYTES = 1 << 20  # one thread hop (50-100 us) per 0.7 ms of hashing
# A broken stream may resume any number of times if it makes this much progress in between.
PROGRESS_BYTES = 1 << 20
REFUSED = frozenset(
    {400, 401, 403, 404, 410}
)  # what expired signed URLs get: S3, Azure 403; GCS 400; CDNs 404, 410

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")

Check = Callable[[Response], str | None]


class Locator(Protocol):
    """Where one blob is. One object per operation; it may keep state between calls."""

    what: str  # for messages: "blob sha256:... of host/name"

    async def where(self) -> tuple[str, dict[str, str]]:
        """The URL to ask and the headers to send along."""

    def came_from(self, url: str) -> None:
        """The answer came from `url`, after redirects, so that may be asked directly next time."""

    async def refused(self, answer: Response | StreamResponse) -> bool:
        """The server answered with this 4xx. True: ask `where()` again. Returning False or raising: give up."""


class _Shorter(ImageError):
    """The blob has fewer bytes than are asked for."""

    def __init__(self, locator: Locator, end: int) -> None:
        super().__init__(f"{locator.what}: shorter than {end} bytes", "the registry's copy is damaged")


def _longer(locator: Locator, size_bytes: int) -> ImageError:
    return ImageError(f"{locator.what}: longer than the {size_bytes} bytes the manifest says")


def _content_range(headers: Mapping[str, str]) -> tuple[int, int] | None:
    """The half-open range of a Content-Range header."""
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
    return (int(found[1]), int(found[2]) + 1) if found else None


def _ends_before(headers: Mapping[str, str], end: int) -> bool:
    """Whether the answer reaches the end of the blob, and that is before `end`."""
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
    return found is not None and found[3] == str(int(found[2]) + 1) and int(found[3]) < end


def _failed(locator: Locator, status: int) -> RemoteError | NotFound:
    message = f"{locator.what}: the server answered {status}"
    if status == 404:
        return NotFound(message, "it may have been deleted; check the image")
    return RemoteError(message, "report this to the server's operator", temporary=False)


async def fetch_blob(http: HttpClient, locator: Locator, digest: Digest, size_bytes: int) -> bytes:
    """The whole blob. RemoteError or NotFound if it cannot be had, ImageError if it is not what its digest says."""
    for _ in range(2):  # a byte flipped on the way is gone the second time, a wrong blob is not
        try:
            response = await _get(http, locator, {}, size_bytes, None)
        except BodyTooLarge:
            raise _longer(locator, size_bytes) from None
        if response.status != 200:
            raise _failed(locator, response.status)
        if len(response.body) == size_bytes and await trio.to_thread.run_sync(
            digest_matches, response.body, digest
        ):
            return response.body
    raise ImageError(
        f"{locator.what}: the content does not match its digest", "the registry's copy is damaged"
    )


class _Handed:
    """Hands on the bytes of one range as they come, over any number of attempts. Each asks for what is missing by then:
    `headers` change."""

    def __init__(self, take: Take, start: int, end: int) -> None:
        self.headers = _asking_for(start, end)
        self._take = take
        self._range = start, end
        self._asked_from = start  # by the next attempt
        self._handed = 0  # of the range's bytes
        self._at = 0  # of them, in the present attempt

    def begin(self, head: Response) -> Take | None:
        """An attempt's answer begins. None: it is not the range; collect it."""
        is_the_rest = head.status == 206 and _content_range(head.headers) == (self._asked_from, self._range[1])
        self._at = self._asked_from - self._range[0] if is_the_rest else 0
        return self.more if is_the_rest else None

    async def more(self, piece: bytes) -> None:
        """Once more what was handed on already is left out: a server that sends other bytes then is found out by the
        hashes of what they decode to."""
        fresh = piece[max(0, self._handed - self._at) :]
        self._at += len(piece)
        if fresh and self._at <= self._range[1] - self._range[0]:
            self._handed += len(fresh)
            start, end = self._range
            if start + self._handed < end:
                self._asked_from = start + self._handed
                self.headers |= _asking_for(self._asked_from, end)
            await self._take(fresh)

    @property
    def all_came(self) -> bool:
        """Whether the present attempt brought what was missing, and no more."""
        return self._at == self._range[1] - self._range[0]


def _asking_for(start: int, end: int) -> dict[str, str]:
    """The header. Closed and single: open ranges and several at once are what servers get wrong."""
    return {"Range": f"bytes={start}-{end - 1}"}


async def fetch_range(
    http: HttpClient,
    locator: Locator,
    digest: Digest,
    start: int,
    end: int,
    take: Take | None = None,
    bulk: bool = False,
) -> bytes:
    """Exactly the bytes [start, end) of the blob, given to `take` if there is one, as they come, and else returned.
    `bulk` as for HttpClient.send(). RemoteError or NotFound if they cannot be had."""
    if not 0 <= start <= end:
        raise ValueError(f"bad range {start}-{end}")
    if start == end:
        return b""
    handed = _Handed(take, start, end) if take is not None else None

    def check(response: Response) -> str | None:
        if response.status != 206:
            return None
        if _ends_before(response.headers, end):
            raise _Shorter(locator, end)
        if handed is not None:
            is_right = handed.all_came
        else:
            is_right = _content_range(response.headers) == (start, end) and len(response.body) == end - start
        return None if is_right else "the server sent another range than asked for"

    headers = handed.headers if handed is not None else _asking_for(start, end)
    limit = max(end - start, MAX_WHOLE_BLOB_BYTES)
    try:
        begin = handed.begin if handed is not None else None
        response = await _get(http, locator, headers, limit, check, begin, bulk)
    except BodyTooLarge:
        raise RemoteError(
            f"{locator.what}: the server ignores ranges and sends the whole blob",
            "such a server cannot be mounted from; copy the image to a registry or an oci: directory",
            temporary=False,
        ) from None
    if response.status == 206:
        return response.body
    if response.status == 416:
        raise _Shorter(locator, end)
    if response.status != 200:
        raise _failed(locator, response.status)
    if not await trio.to_thread.run_sync(digest_matches, response.body, digest):
        raise ImageError(
            f"{locator.what}: the content does not match its digest", "the registry's copy is damaged"
        )
    if len(response.body) < end:
        raise _Shorter(locator, end)
    if handed is None:
        return response.body[start:end]
    await handed.more(response.body[start:end])
    return b""


async def _get(
    http: HttpClient,
    locator: Locator,
    headers: dict[str, str],
    max_body_bytes: int,
    check: Check | None,
    begin: Begin | None = None,
    bulk: bool = False,
) -> Response:
    """`headers` may change between attempts."""
    for _ in range(MAX_RESOLVES):
        url, own = await locator.where()
        response = await http.send(
            "GET",
            url,
            headers=ChainMap(headers, own),
            max_body_bytes=max_body_bytes,
            check=check,
            begin=begin,
            bulk=bulk,
        )
        if response.status not in REFUSED:
            locator.came_from(response.url)
            return response
        if not await locator.refused(response):
            break
    return response


@asynccontextmanager
async def open_blob_stream(
    http: HttpClient, locator: Locator, digest: Digest, size_bytes: int
) -> AsyncIterator[AsyncIterator[bytes]]:
    """The whole blob in order, in pieces of at most STREAM_CHUNK_BYTES.

    Resumes by range where a connection broke. After the last piece raises ImageError if the bytes are not the
    blob that `digest` names: until then the consumer has unverified bytes.
    """
    pieces = _pieces(http, locator, digest, size_bytes)
    try:
        yield pieces
    finally:
        await pieces.aclose()


async def _pieces(
    http: HttpClient, locator: Locator, digest: Digest, size_bytes: int
) -> AsyncGenerator[bytes, None]:
    check = DigestCheck(digest)
    position, failures, failed_at = 0, 0, 0
    while position < size_bytes:
        body = _body_from(http, locator, position, size_bytes)
        try:
            async for piece in body:
                await trio.to_thread.run_sync(check.update, piece)
                position += len(piece)
                yield piece
        except RemoteError as error:
            failures = 1 if position - failed_at >= PROGRESS_BYTES else failures + 1
            failed_at = position
            if not error.temporary or failures >= http.retry.attempts:
                raise
            http.counters.retries += 1
            await trio.sleep(http.retry.delay_s(failures))
        finally:
            await body.aclose()
    if not check.matches():
        raise ImageError(
            f"{locator.what}: the content does not match its digest", "the registry's copy is damaged"
        )


async def _body_from(
    http: HttpClient, locator: Locator, position: int, size_bytes: int
) -> AsyncGenerator[bytes, None]:
    """The blob from `position` on, by one request. On a break: what has come, then RemoteError."""
    headers = {"Range": f"bytes={position}-{size_bytes - 1}"} if position else {}
    for _ in range(MAX_RESOLVES):
        url, own = await locator.where()
        async with http.stream(url, headers=own | headers) as response:
            if response.status not in REFUSED:
                locator.came_from(response.url)
                async with aclosing(_joined(response, locator, position, size_bytes)) as pieces:
                    async for piece in pieces:
                        yield piece
                return
        if not await locator.refused(response):
            break
    raise _failed(locator, response.status)


async def _joined(
    response: StreamResponse, locator: Locator, position: int, size_bytes: int
) -> AsyncGenerator[bytes, None]:
    if response.status == 206 and _content_range(response.headers) == (position, size_bytes):
        skip = 0
    elif response.status == 200:
        skip = position  # ranges ignored: read over what is known
    elif response.status == 416 or _ends_before(response.headers, size_bytes):
        raise _Shorter(locator, size_bytes)
    elif response.status == 206:
        raise RemoteError(f"GET {redact(response.url)}: the server sent another range than asked for")
    else:
        raise _failed(locator, response.status)
    pending: list[bytes] = []
    pending_bytes, left = 0, size_bytes - position
    broken: RemoteError | None = None
    try:
        async for chunk in response.chunks:
            if skip:
                skip, chunk = max(0, skip - len(chunk)), chunk[skip:]
            left -= len(chunk)
            if left < 0:
                raise _longer(locator, size_bytes)
            if pending_bytes + len(chunk) > STREAM_CHUNK_BYTES:
                yield b"".join(pending)
                pending, pending_bytes = [], 0
            pending.append(chunk)
            pending_bytes += len(chunk)
    except RemoteError as error:
        broken = error
    if pending_bytes:
        yield b"".join(pending)
    if broken is not None:
        raise broken
    if left:
        raise RemoteError(f"GET {redact(response.url)}: the answer ended {left} bytes early")
