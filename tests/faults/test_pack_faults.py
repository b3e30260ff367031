"""Startup packs that are wrong, and registries that fail while one is played: right bytes, in time, from elsewhere."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.profiles import keep_profile
from lazyfs.core.oci.digests import Digest
from lazyfs.core.starts.pack import PREFIX_BYTES, head_size
from lazyfs.core.starts.profile import DIGEST_BYTES, Profile, Touch
from lazyfs.serving.packsource import STALL_S
from tests.conftest import Lazyfs, unmount
from tests.faults import packed as images
from tests.faults.conftest import Mount
from tests.faults.packed import FILES, REPOSITORY, Packed, frames_of
from tests.faults.processes import end_daemon, kill, the_worker
from tests.faults.world import BLOBS, GRACE_S, World, assert_right, read
from tests.servers import FaultProxy, RegistryServer, Rule
from tests.whole.mounting import wait_until

OTHER_FILES = ["l7/large", "l8/small", "bulk/3"]


@pytest.fixture(scope="module")
def packed(
    world: World, registry: RegistryServer, lazyfs: Lazyfs, tmp_path_factory: pytest.TempPathFactory
) -> Packed:
    return images.build(world, registry, lazyfs, tmp_path_factory.mktemp("packed"))


class Played:
    """What the daemon says of a mount."""

    def __init__(self, lazyfs: Lazyfs, target: Path) -> None:
        self._lazyfs = lazyfs
        self._target = target

    def stats(self) -> dict[str, int]:
        answer: dict[str, int] = json.loads(self._lazyfs("stats", self._target, "--json").stdout)
        return answer

    def wait_for(self, blocks: int) -> None:
        wait_until(lambda: self.stats()["blocks_present"] >= blocks)


def layers_asked(world: World, proxy: FaultProxy) -> int:
    """Requests for spans: not for the pack, nor for the index."""
    return sum(proxy.count("GET", BLOBS + digest) for digest in world.digests)


def test_a_pack_is_played(
    world: World, packed: Packed, proxy: FaultProxy, mount: Mount, lazyfs: Lazyfs, backend: str
) -> None:
    pack = packed.pack()
    place = packed.attach(pack)
    target = mount(packed.image(proxy.host), f"backend={backend}")
    played = Played(lazyfs, target)
    played.wait_for(len(packed.blocks))
    assert_right(world, target, *FILES)
    assert layers_asked(world, proxy) == 0
    assert proxy.count("GET", place) == 1
    stats = played.stats()
    assert stats["blocks_present"] == len(packed.blocks)
    assert stats["bytes_fetched"] >= len(pack)
    assert stats["requests"] == proxy.count()
    assert_right(world, target, *OTHER_FILES)


def spoil(pack: bytes, place: int) -> bytes:
    return pack[:place] + bytes([pack[place] ^ 0x55]) + pack[place + 1 :]


def reorder(pack: bytes) -> bytes:
    frames = [pack[one.start : one.stop] for one in frames_of(pack)]
    return pack[: frames_of(pack)[0].start] + b"".join(reversed(frames))


def random_content(packed: Packed, share: int) -> dict[int, bytes]:
    """For each `share`-th block something else."""
    return {
        number: random.Random(number).randbytes(len(content))
        for number, (_, _, content) in enumerate(packed.blocks)
        if number % share == 0
    }


WRONG: dict[str, Callable[[Packed], bytes]] = {
    "a byte flipped in a frame": lambda packed: spoil(packed.pack(), frames_of(packed.pack())[1].start + 1000),
    "a byte flipped in the head": lambda packed: spoil(packed.pack(), PREFIX_BYTES + 10),
    "cut off in a frame": lambda packed: packed.pack()[: frames_of(packed.pack())[1].start + 7],
    "cut off in the head": lambda packed: packed.pack()[: head_size(packed.pack()) - 1],
    "frames in another order": lambda packed: reorder(packed.pack()),
    "contents of something else": lambda packed: packed.pack(others=random_content(packed, 1)),
    "half of the contents of something else": lambda packed: packed.pack(others=random_content(packed, 2)),
    "zeros": lambda packed: bytes(1 << 20),
    "a head that declares impossible sizes": lambda packed: packed.pack()[:8] + b"\xff" * 8 + packed.pack()[16:],
    "of another version of the image": lambda packed: packed.pack(Digest("sha256:" + "1" * 64)),
}


@pytest.mark.parametrize("which", WRONG)
def test_a_wrong_pack_is_not_noticed(
    which: str, world: World, packed: Packed, proxy: FaultProxy, mount: Mount, lazyfs: Lazyfs
) -> None:
    place = packed.attach(WRONG[which](packed))
    begun = time.monotonic()
    target = mount(packed.image(proxy.host), "backend=kernel", "timeout=20")
    assert_right(world, target, *FILES, *OTHER_FILES)
    assert time.monotonic() - begun < 20
    assert 1 <= proxy.count("GET", place) <= 2
    assert Played(lazyfs, target).stats()["blocks_present"] >= len(packed.blocks)


def test_a_registry_that_dies_inside_a_pack_and_comes_back(
    world: World, packed: Packed, proxy: FaultProxy, mount: Mount, lazyfs: Lazyfs
) -> None:
    """The stream goes on where it was: what came is not fetched again."""
    pack = packed.pack()
    place = packed.attach(pack)
    broken = frames_of(pack)[2].start + 1000
    proxy.rules[:] = [
        Rule("truncate", path=place, after_bytes=broken),  # a reset would lose what the kernel still holds
        Rule("status", path=place, status=500, times=8),
    ]
    target = mount(packed.image(proxy.host), "backend=kernel")
    Played(lazyfs, target).wait_for(len(packed.blocks))
    assert proxy.rules[1].hits == 8
    assert sum(one.bytes for one in proxy.requests if place in one.path) < len(pack) + (64 << 10)
    assert layers_asked(world, proxy) == 0
    assert_right(world, target, *FILES)


@pytest.mark.parametrize("after_bytes", [None, 100, 1_500_000])
def test_a_pack_that_does_not_come_holds_up_nobody(
    after_bytes: int | None, world: World, packed: Packed, proxy: FaultProxy, mount: Mount, backend: str
) -> None:
    place = packed.attach(packed.pack())
    proxy.rules[:] = [Rule("stall", path=place, times=None, after_bytes=after_bytes)]
    begun = time.monotonic()
    target = mount(packed.image(proxy.host), f"backend={backend}")
    assert time.monotonic() - begun < GRACE_S
    outcome = read(target / FILES[-1])
    assert outcome.data == world.truth[FILES[-1]]
    assert outcome.seconds < STALL_S + GRACE_S
    assert_right(world, target, *FILES)


def test_a_pack_that_trickles_is_overtaken(
    world: World, packed: Packed, proxy: FaultProxy, mount: Mount, lazyfs: Lazyfs
) -> None:
    place = packed.attach(packed.pack())
    proxy.rules[:] = [Rule("slow", path=place, times=None, bytes_per_s=50_000)]
    target = mount(packed.image(proxy.host), "backend=kernel")
    begun = time.monotonic()
    assert_right(world, target, *FILES)
    assert time.monotonic() - begun < GRACE_S + 2 * STALL_S
    assert layers_asked(world, proxy)


def test_an_image_is_unmounted_while_it_plays(
    world: World, packed: Packed, proxy: FaultProxy, mount: Mount, backend: str, cache: Path, lazyfs: Lazyfs
) -> None:
    place = packed.attach(packed.pack())
    proxy.rules[:] = [Rule("slow", path=place, bytes_per_s=200_000)]
    target = mount(packed.image(proxy.host), f"backend={backend}")
    wait_until(lambda: proxy.count("GET", place))
    unmount(target)
    end_daemon(cache)
    proxy.clear()
    target = mount(packed.image(proxy.host), f"backend={backend}")
    Played(lazyfs, target).wait_for(len(packed.blocks))
    assert_right(world, target, *FILES)


def test_a_worker_is_killed_while_it_plays(
    world: World, packed: Packed, proxy: FaultProxy, mount: Mount, cache: Path
) -> None:
    place = packed.attach(packed.pack())
    proxy.rules[:] = [Rule("slow", path=place, bytes_per_s=1_000_000)]
    target = mount(packed.image(proxy.host), "backend=kernel")
    wait_until(lambda: proxy.bytes_sent > 1_200_000)
    kill(the_worker(cache))
    assert_right(world, target, *FILES, *OTHER_FILES)
    the_worker(cache)


def test_a_layer_that_another_image_has_open_is_played_for_both(
    world: World, packed: Packed, proxy: FaultProxy, mount: Mount, lazyfs: Lazyfs, registry: RegistryServer
) -> None:
    place = packed.attach(packed.pack())
    other = world.with_another_config(f"{registry.host}/packed-other:v1")
    lazyfs("index", "--push", "-o", f"cache={packed.scratch}", other)
    proxy.rules[:] = [Rule("slow", path=place, bytes_per_s=1_500_000)]
    first = mount(packed.image(proxy.host), "backend=kernel")
    second = mount(other, "backend=kernel")
    assert_right(world, second, *FILES)
    unmount(first)
    assert_right(world, second, *FILES, *OTHER_FILES)


def test_offline_never_asks(packed: Packed, proxy: FaultProxy, mount: Mount, cache: Path, world: World) -> None:
    packed.attach(packed.pack())
    target = mount(packed.image(proxy.host), "backend=kernel")
    assert_right(world, target, FILES[0])
    unmount(target)
    end_daemon(cache)
    proxy.clear()
    target = mount(packed.image(proxy.host), "backend=kernel", "offline")
    assert_right(world, target, FILES[0])
    assert not proxy.requests


def test_what_a_known_start_needs_is_here_so_nothing_is_asked_for(
    packed: Packed, proxy: FaultProxy, mount: Mount, cache: Path, world: World, lazyfs: Lazyfs
) -> None:
    place = packed.attach(packed.pack())
    target = mount(packed.image(proxy.host), "backend=kernel")
    Played(lazyfs, target).wait_for(len(packed.blocks))
    unmount(target)
    end_daemon(cache)
    roots = tuple(dict.fromkeys(root for root, _, _ in packed.blocks))
    touches = [Touch(roots.index(root), block, 0, 1, bytes(DIGEST_BYTES), b"", 0) for root, block, _ in packed.blocks]
    keep_profile(CacheDirectory(str(cache)), packed.digest, packed.image(proxy.host), Profile(roots, 1, tuple(touches)))
    proxy.clear()
    target = mount(packed.image(proxy.host), "backend=kernel")
    assert_right(world, target, *FILES)
    assert not proxy.count("GET", place)
    assert {request.path for request in proxy.requests} == {"/v2/", f"/v2/{REPOSITORY}/manifests/v1"}
