"""The distribution API against Debian's docker-registry: pulling, pushing, attaching, TLS and logins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trustme

from lazyfs.core.oci import documents, referrers
from lazyfs.core.oci.documents import Descriptor
from lazyfs.errors import HostError, RemoteError
from lazyfs.sources.connections import Connections
from lazyfs.sources.http import HttpClient
from tests.conftest import ROOT
from tests.servers import FaultProxy, RegistryServer, Rule, StaticServer, TokenServer, sha256_digest
from tests.sources.repositories import BLOB, DEADLINE_S, login, open_registry

TYPE = "application/vnd.lazyfs.test.v1"
DIGEST = sha256_digest(BLOB)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A registry with one image, demo:latest, whose only layer is BLOB."""
    with RegistryServer(tmp_path_factory.mktemp("registry")) as running:
        running.put_image("demo", "latest", [BLOB])
        yield running


async def test_attach_to_a_registry_that_tracks_subjects(server: RegistryServer, tmp_path: Path) -> None:
    """A referrers API is used where there is one: listed entries of the wanted type come back."""
    subject = sha256_digest(b"subject")
    wanted = Descriptor(documents.MEDIA_MANIFEST, sha256_digest(b"a"), 1, artifact_type=TYPE)
    other = Descriptor(documents.MEDIA_MANIFEST, sha256_digest(b"b"), 1, artifact_type="application/x")
    # nginx plays the API: its files are what such a registry would answer.
    place = tmp_path / "www/v2/demo/referrers" / subject
    place.parent.mkdir(parents=True)
    place.write_bytes(referrers.add_to_index(referrers.add_to_index(None, wanted), other))
    with StaticServer(tmp_path / "www", tmp_path) as web:
        async with open_registry(web.host) as registry:
            assert await registry.referrers(subject, TYPE) == [wanted]


async def test_what_does_not_fit_into_one_answer_is_asked_for_by_type(server: RegistryServer) -> None:
    """Much is attached: the registry is asked to leave out what is not wanted, so that ours is not pages away."""
    subject = sha256_digest(b"subject")
    kinds = (TYPE, "a/b", "c/d")
    ours = [Descriptor(documents.MEDIA_MANIFEST, sha256_digest(kind.encode()), 1, artifact_type=kind) for kind in kinds]
    index = referrers.add_to_index(referrers.add_to_index(None, ours[0]), ours[1])
    headers = {"Content-Type": documents.MEDIA_INDEX}
    link = {"Link": f'</v2/demo/referrers/{subject}?page=2>; rel="next"'}
    first = Rule("status", "/referrers/", status=200, headers=headers | link, body=index)
    following = Rule("status", "/referrers/", status=200, headers=headers, body=index, times=None)
    with FaultProxy(server, first, following) as proxy:
        async with open_registry(proxy.host) as registry:
            assert await registry.referrers(subject, *kinds) == ours[:2]
        asked = [one.path.partition("?")[2] for one in proxy.matching("GET", "/referrers/")]
        assert asked == ["", *(f"artifactType={kind.replace('/', '%2F')}" for kind in kinds)]


async def test_detach_from_a_registry_that_tracks_subjects(server: RegistryServer) -> None:
    """The manifest is deleted if the registry lists it, and a registry that forbids that is no failure."""
    subject = Descriptor(documents.MEDIA_MANIFEST, sha256_digest(b"subject"), 7)
    ours = Descriptor(documents.MEDIA_MANIFEST, sha256_digest(b"ours"), 1, artifact_type=TYPE)
    headers = {"Content-Type": documents.MEDIA_INDEX}
    listing = Rule(
        "status", "/referrers/", status=200, headers=headers, body=referrers.add_to_index(None, ours), times=None
    )
    for status in (202, 403, 404, 405):
        with FaultProxy(server, listing, Rule("status", "/manifests/", "DELETE", status=status, times=None)) as proxy:
            async with open_registry(proxy.host) as registry:
                await registry.detach(subject, ours)
                await registry.detach(subject, ours._replace(digest=sha256_digest(b"other")))
            assert [one.path for one in proxy.matching("DELETE")] == [f"/v2/demo/manifests/{ours.digest}"]


