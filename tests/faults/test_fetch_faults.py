"""A registry that fails for a moment: no reader notices. One mount for all, each fault on its own layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import leaks
from tests.conftest import Lazyfs, unmount
from tests.faults.processes import end_daemon
from tests.faults.world import BLOBS, LAYERS, World, assert_right
from tests.servers import FaultProxy, RegistryServer, Rule

TEMPORARY: dict[str, dict[str, object]] = {
    "500": {"fault": "status", "status": 500},
    "503": {"fault": "status", "status": 503},
    "429 with Retry-After": {"fault": "status", "status": 429, "headers": {"Retry-After": "1"}, "times": 1},
    "reset": {"fault": "reset"},
    "reset in the body": {"fault": "reset", "after_bytes": 70_000},
    "truncated": {"fault": "truncate", "after_bytes": 70_000},
    "200 instead of 206": {"fault": "whole"},
    "byte flipped": {"fault": "flip", "after_bytes": 200_000},
    "wrong Content-Range": {"fault": "content_range", "headers": {"Content-Range": "bytes 1-9/10"}},
    "404 once": {"fault": "status", "status": 404, "times": 1},
    "slow": {"fault": "slow", "latency_s": 0.3, "bytes_per_s": 4_000_000},
}


class Mounted:
    """A mounted image behind a proxy; `layer` numbers the layers, none of which was read before."""

    def __init__(self, target: Path, proxy: FaultProxy) -> None:
        self.target = target
        self.proxy = proxy
        self._next = iter(range(LAYERS))

    def unread(self) -> list[str]:
        number = next(self._next)
        return [f"l{number}/{name}" for name in ("small", "large", "empty", "medium")]


@pytest.fixture(scope="module", params=["kernel", "fuse"])
def mounted(
    request: pytest.FixtureRequest,
    world: World,
    registry: RegistryServer,
    lazyfs: Lazyfs,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Mounted]:
    base = tmp_path_factory.mktemp("fetch-faults")
    cache, target = base / "cache", base / "target"
    cache.mkdir(mode=0o700)
    target.mkdir()
    before = leaks.traces(base)
    with FaultProxy(registry) as proxy:
        options = f"cache={cache},backend={request.param},timeout=20"
        lazyfs("mount", "-o", options, world.image(proxy.host), target)
        try:
            yield Mounted(target, proxy)
        finally:
            unmount(target)
            end_daemon(cache)
            leaks.wait_until_gone(base, before)


@pytest.mark.parametrize("name", TEMPORARY)
def test_a_passing_fault_is_not_noticed(name: str, world: World, mounted: Mounted) -> None:
    rule = Rule(**({"path": BLOBS, "times": 2} | TEMPORARY[name]))  # type: ignore[arg-type]
    mounted.proxy.rules[:] = [rule]
    assert_right(world, mounted.target, *mounted.unread())
    assert rule.hits > 0
