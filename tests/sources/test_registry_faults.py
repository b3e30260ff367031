"""What registries and networks do wrong, in front of the real registry: the right bytes or a clear error."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import trio

from lazyfs.errors import ImageError, RemoteError
from lazyfs.sources import blobs
from lazyfs.sources.connections import REQUESTS_AT_ONCE, Connections
from lazyfs.sources.failures import RetryPolicy
from lazyfs.sources.http import HttpClient
from tests.servers import FaultProxy, RegistryServer, Rule, sha256_digest
from tests.sources.repositories import BLOB, DEADLINE_S, FAST, open_registry, read_stream

DIGEST = sha256_digest(BLOB)
BLOBS = "/blobs/sha256"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A registry with one image, demo:latest, whose only layer is BLOB."""
    with RegistryServer(tmp_path_factory.mktemp("registry")) as running:
        running.put_image("demo", "latest", [BLOB])
        yield running


@pytest.fixture
def proxy(server: RegistryServer) -> Iterator[FaultProxy]:
    """The fault proxy in front of it."""
    with FaultProxy(server) as running:
        yield running


TRANSIENT = [
    Rule("status", status=500), Rule("status", status=502), Rule("status", status=503, times=4),
    Rule("status", status=429, headers={"Retry-After": "0"}),
    Rule("status", status=503, headers={"Retry-After": "x"}),
    Rule("reset", times=3), Rule("reset", after_bytes=100), Rule("reset", after_bytes=0),
    Rule("truncate", after_bytes=100), Rule("truncate", after_bytes=0, times=4),
    Rule("content_range", headers={"Content-Range": "bytes 0-99999/3000000"}),
    Rule("content_range", headers={"Content-Range": "rubbish"}),
]  # fmt: skip


@pytest.mark.parametrize("rule", TRANSIENT, ids=lambda rule: f"{rule.fault}-{rule.status}-{rule.after_bytes}")
async def test_transient_faults(proxy: FaultProxy, rule: Rule) -> None:
    """A fault that passes within five tries is not seen by the caller."""
    rule.path, rule.hits = BLOBS, 0
    async with open_registry(proxy.host) as registry:
        proxy.rules = [rule]
        assert await registry.blob_range(DIGEST, 1000, 200_000) == BLOB[1000:200_000]
        assert rule.hits == rule.times and registry.counters.retries == rule.times
        assert proxy.count("GET", BLOBS) == rule.hits + 1


@pytest.mark.parametrize("rule", TRANSIENT, ids=lambda rule: f"{rule.fault}-{rule.status}-{rule.after_bytes}")
async def test_what_is_taken_as_it_comes_comes_once(proxy: FaultProxy, rule: Rule) -> None:
    """Over any number of attempts, each byte is given once, in order; nothing is returned."""
    rule.path, rule.hits = BLOBS, 0
    taken = bytearray()

    async def take(piece: bytes) -> None:
        assert piece
        taken.extend(piece)

    async with open_registry(proxy.host) as registry:
        proxy.rules = [rule]
        assert await registry.blob_range(DIGEST, 1000, 200_000, take) == b""
        assert bytes(taken) == BLOB[1000:200_000] and rule.hits == rule.times


@pytest.mark.parametrize("rule", [Rule("status", status=503), Rule("reset"), Rule("truncate", after_bytes=9)])
async def test_lasting_faults(proxy: FaultProxy, rule: Rule) -> None:
    """After five tries: who, what, how often, and what to do."""
    rule.times = None
    async with open_registry(proxy.host) as registry:
        await registry.manifest("latest")  # connects
        proxy.rules = [rule]
        with pytest.raises(RemoteError) as caught:
            await registry.blob_range(DIGEST, 0, 100)
        assert rule.hits == 5
        assert caught.value.temporary and caught.value.hint
        assert proxy.host in caught.value.message and "5 attempts" in caught.value.message
        assert ("answered 503" in caught.value.message) == (rule.fault == "status")


async def test_server_that_is_gone(server: RegistryServer) -> None:
    """A closed port is told as such."""
    with FaultProxy(server) as proxy:
        host = proxy.host
    async with open_registry(host) as registry:
        with pytest.raises(RemoteError, match="connection refused"):
            await registry.manifest("latest")


async def test_restarted_server(proxy: FaultProxy) -> None:
    """Kept connections that died meanwhile cost a retry, not an error."""
    async with open_registry(proxy.host) as registry:
        assert await registry.blob_range(DIGEST, 0, 10) == BLOB[:10]
        proxy.break_connections()
        assert await registry.blob_range(DIGEST, 10, 20) == BLOB[10:20]


