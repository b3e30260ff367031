"""A registry that does not come back: EIO in time, no zeros, no hang; and when it is back, all is well."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import Lazyfs
from tests.faults.conftest import Mount
from tests.faults.world import BLOBS, GRACE_S, LAYERS, World, assert_io_error, assert_right
from tests.servers import FaultProxy, RegistryServer, Rule

TIMEOUT_S = 2
LASTING: dict[str, dict[str, object]] = {
    "500": {"fault": "status", "status": 500},
    "429": {"fault": "status", "status": 429, "headers": {"Retry-After": "1"}},
    "forbidden": {"fault": "status", "status": 403},
    "deleted": {"fault": "status", "status": 404},
    "reset": {"fault": "reset"},
    "truncated": {"fault": "truncate", "after_bytes": 100},
    "flipped": {"fault": "flip", "after_bytes": 2_000},
    "wrong Content-Range": {"fault": "content_range", "headers": {"Content-Range": "bytes 1-9/10"}},
    "stall": {"fault": "stall"},
    "stall in the body": {"fault": "stall", "after_bytes": 2_000},
    "trickle": {"fault": "slow", "bytes_per_s": 20_000},
}


@pytest.mark.parametrize("backend", ["kernel", "fuse"])
def test_lasting_faults_are_io_errors_in_time(
    backend: str, world: World, proxy: FaultProxy, mount: Mount
) -> None:
    """Each layer has its fault, all are read at once; meanwhile what is cached, or comes from a sound layer,
    is served. After the faults the next read of each file succeeds, though silent connections are still open.
    """
    target = mount(world.image(proxy.host), f"backend={backend}", f"timeout={TIMEOUT_S}")
    assert_right(world, target, "l19/large")
    rules = {
        name: Rule(**({"path": world.digests[number], "times": None} | fault))  # type: ignore[arg-type]
        for number, (name, fault) in enumerate(LASTING.items())
    }
    proxy.rules[:] = rules.values()
    paths = [f"l{number}/large" for number in range(len(rules))]
    with ThreadPoolExecutor(len(paths)) as pool:
        for number, check in enumerate(
            [pool.submit(assert_io_error, target / path, TIMEOUT_S + GRACE_S) for path in paths]
        ):
            if number == 0:
                assert_right(world, target, "l19/large", "l19/small", "l0/empty")
                assert sorted(os.listdir(target / "l0")) == ["empty", "large", "medium", "small"]
            check.result()
    assert [name for name, rule in rules.items() if not rule.hits] == []
    proxy.clear()
    assert_right(world, target, *paths)


def test_a_silent_registry_costs_a_read_no_more_than_its_timeout(
    world: World, proxy: FaultProxy, mount: Mount
) -> None:
    """Though the kernel asks twice: for a failed readahead, and for the page that is waited for."""
    timeout_s = 5  # GRACE_S is less
    targets = [
        mount(world.image(proxy.host), f"backend={backend}", f"timeout={timeout_s}")
        for backend in ("kernel", "fuse")
    ]
    proxy.rules[:] = [Rule("stall", times=None)]
    paths = [target / path for target in targets for path in ("l0/small", "l1/large", "bulk/3")]
    with ThreadPoolExecutor(len(paths)) as pool:
        for one in [pool.submit(assert_io_error, path, timeout_s + GRACE_S) for path in paths]:
            one.result()


def test_a_layer_that_images_share_keeps_the_shortest_promise(
    world: World, proxy: FaultProxy, registry: RegistryServer, lazyfs: Lazyfs, mount: Mount, tmp_path: Path
) -> None:
    """Whichever was mounted last, also of one image."""
    again = world.with_another_config(f"{registry.host}/again:v1")
    lazyfs("index", "--push", "-o", f"cache={tmp_path / 'scratch'}", again)
    patient = [world.image(proxy.host), again.replace(registry.host, proxy.host)]
    mount(patient[0], "backend=kernel", "timeout=60")
    hurried = mount(world.image(proxy.host), "backend=kernel", f"timeout={TIMEOUT_S}")
    for image in patient:
        mount(image, "backend=kernel", "timeout=60")
    proxy.rules[:] = [Rule("stall", times=None)]
    assert_io_error(hurried / "l4/large", TIMEOUT_S + GRACE_S)


def test_a_stopped_registry_fails_reads_until_it_is_back(
    backend: str, world: World, proxy: FaultProxy, mount: Mount
) -> None:
    target = mount(world.image(proxy.host), f"backend={backend}", f"timeout={TIMEOUT_S}")
    assert_right(world, target, "l0/large")
    registry_host, proxy.upstream = proxy.upstream, "127.0.0.1:9"  # discard: nobody listens
    proxy.break_connections()
    assert_io_error(target / "l1/large", TIMEOUT_S + GRACE_S)
    assert_right(world, target, "l0/large", "l0/small")
    proxy.upstream = registry_host
    assert_right(world, target, "l1/large", "l2/large")
    proxy.close()  # connection refused
    assert_io_error(target / "l3/large", TIMEOUT_S + GRACE_S)
    assert_right(world, target, "l0/large", "l1/large", "l2/large")


def test_a_silent_registry_does_not_hold_up_another(
    backend: str, world: World, proxy: FaultProxy, registry: RegistryServer, mount: Mount
) -> None:
    """Far more reads than there are connections wait for one registry; the other one's image is read."""
    silent = mount(world.image(proxy.host), f"backend={backend}", f"timeout={TIMEOUT_S}")
    sound = mount(f"{registry.host}/{world.other}:v1", f"backend={backend}", f"timeout={TIMEOUT_S}")
    proxy.rules[:] = [Rule("stall", times=None)]
    paths = [f"l{number}/large" for number in range(LAYERS)]
    with ThreadPoolExecutor(len(paths)) as pool:
        waiting = [pool.submit(assert_io_error, silent / path, TIMEOUT_S + GRACE_S) for path in paths]
        while len(proxy.matching("GET", BLOBS)) < 8:
            time.sleep(0.01)
        assert (sound / "other").read_bytes() == world.other_content
        for wait in waiting:
            wait.result()
