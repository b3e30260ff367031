"""Real servers for the tests: Debian's docker-registry, nginx, a token server and a fault proxy.

    with RegistryServer(tmp_path) as registry, FaultProxy(registry) as proxy:
        digest = registry.put_image("demo", "latest", [layer_tar_gz])
        ... use f"{proxy.host}/demo:latest" ...

All listen on loopback ports the kernel chose, wait for readiness by events with a deadline, and are stopped
when the block ends, also by an exception.
"""

from __future__ import annotations

import base64
import contextlib
import getpass
import grp
import hashlib
import http.client
import json
import os
import re
import select
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import trustme

from lazyfs.core.oci.digests import Digest
from tests.faultproxy import FaultKind, FaultProxy, LoggedRequest, Rule
from tests.tokenserver import TokenServer

__all__ = [
    "FaultKind",
    "FaultProxy",
    "LoggedRequest",
    "RegistryServer",
    "Rule",
    "StaticServer",
    "TokenServer",
]

READY_DEADLINE_S = 20.0
STOP_DEADLINE_S = 10.0
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"


def sha256_digest(data: bytes) -> Digest:
    """The digest "sha256:<hex>" of `data`."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def write_tls_files(ca: trustme.CA, tmp_dir: Path, *names: str) -> tuple[Path, Path]:
    """Issue a certificate for `names` and write it to `tmp_dir`; returns (certificate chain, key)."""
    cert = ca.issue_cert(*names)
    chain, key = tmp_dir / "server.crt", tmp_dir / "server.key"
    chain.write_bytes(b"".join(blob.bytes() for blob in cert.cert_chain_pems))
    key.write_bytes(cert.private_key_pem.bytes())
    return chain, key


class RegistryServer:
    """Debian's docker-registry on an empty directory.

    `htpasswd` = (user, password) asks for Basic auth, `token` = a running TokenServer for Bearer tokens,
    `tls` = the CA that issues its certificate for 127.0.0.1 and localhost. `host` is "127.0.0.1:port".
    """

    def __init__(
        self,
        tmp_dir: Path | str,
        *,
        htpasswd: tuple[str, str] | None = None,
        token: TokenServer | None = None,
        tls: trustme.CA | None = None,
    ) -> None:
        self.dir = Path(tmp_dir) / f"registry-{os.urandom(4).hex()}"
        self.htpasswd = htpasswd
        self.token = token
        self.tls = tls
        self.host = ""
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._drain: threading.Thread | None = None

    def __enter__(self) -> RegistryServer:
        self.dir.mkdir(parents=True)
        config = self.dir / "config.yml"
        config.write_text(json.dumps(self._config()))  # JSON is YAML
        # Not the tests' environment: an inherited REGISTRY_ variable would change the config.
        environ = {"PATH": os.environ.get("PATH", ""), "HOME": str(self.dir)}
        self._process = subprocess.Popen(
            ["/usr/bin/docker-registry", "serve", str(config)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environ,
        )  # fmt: skip
        try:
            self._await_ready(self._process)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the server and wait for it. Idempotent."""
        if self._process is not None:
            _stop(self._process)
            if self._drain is not None:
                self._drain.join()
            if self._process.stderr is not None:
                self._process.stderr.close()
            self._process = None

    @property
    def blobs_dir(self) -> Path:
        """Where the registry keeps blobs: <dir>/sha256/<2 hex>/<hex>/data."""
        return self.dir / "data/docker/registry/v2/blobs"

    def _config(self) -> dict[str, object]:
        http_section: dict[str, object] = {"addr": "127.0.0.1:0", "secret": "s", "relativeurls": False}
        if self.tls is not None:
            chain, key = write_tls_files(self.tls, self.dir, "127.0.0.1", "localhost")
            http_section["tls"] = {"certificate": str(chain), "key": str(key)}
        config: dict[str, object] = {
            "version": "0.1",
            "log": {"level": "info", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.dir / "data")},
                "delete": {"enabled": True},
                "redirect": {"disable": True},
                "maintenance": {"uploadpurging": {"enabled": False}},
            },
            "http": http_section,
        }
        if self.htpasswd is not None:
            user, password = self.htpasswd
            line = subprocess.run(
                ["htpasswd", "-niBC", "4", user], input=password.encode(), stdout=subprocess.PIPE, check=True
            ).stdout
            (self.dir / "htpasswd").write_bytes(line)
            config["auth"] = {"htpasswd": {"realm": "tests", "path": str(self.dir / "htpasswd")}}
        if self.token is not None:
            bundle = self.dir / "token.crt"
            bundle.write_bytes(self.token.root_pem)
            config["auth"] = {
                "token": {
                    "realm": self.token.url,
                    "service": self.token.service,
                    "issuer": self.token.issuer,
                    "rootcertbundle": str(bundle),
                }
            }
        return config

    def _await_ready(self, process: subprocess.Popen[bytes]) -> None:
        """Read the log until the server says where it listens, then ask /v2/ once."""
        assert process.stderr is not None
        log, deadline = b"", time.monotonic() + READY_DEADLINE_S
        while (found := re.search(rb"listening on (127\.0\.0\.1:\d+)", log)) is None:
            readable, _, _ = select.select([process.stderr], [], [], max(0, deadline - time.monotonic()))
            piece = os.read(process.stderr.fileno(), 65536) if readable else b""
            if not piece:
                raise RuntimeError(f"docker-registry did not start: {log.decode(errors='replace')}")
            log += piece
        self.host = found[1].decode()
        self.url = f"{'https' if self.tls else 'http'}://{self.host}"
        stderr = process.stderr
        self._drain = threading.Thread(
            target=lambda: [None for _ in iter(lambda: stderr.read(65536), b"")], daemon=True
        )
        self._drain.start()
        status, _, _ = self.request("GET", "/v2/")
        if status != 200:
            raise RuntimeError(f"docker-registry answers {status} to /v2/")

    def request(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One request with the server's own credentials: (status, headers in lower case, body)."""
        headers = dict(headers or {})
        if self.htpasswd is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(":".join(self.htpasswd).encode()).decode()
        if self.token is not None:
            headers["Authorization"] = "Bearer " + self.token.issue_all(path)
        connection: http.client.HTTPConnection
        if self.tls is not None:
            context = ssl.create_default_context()
            self.tls.configure_trust(context)
            connection = http.client.HTTPSConnection(self.host, timeout=READY_DEADLINE_S, context=context)
        else:
            connection = http.client.HTTPConnection(self.host, timeout=READY_DEADLINE_S)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()

    def put_blob(self, repository: str, data: bytes) -> Digest:
        """Store a blob; returns its digest."""
        digest = sha256_digest(data)
        status, headers, _ = self.request("POST", f"/v2/{repository}/blobs/uploads/")
        assert status == 202, status
        path = "/" + headers["location"].split("/", 3)[3]
        path += ("&" if "?" in path else "?") + f"digest={digest}"
        status, _, answer = self.request("PUT", path, data, {"Content-Type": "application/octet-stream"})
        assert status == 201, answer
        return digest

    def put_manifest(
        self, repository: str, data: bytes, media_type: str = MANIFEST, tag: str | None = None
    ) -> Digest:
        """Store a manifest under its digest or `tag`; returns its digest."""
        digest = sha256_digest(data)
        path = f"/v2/{repository}/manifests/{tag or digest}"
        status, _, answer = self.request("PUT", path, data, {"Content-Type": media_type})
        assert status == 201, answer
        return digest

    def put_image(
        self,
        repository: str,
        tag: str,
        layers: Sequence[bytes],
        *,
        diff_ids: Sequence[str] = (),
        media_type: str = LAYER_GZIP,
        config: dict[str, object] | None = None,
    ) -> Digest:
        """Store an image of the given layer blobs; returns the manifest's digest.

        `diff_ids` defaults to the digests of the blobs (right for uncompressed layers only). `config` gives
        more keys of the image config.
        """
        document: dict[str, object] = {"architecture": "amd64", "os": "linux", "config": {}}
        document["rootfs"] = {
            "type": "layers",
            "diff_ids": list(diff_ids) or [sha256_digest(b) for b in layers],
        }
        raw_config = json.dumps(document | (config or {})).encode()
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {
                "mediaType": CONFIG,
                "digest": self.put_blob(repository, raw_config),
                "size": len(raw_config),
            },
            "layers": [
                {"mediaType": media_type, "digest": self.put_blob(repository, blob), "size": len(blob)}
                for blob in layers
            ],
        }
        return self.put_manifest(repository, json.dumps(manifest).encode(), tag=tag)