async def test_deadline_ends_a_stall(proxy: FaultProxy) -> None:
    """A server that stops in the middle: the caller's deadline holds, and the client is usable afterwards."""
    async with open_registry(proxy.host) as registry:
        await registry.manifest("latest")  # connects
        proxy.rules = [Rule("stall", path=BLOBS, after_bytes=50)]
        with trio.move_on_after(0.2) as scope:
            await registry.blob_range(DIGEST, 0, 100_000)
        assert scope.cancelled_caught
        assert await registry.blob_range(DIGEST, 0, 100_000) == BLOB[:100_000]


async def test_read_timeout(proxy: FaultProxy) -> None:
    """Without a deadline of the caller, silence ends an attempt, and the next one may succeed."""
    async with open_registry(proxy.host, patience_s=0.2) as registry:
        await registry.manifest("latest")  # connects
        proxy.rules = [Rule("stall", path=BLOBS), Rule("stall", path=BLOBS, after_bytes=9)]
        assert await registry.blob_range(DIGEST, 0, 1000) == BLOB[:1000]
        assert registry.counters.retries == 2


async def test_no_waiting_beyond_the_deadline(proxy: FaultProxy) -> None:
    """When the server wants more patience than the caller has, the error comes now, with the reason."""
    async with open_registry(proxy.host) as registry:
        await registry.manifest("latest")  # connects
        for seconds in ("3", "86400"):
            proxy.rules = [Rule("status", status=429, headers={"Retry-After": seconds}, times=None)]
            with trio.fail_after(2), pytest.raises(RemoteError, match="answered 429") as caught:
                await registry.blob_range(DIGEST, 0, 10)
            assert caught.value.temporary and proxy.rules[0].hits == 1


@pytest.mark.parametrize("times", [1, 3])
async def test_stream_resumes(proxy: FaultProxy, times: int) -> None:
    """A cut stream goes on by range where it stopped: no byte twice, none missing."""
    async with open_registry(proxy.host) as registry:
        proxy.rules = [Rule("reset", path=BLOBS, after_bytes=700_000, times=times)]
        assert await read_stream(registry, DIGEST, len(BLOB)) == BLOB
        asked = [request.range for request in proxy.matching("GET", BLOBS)]
        assert len(asked) == times + 1 and asked[0] is None
        starts = [int(text.removeprefix("bytes=").split("-")[0]) for text in asked[1:] if text]
        assert len(starts) == times and starts == sorted(starts) and starts[0] > 0


async def test_a_range_that_is_taken_as_it_comes_goes_on_where_it_broke(proxy: FaultProxy) -> None:
    pieces: list[bytes] = []

    async def take(piece: bytes) -> None:
        pieces.append(piece)

    async with open_registry(proxy.host) as registry:
        proxy.rules = [Rule("truncate", path=BLOBS, after_bytes=at) for at in (300_000, 200_000)]
        assert await registry.blob_range(DIGEST, 1000, 900_000, take) == b""
    assert b"".join(pieces) == BLOB[1000:900_000]
    asked = [request.range for request in proxy.matching("GET", BLOBS)]
    assert asked == ["bytes=1000-899999", "bytes=301000-899999", "bytes=501000-899999"]


async def test_what_takes_long_goes_beside_other_requests(proxy: FaultProxy) -> None:
    async def take(piece: bytes) -> None:
        pass

    async with open_registry(proxy.host) as registry, trio.open_nursery() as nursery:
        proxy.rules = [Rule("stall", path=BLOBS, times=2 * REQUESTS_AT_ONCE)]
        for _ in range(2 * REQUESTS_AT_ONCE):
            nursery.start_soon(functools.partial(registry.blob_range, DIGEST, 0, 500_000, take, bulk=True))
        with trio.fail_after(DEADLINE_S):
            while proxy.rules[0].hits < REQUESTS_AT_ONCE:  # noqa: ASYNC110 -- the proxy is a thread
                await trio.sleep(0.01)
            proxy.rules.clear()
            assert await registry.blob_range(DIGEST, 5, 500) == BLOB[5:500]
        nursery.cancel_scope.cancel()


async def test_stream_resumes_without_ranges(proxy: FaultProxy) -> None:
    """A server that ignores ranges sends it all again; what is known is read over."""
    async with open_registry(proxy.host) as registry:
        proxy.rules = [
            Rule("truncate", path=BLOBS, after_bytes=900_000),
            Rule("whole", path=BLOBS),
        ]
        assert await read_stream(registry, DIGEST, len(BLOB)) == BLOB
        assert proxy.count("GET", BLOBS) == 2


