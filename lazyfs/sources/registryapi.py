"""Requests to one repository by the OCI distribution API (distribution-spec v1.1): its address, and logging in.

Requests carry an Authorization header once the registry has asked for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import trio

from lazyfs.core.oci import documents
from lazyfs.core.oci.reference import RegistryReference
from lazyfs.errors import ImageError, NotFound, RemoteError
from lazyfs.sources.http import HttpClient, Response, StreamResponse
from lazyfs.sources.tokens import Authorizer
from lazyfs.sources.urls import is_loopback, origin, redact, split_host

DOCKER_HUB_API = "registry-1.docker.io"
MAX_RENEWALS = 2  # a token may expire between being fetched and being used; a second refusal is a refusal

PULL, PUSH, DELETE = "pull", "pull,push", "delete"


class RegistryApi:
    """For many tasks of one trio run. `name`: host/repository, for messages."""

    def __init__(
        self,
        reference: RegistryReference,
        http: HttpClient,
        auth_files: Sequence[str] | None,
        environ: Mapping[str, str] | None,
    ) -> None:
        self.name = f"{reference.registry}/{reference.repository}"
        self._http = http
        self._host = reference.registry
        self._repository = reference.repository
        self._authorizer = Authorizer(http, reference.registry, reference.repository, auth_files, environ)
        self._base = ""
        self._connecting = trio.Lock()

    async def connect(self) -> str:
        """Finds the scheme once; returns "scheme://host".

        It is https, except where plain http is allowed: on this machine (tried by http first, because that is faster
        than making a TLS context), and on any host with `insecure` (tried by https first).
        """
        if self._base:
            return self._base
        async with self._connecting:
            if not self._base:
                host = DOCKER_HUB_API if self._host == "docker.io" else self._host
                base = f"https://{host}"
                if is_loopback(split_host(host)):
                    base = await self._probe(f"http://{host}", base)
                elif self._http.insecure:
                    base = await self._probe(base, f"http://{host}")
                self._base = base
        return self._base

    async def _probe(self, first: str, second: str) -> str:
        """`first`, unless the server does not speak its scheme. No credentials are sent."""
        try:
            answer = await self._http.send("GET", f"{first}/v2/", retry=False)
        except RemoteError:
            return second if first.startswith("https:") else first
        # Go and nginx answer 400 to plain http on their https port.
        return second if answer.status == 400 else first

    async def url(self, path: str) -> str:
        return f"{await self.connect()}/v2/{self._repository}/{path}"

    async def headers(self, url: str, actions: str) -> dict[str, str]:
        """The Authorization header, for URLs of the registry itself only."""
        if origin(url) != origin(await self.connect()):
            return {}
        header = await self._authorizer.header(actions)
        return {"Authorization": header} if header else {}

    async def call(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        max_body_bytes: int = 1 << 16,
        *,
        actions: str = PULL,
        content: bytes | None = None,
        retry: bool = True,
    ) -> Response:
        """A request to the API below the repository, or to a whole URL; logs in when asked to."""
        url = path if "://" in path.partition("?")[0] else await self.url(path)
        for renewals in range(MAX_RENEWALS + 1):
            authorization = await self.headers(url, actions)
            answer = await self._http.send(
                method, url, headers={**(headers or {}), **authorization}, content=content,
                max_body_bytes=max_body_bytes, retry=retry,
            )  # fmt: skip
            if answer.status != 401 or renewals == MAX_RENEWALS:
                break
            await self.renew(actions, authorization, answer)
        if answer.status in (401, 403):
            raise self.denied()
        return answer

    async def renew(self, actions: str, sent: Mapping[str, str], refusal: Response | StreamResponse) -> None:
        """A new Authorization header, after `refusal` (401) of a request that had sent `sent`. RemoteError: denied."""
        if origin(refusal.url) != origin(await self.connect()):
            raise self.denied()  # the login is the registry's, not that of whom it redirects to
        await self._authorizer.renew(actions, sent.get("Authorization"), refusal)

    def denied(self) -> RemoteError:
        """The error for a registry that goes on refusing."""
        return self._authorizer.denied()


def unexpected(answer: Response, what: str, *, temporary: bool = False) -> RemoteError | NotFound:
    """The error for a status that the API does not foresee, with the registry's own code if any."""
    code = ""
    try:
        errors = documents.load_json(answer.body, "the answer").get("errors")
        code = str(errors[0]["code"])[:40] if isinstance(errors, list) else ""
    except (ImageError, LookupError, TypeError):
        pass
    shown = f" {code}" if code.isprintable() and code else ""
    message = f"{what}: {redact(answer.url)} answered {answer.status}{shown}"
    hint = "check the name and the registry's settings"
    if answer.status == 404 and not temporary:
        return NotFound(message, hint)
    return RemoteError(message, hint, temporary=temporary)
