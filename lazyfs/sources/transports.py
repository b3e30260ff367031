"""The connections below the HTTP client: one pool for each host, proxy and set of certificates."""

from __future__ import annotations

import ssl
import urllib.request
from contextlib import suppress
from pathlib import Path

import httpx
import trio

from lazyfs.errors import HostError
from lazyfs.sources.urls import is_loopback

KEEPALIVE_S = 60.0
# Of one recv. httpcore's 64 KiB cost 12 ms of CPU for 4 MiB, 256 KiB 8 ms, 1 MiB 5 ms: its layers of
# generators are paid per piece.
READ_BYTES = 512 << 10
HOSTS_AT_ONCE = 16  # that may be silent, with all connections in use, before others have to wait
MAX_REMEMBERED_HOSTS = 256  # a registry and its blob stores are a handful
CERTS_DIRS = ("/etc/docker/certs.d", "/etc/containers/certs.d")  # containers-certs.d(5)


def http_transport(context: ssl.SSLContext, limits: httpx.Limits, proxy: str | None) -> httpx.AsyncHTTPTransport:
    from httpcore._async import http11  # httpx imports httpcore as late as this, too

    http11.AsyncHTTP11Connection.READ_NUM_BYTES = READ_BYTES
    return httpx.AsyncHTTPTransport(verify=context, limits=limits, proxy=proxy, trust_env=False)


def peer_of(response: httpx.Response) -> str:
    """The address that answered; "" if a proxy was in between."""
    address = response.extensions.get("lazyfs_peer", "")
    return address if isinstance(address, str) else ""


def _note_peer(response: httpx.Response) -> None:
    with suppress(OSError):
        address = response.extensions["network_stream"].get_extra_info("server_addr")
        response.extensions["lazyfs_peer"] = address[0]


class Transports(httpx.AsyncBaseTransport):
    """Chooses the connection pool for a request, and makes it when it is first needed.

    Loading the system's CAs takes tens of milliseconds, so plain http must not pay for it. Hosts with
    files in certs.d get a pool of their own, so the number of pools is bounded by this host's files.
    """

    def __init__(
        self, insecure: bool, ca_files: tuple[str, ...], connections: int, certs_dirs: tuple[str, ...]
    ) -> None:
        self._insecure = insecure
        self._ca_files = ca_files
        self._certs_dirs = certs_dirs
        self._limits = httpx.Limits(
            max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=KEEPALIVE_S
        )
        self._pools: dict[tuple[str, tuple[str, ...], str | None], httpx.AsyncHTTPTransport] = {}
        self._files: dict[str, tuple[str, ...]] = {}
        self._proxies = urllib.request.getproxies_environment()  # once: walks the whole environment
        self._making = trio.Lock()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        files = self._host_files(url.netloc.decode("ascii")) if url.scheme == "https" else ()
        key = (url.scheme, files, self._proxy_for(url.scheme, url.host, url.netloc.decode("ascii")))
        pool = self._pools.get(key)
        if pool is None:
            async with self._making:
                pool = self._pools.get(key) or await self._make(*key)
                self._pools[key] = pool
        response = await pool.handle_async_request(request)
        if key[2] is None:
            _note_peer(response)
        return response

    def _proxy_for(self, scheme: str, host: str, authority: str) -> str | None:
        """The proxy that http_proxy, https_proxy and no_proxy ask for; never one for this machine itself."""
        proxies = self._proxies
        if scheme not in proxies or is_loopback(host) or urllib.request.proxy_bypass(authority, proxies):
            return None
        return proxies[scheme]

    async def aclose(self) -> None:
        for pool in self._pools.values():
            await pool.aclose()

    async def _make(self, scheme: str, files: tuple[str, ...], proxy: str | None) -> httpx.AsyncHTTPTransport:
        if scheme == "https":
            context = await trio.to_thread.run_sync(self._tls_context, files)
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used, trusts nothing, costs nothing
        return http_transport(context, self._limits, proxy)

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
        """Blocking. Trust the system's CAs, `ca_files` and *.crt; *.cert with its *.key is what we show."""
        context = ssl.create_default_context()
        if self._insecure:
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
