"""Authorization headers for one repository: Bearer tokens with single-flight refresh, Basic, anonymous.

Protocol: Docker's token authentication (distribution docs, spec/auth/token.md and oauth.md), which all
registries follow. A header is fetched when a server asks for it (401) and replaced shortly before it expires.
"""

from __future__ import annotations

import base64
import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import trio

from lazyfs.errors import RemoteError
from lazyfs.sources.challenges import parse_challenge
from lazyfs.sources.credentials import Credentials, find_credentials
from lazyfs.sources.http import HttpClient, Response, StreamResponse
from lazyfs.sources.urls import may_lead, redact

MAX_TOKEN_BYTES = 1 << 20  # of the token server's answer; tokens themselves are a few KiB
MAX_TOKEN_CHARS = 16 << 10  # servers refuse longer headers anyway
DEFAULT_LIFE_S = 60.0  # token.md: what a missing expires_in means
MAX_LIFE_S = 86400.0
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")  # RFC 6750 section 2.1; keeps line ends out of headers
_SCOPE = re.compile(r"[\x21-\x7e ]{1,512}")


@dataclass
class _Grant:
    """An Authorization header and when to replace it (trio clock, seconds)."""

    header: str
    renew_at_s: float


class _Challenge(NamedTuple):
    """What a 401 asks for, and who sent it."""

    scheme: str
    parameters: Mapping[str, str]
    url: str
    peer: str


