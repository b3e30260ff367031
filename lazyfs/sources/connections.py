"""Connections to servers: HTTP/1.1 over TCP, TLS and proxies, kept for the next request.

One `Connections` for each way of reaching servers (CAs, insecure), shared by all clients that reach them so. It sends
one request and does not judge the answer: `lazyfs.sources.http` retries, follows redirects and counts.

There is no HTTP library: a general one took half of the daemon's CPU for a request, and a sixth of its start.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import socket
import ssl
import urllib.parse
import urllib.request
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import trio

from lazyfs.errors import HostError
from lazyfs.sources.failures import Failed
from lazyfs.sources.http11 import BadMessage, Body, Head, body_of, parse_head, request_head, split_head
from lazyfs.sources.tcp import Link
from lazyfs.sources.urls import is_loopback
from lazyfs.tasks import Slots

CONNECT_TIMEOUT_S = 10.0
KEEPALIVE_S = 60.0
# Requests in flight to one origin. Streams have as many slots of their own, so whoever holds a stream can always fetch
# something else. The limit protects the server, so sources that share connections share it. It is the only one (idle
# connections have none), and it is by origin, so a silent server delays only those who ask it.
REQUESTS_AT_ONCE = 8
MAX_CAUSES = 20
MAX_REMEMBERED_HOSTS = 256  # a registry and its blob stores are a handful
MAX_INFORMATIONAL = 10  # answers 1xx before the real one
CERTS_DIRS = ("/etc/docker/certs.d", "/etc/containers/certs.d")  # containers-certs.d(5)

_HEADERS = {"User-Agent": "lazyfs", "Accept-Encoding": "identity", "Accept": "*/*"}
_WITH_LENGTH = ("POST", "PUT", "PATCH")  # they say the length of their body even if there is none
_PORTS = {"http": 80, "https": 443}
_SAFE = "%/:=&?~+!$,;'@()*[]"  # in a path and its query, besides letters and digits: RFC 3986
_TROUBLE = "the network or the server is in trouble; try again later"
_BROKEN = (OSError, BadMessage, trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError)


class _Place(NamedTuple):
    """A URL in the parts by which it is asked for. `authority`: host, and port if it is not the scheme's own."""

    scheme: str
    host: str
    port: int
    authority: str
    target: str


class _Way(NamedTuple):
    """How a connection reaches its server; those with the same way can be used for each other's requests."""

    scheme: str
    host: str
    port: int
    files: tuple[str, ...]
    proxy: str | None