async def test_attaching_while_another_entry_goes(server: RegistryServer) -> None:
    """The list that was read is out of date when it is written, and the registry refuses it: it is read again."""
    subject = Descriptor(documents.MEDIA_MANIFEST, sha256_digest(b"list"), 4)
    manifest = referrers.build_artifact(TYPE, [], subject, {})
    async with open_registry(server.host) as registry:
        await registry.push_blob(b"{}")
    gone = Descriptor(documents.MEDIA_MANIFEST, sha256_digest(b"gone"), 1, artifact_type=TYPE)
    headers = {"Content-Type": documents.MEDIA_INDEX}
    body = referrers.add_to_index(None, gone)
    old = Rule("status", "/manifests/sha256-", "GET", status=200, headers=headers, body=body)
    with FaultProxy(server, old) as proxy:
        async with open_registry(proxy.host) as registry:
            attached = await registry.attach(subject, manifest)
            assert [one.digest for one in await registry.referrers(subject.digest, TYPE)] == [attached]
        old.times = None
        async with open_registry(proxy.host) as registry:
            with pytest.raises(RemoteError, match="MANIFEST"):
                await registry.attach(subject, manifest)


async def test_basic_auth(tmp_path: Path) -> None:
    """A login from an auth file is sent only after the registry asked; a wrong or missing one is told."""
    with RegistryServer(tmp_path, htpasswd=("me", "pass:word")) as server, FaultProxy(server) as proxy:
        server.put_image("demo", "latest", [BLOB])
        files = login(tmp_path, proxy.host, "me", "pass:word")
        async with open_registry(proxy.host, auth_files=files) as registry:
            assert await registry.blob_range(DIGEST, 3, 9) == BLOB[3:9]
            await registry.push_blob(b"pushed")
            assert "authorization" not in proxy.requests[0].headers
        async with open_registry(proxy.host) as registry:
            with pytest.raises(RemoteError, match="no login is stored") as caught:
                await registry.manifest("latest")
            assert not caught.value.temporary
        wrong = login(tmp_path, proxy.host, "me", "SECRET")
        async with open_registry(proxy.host, auth_files=wrong) as registry:
            with pytest.raises(RemoteError, match="not accepted") as caught:
                await registry.blob_range(DIGEST, 3, 9)
            assert "SECRET" not in str(caught.value)


async def test_bearer_single_flight(tmp_path: Path) -> None:
    """Twenty requests at once fetch one token; it is used again, and renewed before it expires."""
    with (
        TokenServer({"me": "secret"}, expires_in_s=300) as tokens,
        RegistryServer(tmp_path, token=tokens) as server,
    ):
        server.put_image("demo", "latest", [BLOB])
        files = login(tmp_path, server.host, "me", "secret")
        async with open_registry(server.host, auth_files=files) as registry:
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(registry.blob_range, DIGEST, 0, 10)
            assert [request.user for request in tokens.requests] == ["me"]
            assert tokens.requests[0].scopes == ["repository:demo:pull"]
            await registry.push_blob(b"x")
            assert len(tokens.requests) == 2 and set(
                tokens.requests[1].scopes[0].split(":")[2].split(",")
            ) == {
                "pull",
                "push",
            }
            registry._api._authorizer._grants["pull"].renew_at_s = trio.current_time()
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(registry.blob_range, DIGEST, 0, 10)
            assert len(tokens.requests) == 3


async def test_bearer_expired_token(tmp_path: Path) -> None:
    """A token that dies earlier than it said is replaced after the 401."""
    # docker-registry allows 60 s of leeway, so the first token is long dead and the next ones live.
    with TokenServer() as tokens, RegistryServer(tmp_path, token=tokens) as server:
        tokens.life_s = -100
        async with open_registry(server.host) as registry:
            with pytest.raises(RemoteError, match="denies access"):
                await registry.manifest("latest")
            assert len(tokens.requests) == 2
            tokens.life_s = None
            server.put_image("demo", "latest", [BLOB])
            assert await registry.blob_range(DIGEST, 0, 10) == BLOB[:10]
            assert (await registry.manifest("latest"))[1] == documents.MEDIA_MANIFEST
            assert len(tokens.requests) == 3


async def test_bearer_identity_token_and_denial(tmp_path: Path) -> None:
    """An identity token goes by POST; a token server that refuses means access denied."""
    with (
        TokenServer({"me": "x"}, identity_tokens={"REFRESH": "me"}) as tokens,
        RegistryServer(tmp_path, token=tokens) as server,
    ):
        server.put_image("demo", "latest", [BLOB])
        path = tmp_path / "identity.json"
        path.write_text(json.dumps({"auths": {server.host: {"identitytoken": "REFRESH"}}}))
        async with open_registry(server.host, auth_files=[str(path)]) as registry:
            assert await registry.blob_range(DIGEST, 0, 10) == BLOB[:10]
            assert tokens.requests[0].method == "POST"
        async with open_registry(server.host) as registry:
            with pytest.raises(RemoteError, match="denies access"):
                await registry.manifest("latest")