async def test_stream_that_never_progresses(proxy: FaultProxy) -> None:
    """Five breaks without progress end it."""
    async with open_registry(proxy.host) as registry:
        proxy.rules = [Rule("truncate", path=BLOBS, after_bytes=10, times=None)]
        with pytest.raises(RemoteError):
            await read_stream(registry, DIGEST, len(BLOB))
        assert proxy.rules[0].hits == 5


async def test_flipped_byte(proxy: FaultProxy) -> None:
    """A whole blob is fetched once more; a stream has passed the byte on, and says so at its end."""
    async with open_registry(proxy.host) as registry:
        proxy.rules = [Rule("flip", path=BLOBS, after_bytes=1_500_000)]
        assert await registry.blob(DIGEST, len(BLOB)) == BLOB
        proxy.rules = [Rule("flip", path=BLOBS, after_bytes=1_500_000)]
        with pytest.raises(ImageError, match="digest"):
            await read_stream(registry, DIGEST, len(BLOB))


async def test_streams_do_not_starve_ranges(proxy: FaultProxy) -> None:
    """Whoever holds all streams can still fetch ranges."""
    async with open_registry(proxy.host) as registry, trio.open_nursery() as nursery:
        held, done = [], trio.Event()

        async def hold() -> None:
            async with registry.blob_stream(DIGEST, len(BLOB)) as pieces:
                async for _ in pieces:
                    held.append(1)
                    break
                await done.wait()

        for _ in range(8):
            nursery.start_soon(hold)
        while len(held) < 8:
            await registry.blob_range(DIGEST, 0, 10)
        assert await registry.blob_range(DIGEST, 5, 10) == BLOB[5:10]
        done.set()