class Authorizer:
    """Keeps the Authorization headers of one repository, one per set of actions ("pull", "pull,push")."""

    def __init__(
        self,
        http: HttpClient,
        registry: str,
        repository: str,
        auth_files: Sequence[str] | None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._http = http
        self._registry = registry
        self._repository = repository
        self._auth_files = auth_files
        self._environ = environ
        self._grants: dict[str, _Grant] = {}
        self._challenges: dict[str, _Challenge] = {}
        self._credentials: Credentials | None = None
        self._looked_up = False
        self._lock = trio.Lock()

    async def header(self, actions: str) -> str | None:
        """The header to send with a request now, None as long as the server has not asked for one."""
        grant = self._grants.get(actions)
        if grant is None or trio.current_time() < grant.renew_at_s:
            return grant.header if grant is not None else None
        return await self.renew(actions, grant.header, None)

    async def renew(self, actions: str, used: str | None, refusal: Response | StreamResponse | None) -> str:
        """A new header, because the registry itself refused `used` with this answer, or (None) because it expires.

        Many requests may get a 401 at once: the first fetches a token, the others get the same one. RemoteError (not
        temporary) if access is denied.
        """
        async with self._lock:
            grant = self._grants.get(actions)
            if grant is not None and grant.header != used and trio.current_time() < grant.renew_at_s:
                return grant.header
            if refusal is not None:
                scheme, parameters = parse_challenge(refusal.headers.get("WWW-Authenticate", ""))
                self._challenges[actions] = _Challenge(scheme, parameters, refusal.url, refusal.peer)
            challenge = self._challenges[actions]
            if not self._looked_up:
                self._credentials = await find_credentials(
                    self._registry, self._repository, self._auth_files, environ=self._environ
                )
                self._looked_up = True
            if challenge.scheme == "bearer":
                grant = await self._bearer(actions, challenge)
            elif challenge.scheme == "basic":
                grant = self._basic(used)
            else:
                raise RemoteError(
                    f"{self._registry} asks for a login in a way that is not supported",
                    "supported are Basic and Bearer",
                    temporary=False,
                )
            self._grants[actions] = grant
            return grant.header

    def denied(self) -> RemoteError:
        """The error for a server that goes on refusing."""
        known = "the stored login is not accepted" if self._credentials else "no login is stored for it"
        return RemoteError(
            f"{self._registry} denies access to {self._repository}: {known}",
            f"check the name, or log in: skopeo login {self._registry}",
            temporary=False,
        )

    def _basic(self, used: str | None) -> _Grant:
        login = self._credentials
        if login is None or not login.username:
            raise self.denied()
        header = "Basic " + base64.b64encode(f"{login.username}:{login.password}".encode()).decode()
        if header == used:
            raise self.denied()
        return _Grant(header, float("inf"))

    async def _bearer(self, actions: str, challenge: _Challenge) -> _Grant:
        login = self._credentials
        if login is not None and login.registry_token:
            return _Grant(_bearer_header(login.registry_token, self._registry), float("inf"))
        realm, parameters = self._realm(challenge), challenge.parameters
        scope = self._scope(parameters.get("scope", ""), actions)
        if not _SCOPE.fullmatch(scope):
            raise RemoteError(f"{self._registry} asks for a malformed scope", temporary=False)
        fields = {"service": parameters["service"]} if parameters.get("service") else {}
        headers: dict[str, str] = {}
        if login is not None and login.identity_token:
            fields |= {
                "grant_type": "refresh_token",
                "client_id": "lazyfs",
                "refresh_token": login.identity_token,
            }
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            body = urllib.parse.urlencode(fields | {"scope": scope}).encode()
            answer = await self._http.send(
                "POST", realm, headers=headers, content=body, max_body_bytes=MAX_TOKEN_BYTES, secret=True
            )
        else:
            if login is not None and login.username:
                pair = f"{login.username}:{login.password}".encode()
                headers["Authorization"] = "Basic " + base64.b64encode(pair).decode()
            # oauth.md: several scopes are several parameters in the GET form.
            query = urllib.parse.urlencode([*fields.items(), *(("scope", part) for part in scope.split(" "))])
            url = realm + ("&" if "?" in realm else "?") + query
            answer = await self._http.send("GET", url, headers=headers, max_body_bytes=MAX_TOKEN_BYTES)
        if answer.status in (400, 401, 403):
            raise self.denied()
        if answer.status != 200:
            raise RemoteError(
                f"the token server {redact(realm)} answered {answer.status}",
                "try again later",
                temporary=False,
            )
        return _parse_token(answer.body, redact(realm))

    def _scope(self, asked: str, actions: str) -> str:
        """The scope that the registry asked for, and `actions`: to the HEAD before a push it asks for "pull" only."""
        prefix = f"repository:{self._repository}:"
        if not asked or (asked.startswith(prefix) and " " not in asked):
            wanted = {*actions.split(","), *asked.removeprefix(prefix).split(",")} - {""}
            return prefix + ",".join(sorted(wanted))
        return asked

    def _realm(self, challenge: _Challenge) -> str:
        """The token server that the registry names, if credentials may be sent there. RemoteError if not."""
        realm = challenge.parameters.get("realm", "")
        if problem := may_lead(challenge.url, realm, challenge.peer):
            raise RemoteError(
                f"{self._registry} names a token server that is not allowed: {redact(realm)[:100]}: {problem}",
                "report this to the registry's operator",
                temporary=False,
            )
        return realm


def _bearer_header(token: object, who: str) -> str:
    if not isinstance(token, str) or len(token) > MAX_TOKEN_CHARS or not _TOKEN.fullmatch(token):
        raise RemoteError(f"{who} gave a malformed token", "report this to its operator", temporary=False)
    return f"Bearer {token}"


def _parse_token(raw: bytes, who: str) -> _Grant:
    try:
        document = json.loads(raw)
        if not isinstance(document, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise RemoteError(f"{who} did not answer with a token", temporary=False) from None
    life_s = document.get("expires_in")
    if isinstance(life_s, bool) or not isinstance(life_s, int | float) or not 0 < life_s <= MAX_LIFE_S:
        life_s = DEFAULT_LIFE_S
    # Renew a little early (a fifth, at most 10 s), so that it does not expire in flight. Its life is counted from now
    # by the local clock, because the server's clock may differ.
    renew_at_s = trio.current_time() + life_s - min(10.0, life_s / 5)
    return _Grant(_bearer_header(document.get("token") or document.get("access_token"), who), renew_at_s)