class StaticServer:
    """nginx serving the files below `directory`, with ranges. `tls` as for RegistryServer."""

    def __init__(self, directory: Path | str, tmp_dir: Path | str, *, tls: trustme.CA | None = None) -> None:
        self.directory = Path(directory)
        self.dir = Path(tmp_dir) / f"nginx-{os.urandom(4).hex()}"
        self.tls = tls
        self.host = ""
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> StaticServer:
        self.dir.mkdir(parents=True)
        # nginx takes listening sockets over from the variable NGINX (its way to replace a running binary):
        # the port is ours before nginx starts, and connections queue until it accepts.
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.host = f"127.0.0.1:{listener.getsockname()[1]}"
            self.url = f"{'https' if self.tls else 'http'}://{self.host}"
            (self.dir / "nginx.conf").write_text(self._config())
            self._process = subprocess.Popen(
                ["/usr/sbin/nginx", "-p", str(self.dir), "-c", "nginx.conf", "-e", "error.log"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=[listener.fileno()], env={"NGINX": f"{listener.fileno()};"},
            )  # fmt: skip
        try:
            context = ssl._create_unverified_context() if self.tls else None
            connection = (
                http.client.HTTPSConnection(self.host, timeout=READY_DEADLINE_S, context=context)
                if self.tls
                else http.client.HTTPConnection(self.host, timeout=READY_DEADLINE_S)
            )
            with contextlib.closing(connection):
                connection.request("GET", "/")
                connection.getresponse().read()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop nginx and wait for it. Idempotent."""
        if self._process is not None:
            _stop(self._process)
            self._process = None

    def _config(self) -> str:
        listen = f"listen {self.host}{' ssl' if self.tls else ''};"
        if self.tls is not None:
            chain, key = write_tls_files(self.tls, self.dir, "127.0.0.1", "localhost")
            listen += f" ssl_certificate {chain}; ssl_certificate_key {key};"
        temporary = "".join(
            f"{kind}_temp_path {self.dir}/t;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        # Workers as the tests' user, who alone can read their directories. (Without a master
        # process nginx 1.22 crashes on inherited sockets.)
        user = f"user {getpass.getuser()} {grp.getgrgid(os.getgid()).gr_name};" if os.geteuid() == 0 else ""
        return f"""daemon off; {user} worker_processes 1; pid {self.dir}/pid; error_log {self.dir}/error.log;
events {{ worker_connections 128; }}
http {{ access_log off; default_type application/octet-stream; {temporary}
server {{ {listen} root "{self.directory}"; }} }}
"""
