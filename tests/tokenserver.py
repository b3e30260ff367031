"""A small token server for docker-registry's Bearer authentication (Docker registry v2 token spec).

It signs JWTs that the real registry verifies, so the whole token flow is exercised. Use it through
`tests.servers`.
"""

from __future__ import annotations

import base64
import json
import threading
import time
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass
class TokenRequest:
    """One request for a token."""

    method: str
    user: str | None
    scopes: list[str] = field(default_factory=list)
    service: str = ""


class TokenServer:
    """`with TokenServer(users={"me": "secret"}) as tokens, RegistryServer(dir, token=tokens) as registry:`

    Without `users` anybody gets what he asks for. `expires_in_s` is what the answer says; a token really
    lives `life_s` (default: the same). `fail_status` makes every answer that status. `identity_tokens` maps
    OAuth2 refresh tokens (POST) to users. `requests` lists what came in.
    """

    service = "tests-registry"
    issuer = "tests-issuer"

    def __init__(
        self,
        users: dict[str, str] | None = None,
        *,
        expires_in_s: int = 300,
        life_s: int | None = None,
        identity_tokens: dict[str, str] | None = None,
    ) -> None:
        self.users = users or {}
        self.identity_tokens = identity_tokens or {}
        self.expires_in_s = expires_in_s
        self.life_s = life_s
        self.fail_status = 0
        self.requests: list[TokenRequest] = []
        ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
        leaf = ca.issue_cert("token.invalid", key_type=trustme.KeyType.ECDSA)
        self.root_pem = ca.cert_pem.bytes()
        key = serialization.load_pem_private_key(leaf.private_key_pem.bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        certificate = x509.load_pem_x509_certificate(leaf.cert_chain_pems[0].bytes())
        self._x5c = base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()
        # Bound here, not in __enter__, so that a registry's config can name the realm.
        owner = self

        class Handler(_Handler):
            server_owner = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"http://{self.host}/token"
        self._thread: threading.Thread | None = None

    def __enter__(self) -> TokenServer:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def issue(self, user: str, scopes: list[str]) -> str:
        """A signed token that grants `scopes` ("repository:name:pull,push")."""
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":", 2)
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        now = int(time.time())
        life_s = self.expires_in_s if self.life_s is None else self.life_s
        claims = {
            "iss": self.issuer, "sub": user, "aud": self.service, "exp": now + life_s, "nbf": now - 60,
            "iat": now, "jti": uuid.uuid4().hex, "access": access,
        }  # fmt: skip
        header = {"typ": "JWT", "alg": "ES256", "x5c": [self._x5c]}
        signed = f"{_base64url(json.dumps(header).encode())}.{_base64url(json.dumps(claims).encode())}"
        r, s = utils.decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_base64url(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def issue_all(self, path: str) -> str:
        """A token for the repository in a distribution API path, with all rights."""
        parts = path.removeprefix("/v2/").split("/")
        for mark in ("blobs", "manifests", "tags", "referrers"):
            if mark in parts:
                name = "/".join(parts[: parts.index(mark)])
                return self.issue("tests", [f"repository:{name}:pull,push"])
        return self.issue("tests", [])


class _Handler(BaseHTTPRequestHandler):
    server_owner: TokenServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Requests are in TokenServer.requests, not on stderr."""

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        scopes = [s for value in query.get("scope", []) for s in value.split(" ")]
        user: str | None = None
        if header := self.headers.get("Authorization"):
            user, _, password = base64.b64decode(header.removeprefix("Basic ")).decode().partition(":")
            if self.server_owner.users.get(user) != password:
                self._reply(401, {"errors": [{"code": "UNAUTHORIZED"}]})
                return
        self._grant("GET", user, scopes, query.get("service", [""])[0])

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        user = self.server_owner.identity_tokens.get(form.get("refresh_token", [""])[0])
        if user is None:
            self._reply(401, {"errors": [{"code": "UNAUTHORIZED"}]})
            return
        self._grant("POST", user, form.get("scope", [""])[0].split(" "), form.get("service", [""])[0])

    def _grant(self, method: str, user: str | None, scopes: list[str], service: str) -> None:
        owner = self.server_owner
        owner.requests.append(TokenRequest(method, user, scopes, service))
        if owner.fail_status:
            self._reply(owner.fail_status, {"errors": []})
        elif user is None and owner.users:
            self._reply(401, {"errors": [{"code": "UNAUTHORIZED"}]})
        else:
            token = owner.issue(user or "", [s for s in scopes if s])
            key = "access_token" if method == "POST" else "token"
            self._reply(200, {key: token, "expires_in": owner.expires_in_s})

    def _reply(self, status: int, document: dict[str, object]) -> None:
        body = json.dumps(document).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