@pytest.mark.parametrize(
    "realm",
    ["", "ftp://x/t", "http://user@127.0.0.1:1/t", "http://registry.example/t", "http://[bad/t", "/token"],
)
async def test_bad_realms(server: RegistryServer, realm: str) -> None:
    """Credentials go to no odd place. (Plain http beyond this host is refused by the HTTP client.)"""
    rule = Rule("status", status=401, times=None, headers={"WWW-Authenticate": f'Bearer realm="{realm}"'})
    with FaultProxy(server, rule) as proxy:
        async with open_registry(proxy.host) as registry:
            with pytest.raises(RemoteError) as caught:
                await registry.manifest("latest")
            assert not caught.value.temporary and registry.counters.retries == 0


async def test_nothing_is_gathered_by_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TLS comes by records of 16 KiB, however long one waits: a pause after each would be a limit of 8 MB/s."""
    ca = trustme.CA()
    ca_file = tmp_path / "ca.crt"
    ca_file.write_bytes(ca.cert_pem.bytes())
    data = os.urandom(1 << 20)
    monkeypatch.setattr("lazyfs.sources.http.GATHER_S", 3600.0)
    with RegistryServer(tmp_path, tls=ca) as server, trio.fail_after(30):
        server.put_image("demo", "latest", [data])
        async with open_registry(server.host, ca_files=[str(ca_file)]) as registry:
            assert await registry.blob_range(sha256_digest(data), 0, len(data)) == data


async def test_tls(tmp_path: Path) -> None:
    """The CA can be given, or lie in certs.d; without it the certificate is refused; insecure skips."""
    ca = trustme.CA()
    ca_file = tmp_path / "ca.crt"
    ca_file.write_bytes(ca.cert_pem.bytes())
    with RegistryServer(tmp_path, tls=ca) as server:
        server.put_image("demo", "latest", [BLOB])
        certs = tmp_path / "certs.d" / server.host
        certs.mkdir(parents=True)
        (certs / "own.crt").write_bytes(ca.cert_pem.bytes())
        async with open_registry(server.host, ca_files=[str(ca_file)]) as registry:
            assert await registry.blob_range(DIGEST, 0, 10) == BLOB[:10]
        async with open_registry(server.host, certs_dirs=[str(tmp_path / "certs.d")]) as registry:
            assert await registry.blob_range(DIGEST, 0, 10) == BLOB[:10]
        async with open_registry(server.host, insecure=True) as registry:
            assert await registry.blob_range(DIGEST, 0, 10) == BLOB[:10]
        async with open_registry(server.host) as registry:
            with pytest.raises(RemoteError, match="certificate is not trusted") as caught:
                await registry.manifest("latest")
            assert "certs.d" in caught.value.hint and registry.counters.retries == 0
        (tmp_path / "bad.crt").write_text("no PEM")
        async with open_registry(server.host, ca_files=[str(tmp_path / "bad.crt")]) as registry:
            with pytest.raises(HostError, match=r"bad\.crt"):
                await registry.manifest("latest")


async def test_no_plain_http_beyond_this_host() -> None:
    """http to another host needs the option insecure; nothing is sent."""
    client = HttpClient(Connections())
    with trio.fail_after(DEADLINE_S), pytest.raises(RemoteError, match="plain http"):
        await client.send("GET", "http://192.0.2.1/v2/?token=SECRET")
    await client.aclose()


def test_preloading_leaves_nothing_to_import(tmp_path: Path) -> None:
    """A daemon at rest has imported all that its first mount from a registry will need."""
    code = """
import sys
import trio
from lazyfs.core.oci.reference import parse_reference
from lazyfs.errors import NotFound
from lazyfs.sources import source
from lazyfs.sources.access import Access

source.preload()
before = set(sys.modules)

async def ask():
    opened = source.open_source(parse_reference(sys.argv[1]), Access())
    print((await opened.manifest("latest"))[1])
    await opened.aclose()

try:
    trio.run(ask)
except NotFound as error:
    print(error.code)
print(*sorted(set(sys.modules) - before))
"""
    with RegistryServer(tmp_path) as server:
        words = [sys.executable, "-c", code, f"{server.host}/none:latest"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    code, loaded = done.stdout.split("\n")[:2]
    assert code == "not_found"
    assert not [name for name in loaded.split() if name.split(".")[0] in ("lazyfs", "httpx", "httpcore", "h11", "trio")]
