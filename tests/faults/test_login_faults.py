"""Logins that expire under a mount, and blobs that are kept elsewhere."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Lazyfs
from tests.faults.conftest import Mount
from tests.faults.world import BLOBS, World, assert_right
from tests.servers import FaultProxy, RegistryServer, Rule, TokenServer


def _copy(world: World, server: RegistryServer) -> None:
    """The image, without an index, to a registry that skopeo has no login for."""
    for blob in (world.layout / "blobs" / "sha256").iterdir():
        server.put_blob(world.repository, blob.read_bytes())
    server.put_manifest(world.repository, world.manifest(), tag="v1")


def test_logins_are_renewed_and_stay_with_their_registry(
    backend: str,
    world: World,
    registry: RegistryServer,
    lazyfs: Lazyfs,
    mount: Mount,
    cache: Path,
    tmp_path: Path,
) -> None:
    with (
        TokenServer() as tokens,
        RegistryServer(tmp_path, token=tokens) as server,
        FaultProxy(server) as proxy,
        FaultProxy(registry) as store,
    ):
        _copy(world, server)
        lazyfs("index", "--push", "-o", f"cache={tmp_path / 'scratch'}", world.image(server.host))
        target = mount(world.image(proxy.host), f"backend={backend}")
        assert_right(world, target, "l0/large")

        # The token is refused in the middle of the mount's life: another one is fetched, once.
        before = len(tokens.requests)
        scope = f"repository:{world.repository}:pull"
        challenge = f'Bearer realm="{tokens.url}",service="{tokens.service}",scope="{scope}"'
        expired = Rule("status", path=BLOBS, status=401, headers={"WWW-Authenticate": challenge}, times=3)
        proxy.rules[:] = [expired]
        assert_right(world, target, "l1/large", "l1/medium")
        assert expired.hits > 0
        assert len(tokens.requests) > before

        # The registry sends readers to a blob store at another port: it gets no token.
        proxy.rules[:] = [Rule("redirect", path=BLOBS, location=store.url, times=None)]
        assert_right(world, target, "l2/large", "l3/large", "l4/large")
        assert store.count("GET", BLOBS) > 0
        assert all("authorization" not in request.headers for request in store.requests)
        assert all("authorization" in request.headers for request in proxy.matching("GET", BLOBS))

        # The store forgets about the signed URL: the registry is asked for a new one.
        store.rules[:] = [Rule("status", path=BLOBS, status=403)]
        assert_right(world, target, "l2/medium", "l5/large", "bulk/0", "bulk/59")