async def test_server_without_ranges(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 instead of 206: sliced while the blob is small, a clear error when it is not."""
    async with open_registry(proxy.host) as registry:
        proxy.rules = [Rule("whole", path=BLOBS, times=None)]
        assert await registry.blob_range(DIGEST, 7, 5000) == BLOB[7:5000]
        monkeypatch.setattr(blobs, "MAX_WHOLE_BLOB_BYTES", len(BLOB) - 1)
        received = registry.counters.bytes_fetched
        with pytest.raises(RemoteError, match="ignores ranges") as caught:
            await registry.blob_range(DIGEST, 7, 5000)
        assert not caught.value.temporary and registry.counters.bytes_fetched == received


async def test_redirect_to_a_blob_store(server: RegistryServer, proxy: FaultProxy) -> None:
    """Followed once, then asked directly; resolved again when refused; no credentials travel along."""
    with FaultProxy(server) as store:
        async with open_registry(proxy.host) as registry:
            await registry.manifest("latest")  # connects
            redirect = Rule("redirect", path=BLOBS, times=None, location=store.url)
            proxy.rules = [redirect]
            for start in range(3):
                assert await registry.blob_range(DIGEST, start, 10) == BLOB[start:10]
            assert (redirect.hits, store.count("GET", BLOBS)) == (1, 3)
            store.rules = [Rule("status", status=403, path=BLOBS)]
            assert await registry.blob_range(DIGEST, 3, 10) == BLOB[3:10]
            assert (redirect.hits, store.count("GET", BLOBS)) == (2, 5)
            assert await read_stream(registry, DIGEST, len(BLOB)) == BLOB
            assert redirect.hits == 2


async def test_authorization_stays_with_its_origin(server: RegistryServer, proxy: FaultProxy) -> None:
    """Another port is another origin; the same origin keeps the header."""
    client = HttpClient(Connections(), retry=FAST)
    headers = {"Authorization": "Bearer SECRET", "X-Other": "kept"}
    with FaultProxy(server) as store, trio.fail_after(DEADLINE_S):
        proxy.rules = [Rule("redirect", path="/v2/$", location=store.url)]
        answer = await client.send("GET", f"{proxy.url}/v2/", headers=headers)
        assert answer.url.startswith(store.url)
        assert (
            "authorization" in proxy.requests[0].headers and "authorization" not in store.requests[0].headers
        )
        assert store.requests[0].headers["x-other"] == "kept"
        proxy.clear()
        proxy.rules = [Rule("redirect", location=proxy.url)]
        await client.send("GET", f"{proxy.url}/v2/", headers=headers)
        assert all("authorization" in request.headers for request in proxy.requests)
        await client.aclose()


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("LOOP", "redirects"),
        ("ftp://x/y?SECRET", "not a web address"),
        ("http://[x/?SECRET", "."),
        ("http://192.0.2.7/?SECRET=", "plain http"),
    ],
)
async def test_bad_redirects(proxy: FaultProxy, location: str, why: str) -> None:
    """Endless, malformed and insecure redirects end at once; query strings stay out of the message."""
    target = proxy.url if location == "LOOP" else location
    proxy.rules = [Rule("redirect", times=None, location=target)]
    client = HttpClient(Connections(), retry=FAST)
    with trio.fail_after(DEADLINE_S), pytest.raises(RemoteError, match=why) as caught:
        await client.send("GET", f"{proxy.url}/v2/?token=SECRET")
    assert "SECRET" not in str(caught.value) and len(proxy.requests) <= 6
    await client.aclose()


async def test_upload_starts_again(proxy: FaultProxy) -> None:
    """A break in the middle of an upload begins a new one."""
    async with open_registry(proxy.host, "pushed") as registry:
        data = BLOB[:500_000]
        proxy.rules = [Rule("reset", method="PUT"), Rule("status", status=500, method="POST")]
        assert await registry.push_blob(data) == sha256_digest(data)
        assert await registry.blob(sha256_digest(data), len(data)) == data


async def test_lost_update_of_the_fallback_tag(proxy: FaultProxy, server: RegistryServer) -> None:
    """If the tag does not hold our entry after the update, the update is done again."""
    from lazyfs.core.oci import referrers
    from lazyfs.core.oci.documents import Descriptor

    async with open_registry(proxy.host, "race") as registry:
        image = server.put_image("race", "latest", [b"layer"])
        raw, media_type = await registry.manifest(image)
        await registry.push_blob(b"{}")
        subject = Descriptor(media_type, image, len(raw))
        # The first update is answered as if it had been stored; somebody else's won.
        proxy.rules = [Rule("status", status=201, method="PUT", path="manifests/sha256-")]
        artifact = referrers.build_artifact("a/b", [], subject, {})
        digest = await registry.attach(subject, artifact)
        assert [d.digest for d in await registry.referrers(image, "a/b")] == [digest]


async def test_referrers_need_one_answer(proxy: FaultProxy) -> None:
    """One of API and fallback tag may fail; both failing is an error."""
    async with open_registry(proxy.host) as registry:
        await registry.manifest("latest")  # connects
        proxy.rules = [Rule("status", status=503, path="/referrers/", times=None)]
        assert await registry.referrers(DIGEST, "a/b") == []
        proxy.rules.append(Rule("status", status=503, path="/manifests/", times=None))
        with pytest.raises(RemoteError, match="answered 503"):
            await registry.referrers(DIGEST, "a/b")


async def test_back_off_grows_and_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    """Waits are random up to base * 2^n, and never beyond the cap."""
    policy = RetryPolicy(base_s=0.2, cap_s=1.0)
    for attempt in range(1, 8):
        assert all(0 <= policy.delay_s(attempt) <= min(1.0, 0.2 * 2**attempt) for _ in range(50))


async def test_much_is_read_at_once(server: RegistryServer) -> None:
    """httpcore's private name for the size of one recv is still the one that we set: its own is 64 KiB."""
    connections = Connections()
    url = f"http://{server.host}/v2/demo/blobs/{DIGEST}"
    with trio.fail_after(DEADLINE_S):
        answer = await connections.send("GET", url, {}, None, 10)
        pieces = [piece async for piece in answer.chunks()]
        await answer.aclose()
        await connections.aclose()
    assert b"".join(pieces) == BLOB and max(len(piece) for piece in pieces) > 64 << 10


async def test_proxy_variables(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """http_proxy serves hosts that are not this machine; this machine is always asked directly."""
    with FaultProxy(proxy.upstream) as forward:
        monkeypatch.setenv("http_proxy", forward.url)
        monkeypatch.delenv("no_proxy", raising=False)
        client = HttpClient(Connections(insecure=True))
        with trio.fail_after(DEADLINE_S):
            await client.send("GET", f"{proxy.url}/v2/")
            assert forward.count() == 0 and proxy.count() == 1
            await client.send("GET", "http://registry.invalid/v2/")
            assert forward.matching()[0].headers["host"] == "registry.invalid"
        await client.aclose()


async def test_abandoned_requests_leave_no_connections(proxy: FaultProxy) -> None:
    """Many requests that were given up in the middle do not use up the pool."""
    async with open_registry(proxy.host) as registry:
        await registry.manifest("latest")  # connects
        for _ in range(4):
            proxy.rules = [Rule("stall", path=BLOBS, after_bytes=50, times=None)]
            with trio.move_on_after(0.1):
                async with trio.open_nursery() as nursery:
                    for _ in range(20):
                        nursery.start_soon(registry.blob_range, DIGEST, 0, 100_000)
        proxy.rules = []
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(registry.blob_range, DIGEST, 0, 100_000)