class Answer:
    """An answer whose body is still to be read. `peer`: the address that sent it, "" behind a proxy. Close it."""

    def __init__(
        self, head: Head, body: Body, begun: bytes, link: Link, url: str, peer: str, silence_s: float,
        keep: Callable[[Link], None],
    ) -> None:  # fmt: skip
        """`begun`: what came behind the head. `keep` takes the connection when it can be used again."""
        self.status = head.status
        self.headers: Mapping[str, str] = head.headers
        self.url = url
        self.peer = peer
        self._keeps_open = head.keeps_open
        self._body = body
        self._begun = begun
        self._link = link
        self._silence_s = silence_s
        self._keep = keep
        self._left = False  # the connection is no longer this answer's
        if body.ended:
            self._leave(bool(begun))

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes, once. Raises Failed when it breaks. Closed early, it closes the answer."""
        try:
            data = self._begun
            while not self._left:
                for piece in self._body.feed(data):
                    yield piece
                if self._body.ended:
                    self._leave(self._body.surplus)
                elif not (data := await self._link.receive(self._silence_s)):
                    self._body.end()
                    self._leave(True)
        except _BROKEN as error:
            raise explain(error) from None
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """A connection whose answer was not read to its end is of no more use."""
        self._leave(True)

    def _leave(self, unusable: bool) -> None:
        if self._left:
            return
        self._left = True
        if unusable or not self._keeps_open:
            self._link.close()
        else:
            self._keep(self._link)


class Connections:
    """Connections to any number of servers. For many tasks of one trio run; `aclose()` it.

    `insecure`: certificates are not verified, and clients allow plain http to any host. What is trusted is loaded for
    each set of certificate files, which this host bounds, and when it is first needed, because the system's CAs take
    tens of milliseconds, which plain http must not pay.
    """

    def __init__(
        self, *, insecure: bool = False, ca_files: Sequence[str] = (), certs_dirs: Sequence[str] = CERTS_DIRS
    ) -> None:
        self.insecure = insecure
        self.slots = Slots(REQUESTS_AT_ONCE)  # by origin
        self.stream_slots = Slots(REQUESTS_AT_ONCE)
        self._ca_files = tuple(ca_files)
        self._certs_dirs = tuple(certs_dirs)
        self._idle: dict[_Way, list[Link]] = {}
        self._contexts: dict[tuple[str, ...], ssl.SSLContext] = {}
        self._files: dict[str, tuple[str, ...]] = {}
        self._proxies = urllib.request.getproxies_environment()  # once: walks the whole environment
        self._making = trio.Lock()
        self._closed = False

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | None, silence_s: float
    ) -> Answer:
        """One request, up to the answer's headers. Raises Failed. `silence_s`: how long the server may be silent, now
        and in the body, or take nothing of `content`; the caller bounds the whole."""
        place = _place(url)
        files = self._host_files(place.authority) if place.scheme == "https" else ()
        proxy = self._proxy_for(place.scheme, place.host, place.authority)
        way = _Way(place.scheme, place.host, place.port, files, proxy)
        fields = {"Host": place.authority, **_HEADERS, **headers}
        target = place.target
        if proxy and place.scheme == "http":
            target = f"http://{place.authority}{target}"
            fields.update(_proxy_login(proxy))
        if content is not None or method in _WITH_LENGTH:
            fields["Content-Length"] = str(len(content or b""))
        try:
            asking = request_head(method, target, fields)
        except BadMessage as error:
            raise explain(error, "not a valid request") from None
        link = self._take_idle(way) or await self._open(way, min(CONNECT_TIMEOUT_S, silence_s))
        try:
            head, begun = await _exchange(link, asking, content or b"", silence_s)
            body = body_of(method, head)
            peer = "" if proxy else link.peer
            return Answer(head, body, begun, link, url, peer, silence_s, functools.partial(self._keep, way))
        except BaseException as error:
            link.close()
            if isinstance(error, _BROKEN):
                raise explain(error) from None
            raise

    async def aclose(self) -> None:
        """Closes all connections that are idle; those in use are closed when their answers are. Idempotent."""
        self._closed = True
        for links in self._idle.values():
            for link in links:
                link.close()
        self._idle.clear()

    def _keep(self, way: _Way, link: Link) -> None:
        link.idle_since_s = trio.current_time()
        if self._closed:
            link.close()
        else:
            self._idle.setdefault(way, []).append(link)

    def _take_idle(self, way: _Way) -> Link | None:
        """The connection of this way that was used last; all that were idle for too long are closed."""
        before_s = trio.current_time() - KEEPALIVE_S
        for one, links in list(self._idle.items()):
            while links and links[0].idle_since_s < before_s:
                links.pop(0).close()
            if not links:
                del self._idle[one]
        links = self._idle.get(way, [])
        while links:
            link = links.pop()
            if not link.is_over():
                return link
            link.close()
        return None

    async def _open(self, way: _Way, patience_s: float) -> Link:
        """A new connection. Raises Failed."""
        proxy = urllib.parse.urlsplit(way.proxy) if way.proxy else None
        link: Link | None = None
        what = "cannot connect"
        try:
            if proxy is None:
                with trio.fail_after(patience_s):
                    link = await Link.open(way.host, way.port)
            else:
                what = "the proxy failed"
                link = await self._open_proxy(proxy, patience_s)
                if way.scheme == "https":
                    await _tunnel(link, way, patience_s)
                what = "cannot connect"
            if way.scheme == "https":
                context = await self._context(way.files)
                with trio.fail_after(patience_s):
                    await link.start_tls(context, way.host)
            return link
        except BaseException as error:
            if link is not None:
                link.close()
            if isinstance(error, (*_BROKEN, ValueError)):
                raise explain(error, what) from None
            raise

    async def _open_proxy(self, proxy: urllib.parse.SplitResult, patience_s: float) -> Link:
        if proxy.scheme not in _PORTS or not proxy.hostname:
            raise BadMessage("no HTTP proxy")
        with trio.fail_after(patience_s):
            link = await Link.open(proxy.hostname, proxy.port or _PORTS[proxy.scheme])
        try:
            if proxy.scheme == "https":
                context = await self._context(())
                with trio.fail_after(patience_s):
                    await link.start_tls(context, proxy.hostname)
        except BaseException:
            link.close()
            raise
        return link

    def _proxy_for(self, scheme: str, host: str, authority: str) -> str | None:
        """The proxy that http_proxy, https_proxy and no_proxy ask for; never one for this machine itself."""
        proxies = self._proxies
        if scheme not in proxies or is_loopback(host) or urllib.request.proxy_bypass(authority, proxies):
            return None
        return proxies[scheme] if "://" in proxies[scheme] else f"http://{proxies[scheme]}"

    async def _context(self, files: tuple[str, ...]) -> ssl.SSLContext:
        if files not in self._contexts:
            async with self._making:
                if files not in self._contexts:
                    self._contexts[files] = await trio.to_thread.run_sync(self._tls_context, files)
        return self._contexts[files]

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
        context.set_alpn_protocols(["http/1.1"])
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


@functools.lru_cache(maxsize=256)
def _place(url: str) -> _Place:
    """A layer is asked for at one place all the time. Raises Failed."""
    try:
        parts = urllib.parse.urlsplit(url)
        scheme, host = parts.scheme, (parts.hostname or "").encode("ascii" if url.isascii() else "idna").decode("ascii")
        port = parts.port or _PORTS[scheme]
    except (ValueError, KeyError) as error:  # UnicodeError is a ValueError
        raise explain(error, "not a valid request") from None
    if not host:
        raise explain(BadMessage(), "not a valid request")
    authority = f"[{host}]" if ":" in host else host
    if port != _PORTS[scheme]:
        authority += f":{port}"
    target = urllib.parse.quote(parts.path or "/", safe=_SAFE)
    if parts.query:
        target += "?" + urllib.parse.quote(parts.query, safe=_SAFE)
    return _Place(scheme, host, port, authority, target)


def _proxy_login(proxy: str) -> dict[str, str]:
    parts = urllib.parse.urlsplit(proxy)
    if parts.username is None:
        return {}
    login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(login.encode()).decode("ascii")}


async def _tunnel(link: Link, way: _Way, patience_s: float) -> None:
    """Has the proxy connect us to the server."""
    host = f"[{way.host}]" if ":" in way.host else way.host
    fields = {"Host": f"{host}:{way.port}", "User-Agent": "lazyfs", **_proxy_login(way.proxy or "")}
    head, begun = await _exchange(link, request_head("CONNECT", f"{host}:{way.port}", fields), b"", patience_s)
    if not 200 <= head.status < 300 or begun:
        raise BadMessage("the proxy refused")


async def _exchange(link: Link, asking: bytes, content: bytes, silence_s: float) -> tuple[Head, bytes]:
    """Sends a request; returns the answer's head and what of its body came with it. Raises one of _BROKEN."""
    with contextlib.suppress(OSError, trio.BrokenResourceError):
        await link.send(asking, silence_s)
        await link.send(content, silence_s)  # a server may refuse it while it comes: its answer says why
    data = b""
    for _ in range(MAX_INFORMATIONAL):
        while (found := split_head(data)) is None:
            more = await link.receive(silence_s)
            if not more:
                raise BadMessage("the connection ended before an answer")
            data += more
        head = parse_head(found[0])
        if head.status >= 200:
            return head, found[1]
        if head.status == 101:
            break
        data = found[1]
    raise BadMessage("an answer of another protocol")


def explain(error: BaseException, what: str = "the connection broke") -> Failed:
    """What a failure below HTTP means for the user; `what`: if it says nothing more exact."""
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
            hung_up = isinstance(cause, ssl.SSLEOFError)
            return Failed(f"TLS failed: {cause.reason}", "does this port speak https?", temporary=hung_up)
        if isinstance(cause, socket.gaierror):
            again = cause.errno == socket.EAI_AGAIN
            return Failed("no such host", "check the name and this host's DNS", temporary=again)
        if isinstance(cause, ConnectionRefusedError):
            return Failed("connection refused", "is the server running, and the port right?", temporary=True)
    if isinstance(error, trio.TooSlowError):
        return Failed("no answer in time", _TROUBLE, temporary=True)
    if what == "not a valid request":
        return Failed(what, "report this to the server's operator", temporary=False)
    if what == "the proxy failed":
        return Failed(what, "check https_proxy and no_proxy", temporary=True)
    reason = f": {error}" if isinstance(error, BadMessage) else ""
    return Failed(f"{what}{reason}", _TROUBLE, temporary=True)
