"""Connections to servers: pools, TLS, proxies. The only module that knows httpx.

One `Connections` for each way of reaching servers (CAs, insecure), shared by all clients that reach them so. It sends
one request and does not judge the answer: `lazyfs.sources.http` retries, follows redirects and counts.
"""

from __future__ import annotations

import functools
import logging
import socket
import ssl
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import trio
from httpcore._async import http11

from lazyfs.errors import HostError
from lazyfs.sources.failures import Failed
from lazyfs.sources.urls import is_loopback
from lazyfs.tasks import Slots

CONNECT_TIMEOUT_S = 10.0
KEEPALIVE_S = 60.0
# Requests in flight to one origin. Streams have as many slots of their own, so whoever holds a stream can always fetch
# something else. The limit protects the server, so sources that share connections share it. It is the only one (pools
# have none), and it is by origin, so a silent server delays only those who ask it.
REQUESTS_AT_ONCE = 8
MAX_CAUSES = 20
MAX_REMEMBERED_HOSTS = 256  # a registry and its blob stores are a handful
CERTS_DIRS = ("/etc/docker/certs.d", "/etc/containers/certs.d")  # containers-certs.d(5)

WRITE_BYTES = 64 << 10  # is sent under one time limit
# Size of one recv. With httpcore's 64 KiB, reading 4 MiB takes twice the CPU, because every piece goes through its
# generators. There is no option for it; the name is that of httpcore 1.0.9 (a test checks how much comes at once).
READ_BYTES = 512 << 10
http11.AsyncHTTP11Connection.READ_NUM_BYTES = READ_BYTES

_HEADERS = {"User-Agent": "lazyfs", "Accept-Encoding": "identity", "Accept": "*/*"}

