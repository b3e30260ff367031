"""Where a server may lead us: the rule by a table, then one of each kind against servers that try."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from lazyfs.core.oci import documents, referrers
from lazyfs.core.oci.documents import Descriptor
from lazyfs.errors import RemoteError
from lazyfs.sources.connections import Connections
from lazyfs.sources.http import HttpClient
from lazyfs.sources.urls import led_to, may_lead, origin, redact, retry_after_s
from tests.servers import FaultProxy, RegistryServer, Rule, TokenServer, sha256_digest
from tests.sources.repositories import DEADLINE_S, FAST, login, open_registry

OUTSIDE = "https://registry.example"
THIS_MACHINE = [
    *("localhost", "LOCALHOST", "localhost.", "a.localhost", "a.b.localhost.", "ip6-localhost"),
    *("127.0.0.1", "127.8.9.10", "127.0.0.1.", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1"),
    *("017700000001", "0177.0.0.1", "0.0.0.0", "0", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]"),
    *("[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"),
]
LINK = ["169.254.169.254", "2852039166", "0xa9fea9fe", "169.254.43518", "[fe80::1]", "[::ffff:169.254.1.1]"]
PRIVATE = ["10.0.0.1", "10.1", "172.16.5.4", "192.168.1.1", "100.64.0.1", "[fd00::1]", "0xc0a80101", "[::ffff:a01:101]"]
PUBLIC = ["cdn.example", "8.8.8.8", "[2606:4700::1]", "localhost.example", "10.example", "127.0.0.1.example"]


@pytest.mark.parametrize("host", THIS_MACHINE + LINK)
@pytest.mark.parametrize("start", [OUTSIDE, "https://8.8.8.8", "https://10.1.2.3:5000", "https://[fd00::2]"])
def test_no_server_leads_further_in(start: str, host: str) -> None:
    assert may_lead(f"{start}/v2/", f"https://{host}/x")
    assert may_lead(f"{start}/v2/", f"https://{host}:5000/x")


@pytest.mark.parametrize("host", PRIVATE)
def test_private_networks(host: str) -> None:
    """Private leads to private. Of a name it depends on the address that answered, if that is known."""
    url = f"https://{host}/x"
    assert may_lead("https://8.8.8.8/", url) and may_lead(OUTSIDE, url, "8.8.8.8")
    assert may_lead("https://10.9.9.9/", url) is None and may_lead(OUTSIDE, url, "10.9.9.9") is None
    assert may_lead("https://127.0.0.1/", url) is None and may_lead(OUTSIDE, url, "::1") is None
    assert may_lead(OUTSIDE, url) is None  # who knows


@pytest.mark.parametrize("host", THIS_MACHINE + LINK + PRIVATE + PUBLIC)
def test_a_server_here_leads_anywhere(host: str) -> None:
    for start in ("http://localhost:5000/v2/", "http://127.0.0.1:5000/v2/", "http://[::1]:5000/"):
        assert may_lead(start, f"http://{host}/x") is None
    assert may_lead("http://registry.test:5000/", f"http://{host}/x", "127.0.0.1") is None


@pytest.mark.parametrize("host", PUBLIC)
def test_out_is_free(host: str) -> None:
    for start in (OUTSIDE, "https://8.8.8.8", "https://10.0.0.1", "https://169.254.1.1"):
        assert may_lead(start, f"https://{host}:8443/x?y=z") is None


@pytest.mark.parametrize("host", ["registry.example", "10.0.0.1", "169.254.1.1"])
def test_to_itself(host: str) -> None:
    assert may_lead(f"https://{host}:5000/v2/", f"https://{host}/x", "8.8.8.8") is None


@pytest.mark.parametrize(
    ("url", "why"),
    [
        *((url, "web address") for url in ("", "/token", "ftp://x/", "file:///etc/passwd", "http://", "https://[/")),
        *((url, "user name") for url in ("https://me@cdn.example/", "https://me:pw@cdn.example/", "https://@b/")),
        ("https://a@127.0.0.1@cdn.example/", "user name"),
        ("https://cdn.example/#x", "fragment"),
        *((url, "malformed") for url in ("https://cdn.example\\@127.0.0.1/", "https://b/a b", "https://\u217cocalhost/")),
        *((url, "malformed") for url in ("https://%31%32%37.0.0.1/", "https://[fe80::1%25eth0]/", "https://a\tb/")),
        ("http://cdn.example/", "encrypted"),
        ("http://registry.example/", "encrypted"),
    ],
)  # fmt: skip
def test_what_is_no_good_url(url: str, why: str) -> None:
    assert why in (may_lead(OUTSIDE, url) or "")


def test_locations() -> None:
    """Relative ones; a proxy that ends TLS without telling the server behind it."""
    start = "https://r.example:5000/v2/a/blobs/uploads/"
    assert led_to(start, "/v2/a/x?_state=1#f") == "https://r.example:5000/v2/a/x?_state=1"
    assert led_to(start, "x") == f"{start}x" and led_to(start, "//r.example/x") == "https://r.example/x"
    assert led_to(start, "http://r.example:5000/x?y") == "https://r.example:5000/x?y"
    assert led_to("https://r.example/a", "http://r.example/x") == "https://r.example/x"
    assert led_to("https://r.example:443/a", "http://R.example:80/x") == "https://r.example:443/x"
    assert led_to("http://r.example/a", "http://r.example/x") == "http://r.example/x"
    for bad in ("http://r.example/x", "http://r.example:5001/x", "http://other.example:5000/x", "http://[x/", "\\"):
        with pytest.raises(RemoteError, match="not allowed") as caught:
            led_to(start, bad)
        assert not caught.value.temporary
    with pytest.raises(RemoteError, match="encrypted"):
        led_to("https://r.example/x", "http://r.example/x")  # by https it would only lead here again


def test_small_parsers() -> None:
    """Retry-After, origins and redaction."""
    assert retry_after_s("7") == 7 and retry_after_s(None) is None and retry_after_s("soon") is None
    past = retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT")
    assert past == 0
    assert origin("https://Host/x") == ("https", "host", 443) and origin("http://h:8/") == ("http", "h", 8)
    assert redact("https://user:pw@host:1/a?sig=SECRET#f") == "https://host:1/a"
    for bad in ("", "x", "ftp://a", "http://", "http://h:99999/", "http://[/"):
        with pytest.raises(RemoteError):
            origin(bad)


# -- servers that try ------------------------------------------------------------------------------------

REMOTE = "registry.invalid"  # a host elsewhere, as far as we know: a proxy answers for it


@pytest.fixture
def elsewhere(registry: RegistryServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """What stands in for REMOTE."""
    with FaultProxy(registry) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        yield proxy


@pytest.fixture
def victim(registry: RegistryServer) -> Iterator[FaultProxy]:
    """A service on this machine; it must never be asked."""
    with FaultProxy(registry) as proxy:
        yield proxy
        assert proxy.requests == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "[::ffff:127.0.0.1]"])
async def test_redirects_into_this_host(elsewhere: FaultProxy, victim: FaultProxy, host: str) -> None:
    headers = {"Location": f"http://{host}:{victim.host.rpartition(':')[2]}/x"}
    elsewhere.rules = [Rule("status", status=307, times=None, headers=headers)]
    client = HttpClient(Connections(insecure=True), retry=FAST)
    with trio.fail_after(DEADLINE_S), pytest.raises(RemoteError, match="redirected to"):
        await client.send("GET", f"http://{REMOTE}/v2/")
    assert elsewhere.count() == 1
    await client.aclose()


async def test_upload_locations_into_this_host(elsewhere: FaultProxy, victim: FaultProxy) -> None:
    """An upload goes on where the registry says, but not to a service of this machine."""
    async with open_registry(REMOTE, "led", insecure=True) as registry:
        for location in (f"{victim.url}/v2/led/blobs/uploads/1?_state=x", "http://169.254.169.254/", "http://[x/"):
            elsewhere.rules = [Rule("status", method="POST", status=202, headers={"Location": location})]
            with pytest.raises(RemoteError, match="not allowed"):
                await registry.push_blob(location.encode())
        assert elsewhere.count("PUT") == 0
        elsewhere.rules = []
        assert await registry.push_blob(b"data") == sha256_digest(b"data")


async def test_token_servers_on_this_host(elsewhere: FaultProxy, victim: FaultProxy) -> None:
    """Neither named by the registry nor by whom it redirects to."""
    challenge = {"WWW-Authenticate": f'Bearer realm="{victim.url}/token"'}
    async with open_registry(REMOTE, insecure=True) as registry:
        elsewhere.rules = [Rule("status", status=401, times=None, headers=challenge)]
        with pytest.raises(RemoteError, match="token server that is not allowed") as caught:
            await registry.manifest("latest")
        assert not caught.value.temporary


async def test_a_login_is_for_its_registry(registry: RegistryServer, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whom the registry redirects to may ask for a login, but gets none; nor whom the token server redirects to."""
    base = tmp_path_factory.mktemp("login")
    with TokenServer({"me": "x"}, identity_tokens={"REFRESH": "me"}) as tokens, FaultProxy(registry) as store:
        challenge = {"WWW-Authenticate": f'Bearer realm="{tokens.url}"'}
        store.rules = [Rule("status", status=401, times=None, headers=challenge)]
        with FaultProxy(registry, Rule("redirect", path="/manifests/", times=None, location=store.url)) as front:
            async with open_registry(front.host, auth_files=login(base, front.host, "me", "x")) as repository:
                with pytest.raises(RemoteError, match="denies access"):
                    await repository.manifest("latest")
        assert tokens.requests == [] and store.count() == 1
        (base / "identity.json").write_text(f'{{"auths": {{"{store.host}": {{"identitytoken": "REFRESH"}}}}}}')
        with FaultProxy(registry, Rule("redirect", times=None, location=tokens.url)) as lying:
            challenge["WWW-Authenticate"] = f'Bearer realm="{lying.url}/token"'
            async with open_registry(store.host, auth_files=[str(base / "identity.json")]) as repository:
                with pytest.raises(RemoteError, match="redirected with a login"):
                    await repository.manifest("latest")
        assert tokens.requests == []


async def test_pages_of_referrers_elsewhere(elsewhere: FaultProxy, victim: FaultProxy) -> None:
    """What else refers to an image is asked of its repository only."""
    found = Descriptor(documents.MEDIA_MANIFEST, sha256_digest(b"x"), 1, artifact_type="a/b")
    page = Rule("status", path="/referrers/", status=200, body=referrers.add_to_index(None, found), times=None)
    elsewhere.rules = [page]
    async with open_registry(REMOTE, insecure=True) as registry:
        for place in (f"{victim.url}/v2/demo/referrers/x", "/v2/other/referrers/x", "http://[x/"):
            page.headers = {"Content-Type": documents.MEDIA_INDEX, "Link": f'<{place}>; rel="next"'}
            assert [one.digest for one in await registry.referrers(sha256_digest(b"i"), "a/b")] in ([found.digest], [])
        assert elsewhere.count("GET", "/other/") == 0