# httpcore logs headers at DEBUG: signed URLs and tokens are credentials.
for _name in ("httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class Answer:
    """An answer whose body is still to be read. `peer`: the address that sent it, "" behind a proxy. Close it."""

    def __init__(self, raw: httpx.Response, url: str, peer: str) -> None:
        self.status = raw.status_code
        self.headers: Mapping[str, str] = raw.headers
        self.url = url
        self.peer = peer
        self._raw = raw

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes, once. Raises Failed when it breaks. Closed early, it closes the answer."""
        body = self._raw.aiter_raw()
        try:
            async for chunk in body:
                yield chunk
        except GeneratorExit:
            # httpx's body is a chain of generators. Closing the outermost would leave the others to the garbage
            # collector; reading on from the closed answer ends them all, without any I/O.
            with trio.CancelScope(shield=True):
                await self._raw.aclose()
                with suppress(httpx.HTTPError, httpx.StreamError):
                    async for _ in body:
                        pass
            raise
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise explain(error) from None

    async def aclose(self) -> None:
        await self._raw.aclose()


class Connections:
    """Connections to any number of servers. For many tasks of one trio run; `aclose()` it.

    `insecure`: certificates are not verified, and clients allow plain http to any host. There is a connection pool for
    each scheme, proxy and set of certificate files; this host's files bound their number. A pool is made when it is
    first needed, because loading the system's CAs takes tens of milliseconds, which plain http must not pay.
    """

    def __init__(
        self, *, insecure: bool = False, ca_files: Sequence[str] = (), certs_dirs: Sequence[str] = CERTS_DIRS
    ) -> None:
        self.insecure = insecure
        self.slots = Slots(REQUESTS_AT_ONCE)  # by origin
        self.stream_slots = Slots(REQUESTS_AT_ONCE)
        self._ca_files = tuple(ca_files)
        self._certs_dirs = tuple(certs_dirs)
        self._pools: dict[tuple[str, tuple[str, ...], str | None], httpx.AsyncHTTPTransport] = {}
        self._files: dict[str, tuple[str, ...]] = {}
        self._proxies = urllib.request.getproxies_environment()  # once: walks the whole environment
        self._making = trio.Lock()

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | None, silence_s: float
    ) -> Answer:
        """One request, up to the answer's headers. Raises Failed. `silence_s`: how long the server may be silent, now
        and in the body, or take nothing of `content`; the caller bounds the whole."""
        # pool=None: only our slots make a request wait.
        silence = httpx.Timeout(silence_s, connect=min(CONNECT_TIMEOUT_S, silence_s), pool=None)
        length = {"Content-Length": str(len(content))} if content else {}
        try:
            request = httpx.Request(
                method,
                _parsed(url),
                headers={**_HEADERS, **length, **headers},
                content=b"",
                extensions={"timeout": silence.as_dict()},
            )
            if content:
                request.stream = _Pieces(content)
            authority = request.url.netloc.decode("ascii")
            files = self._host_files(authority) if request.url.scheme == "https" else ()
            proxy = self._proxy_for(request.url.scheme, request.url.host, authority)
            pool = await self._pool(request.url.scheme, files, proxy)
            raw = await pool.handle_async_request(request)
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            raise explain(error) from None
        raw.request = request
        return Answer(raw, url, "" if proxy else _peer_of(raw))

    async def aclose(self) -> None:
        """Closes all connections. Idempotent."""
        while self._pools:
            await self._pools.popitem()[1].aclose()

    async def _pool(self, scheme: str, files: tuple[str, ...], proxy: str | None) -> httpx.AsyncHTTPTransport:
        key = (scheme, files, proxy)
        if key not in self._pools:
            async with self._making:
                if key not in self._pools:
                    self._pools[key] = await self._make(*key)
        return self._pools[key]

    def _proxy_for(self, scheme: str, host: str, authority: str) -> str | None:
        """The proxy that http_proxy, https_proxy and no_proxy ask for; never one for this machine itself."""
        proxies = self._proxies
        if scheme not in proxies or is_loopback(host) or urllib.request.proxy_bypass(authority, proxies):
            return None
        return proxies[scheme]

    async def _make(self, scheme: str, files: tuple[str, ...], proxy: str | None) -> httpx.AsyncHTTPTransport:
        if scheme == "https":
            context = await trio.to_thread.run_sync(self._tls_context, files)
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used, trusts nothing, costs nothing
        return _transport(context, proxy)

    def _host_files(self, authority: str) -> tuple[str, ...]:
        """The *.crt, *.cert and *.key files for this host[:port], looked for once."""
        if authority in self._files:
            return self._files[authority]
        found: list[str] = []
        for base in self._certs_dirs:
            for suffix in (".crt", ".cert", ".key"):
                found += sorted(str(path) for path in Path(base, authority).glob(f"*{suffix}"))
        if len(self._files) < MAX_REMEMBERED_HOSTS:
            self._files[authority] = tuple(found)
        return tuple(found)

    def _tls_context(self, files: tuple[str, ...]) -> ssl.SSLContext:
        """Blocking. Trusts the system's CAs, `ca_files` and *.crt; presents *.cert with its *.key."""
        context = ssl.create_default_context()
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        path = ""
        try:
            for path in (*self._ca_files, *(name for name in files if name.endswith(".crt"))):
                context.load_verify_locations(cafile=path)
            for path in (name for name in files if name.endswith(".cert")):
                context.load_cert_chain(path, path.removesuffix(".cert") + ".key")
        except (OSError, ssl.SSLError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise HostError(
                f"{path}: cannot use this certificate file: {reason}", "it must hold PEM"
            ) from None
        return context


class _Pieces(httpx.AsyncByteStream):
    """What is to be sent, in pieces: a time limit is for one of them, so a slow link may take its time for all.

    Not a generator, which trio would miss when the connection breaks in the middle.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._at = 0
        return self

    async def __anext__(self) -> bytes:
        piece = self._content[self._at : self._at + WRITE_BYTES]
        self._at += len(piece)
        if not piece:
            raise StopAsyncIteration
        return piece


@functools.lru_cache(maxsize=256)
def _parsed(url: str) -> httpx.URL:
    """A layer is asked for at one place all the time, and parsing takes half of what sending a request does."""
    return httpx.URL(url)


def _transport(context: ssl.SSLContext, proxy: str | None) -> httpx.AsyncHTTPTransport:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEPALIVE_S)
    return httpx.AsyncHTTPTransport(verify=context, limits=limits, proxy=proxy, trust_env=False)


def preload() -> None:
    """Imports what the first request would import; for a daemon that is idle."""
    _transport(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), None)


def _peer_of(response: httpx.Response) -> str:
    try:
        return str(response.extensions["network_stream"].get_extra_info("server_addr")[0])
    except OSError:
        return ""


def explain(error: Exception) -> Failed:
    """What a failure below HTTP means for the user. The texts of httpx are not used: they may hold URLs."""
    causes: list[BaseException] = [error]
    for cause in causes:  # grows while it is walked
        if isinstance(cause, BaseExceptionGroup):  # trio's, one exception per address of the host
            causes += cause.exceptions
        elif (below := cause.__cause__ or cause.__context__) is not None and len(causes) < MAX_CAUSES:
            causes.append(below)
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Failed(
                f"its certificate is not trusted: {cause.verify_message}",
                "give its CA with the option ca, or put it into /etc/docker/certs.d/HOST/ca.crt",
                temporary=False,
            )
        if isinstance(cause, ssl.SSLError):
            return Failed(f"TLS failed: {cause.reason}", "does this port speak https?", temporary=False)
        if isinstance(cause, socket.gaierror):
            again = cause.errno == socket.EAI_AGAIN
            return Failed("no such host", "check the name and this host's DNS", temporary=again)
        if isinstance(cause, ConnectionRefusedError):
            return Failed("connection refused", "is the server running, and the port right?", temporary=True)
    hint = "the network or the server is in trouble; try again later"
    if isinstance(error, httpx.TimeoutException):
        return Failed("no answer in time", hint, temporary=True)
    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return Failed("not a valid request", "report this to the server's operator", temporary=False)
    if isinstance(error, httpx.ProxyError):
        return Failed("the proxy failed", "check https_proxy and no_proxy", temporary=True)
    if isinstance(error, httpx.ConnectError):
        return Failed("cannot connect", hint, temporary=True)
    return Failed(f"the connection broke ({type(error).__name__})", hint, temporary=True)
