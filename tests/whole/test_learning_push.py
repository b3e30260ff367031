"""learn=push: a start improves the pack that is attached to its image; several at once destroy nothing."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.core.oci.digests import Digest
from lazyfs.core.starts.pack import PACK_ARTIFACT_TYPE
from lazyfs.core.starts.profile import Profile
from lazyfs.errors import LazyfsError
from lazyfs.images.packs import listed_packs, load_head
from tests.conftest import Lazyfs
from tests.indexing.localimages import resolved
from tests.layertar import LayerTar
from tests.layout import GZIP, Layout, push
from tests.servers import FaultProxy, RegistryServer, Rule
from tests.whole.mounting import Host, host, wait_until

FILE_BYTES = 400_000
NAMES = [f"data/{number}" for number in range(12)]


@pytest.fixture
def name(registry: RegistryServer, lazyfs: Lazyfs, tmp_path: Path) -> str:
    """An image with an index and no pack: repository and tag."""
    layout = Layout(tmp_path / "layout")
    tar = functools.reduce(lambda tar, name: tar.file(name, os.urandom(FILE_BYTES)), NAMES, LayerTar())
    layout.tag("it", layout.add_image([layout.add_layer(tar.data(), GZIP)]))
    made = f"learning-push/{os.urandom(4).hex()}:it"
    push(layout.path, "it", f"{registry.host}/{made}")
    (tmp_path / "index").mkdir(mode=0o700)
    lazyfs("index", "--push", "-o", f"cache={tmp_path / 'index'}", f"{registry.host}/{made}")
    return made


def packs(directory: Path, image: str) -> list[tuple[Digest, Profile]]:
    """What is attached, the best first."""
    cache = CacheDirectory(str(directory / "looking"))

    async def look() -> list[tuple[Digest, Profile]]:
        async with resolved(cache, image) as it:
            artifacts = await it.source.referrers(it.manifest_digest, PACK_ARTIFACT_TYPE)
            found = await listed_packs(it.source, "", it.manifest_digest, artifacts)
            return [(one.digest, Profile.decode((await load_head(one)).profile)) for one in found]

    try:
        return trio.run(look)
    except LazyfsError:  # it is being replaced
        return []


def start(machine: Host, image: str, names: list[str]) -> None:
    """A container that reads this, and ends."""
    target = machine.mount(image, options="learn=push")
    for name in names:
        assert len((target / name).read_bytes()) == FILE_BYTES
    machine.umount(target)


def test_the_first_start_makes_a_pack_and_the_same_one_again_nothing(
    machine: Host, proxy: FaultProxy, name: str, tmp_path: Path
) -> None:
    image = f"{proxy.host}/{name}"
    start(machine, image, NAMES[:6])
    wait_until(lambda: packs(tmp_path, image))
    machine.forget()
    ((first, profile),) = packs(tmp_path, image)
    assert profile.starts == 1 and len(profile.touches) == 12
    machine.lazyfs("cache", "prune", "--cache", machine.cache)
    proxy.clear()
    start(machine, image, NAMES[:6])
    machine.forget()
    assert packs(tmp_path, image) == [(first, profile)]
    assert not proxy.count("POST") and not proxy.count("PUT")
    start(machine, image, NAMES[4:])
    machine.forget()
    (_, merged), *_ = packs(tmp_path, image)
    assert merged.starts == 2 and len(merged.touches) == 24


@pytest.fixture
def hosts(lazyfs: Lazyfs, tmp_path: Path) -> Iterator[list[Host]]:
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    with host(lazyfs, tmp_path / "0", "kernel") as one, host(lazyfs, tmp_path / "1", "fuse") as other:
        yield [one, other]


def test_two_learners_at_once_lose_nothing(
    hosts: list[Host], registry: RegistryServer, name: str, tmp_path: Path
) -> None:
    image = f"{registry.host}/{name}"
    targets = [machine.mount(image, options="learn=push") for machine in hosts]
    for target, names in zip(targets, (NAMES[:6], NAMES[6:]), strict=True):
        for one in names:
            assert len((target / one).read_bytes()) == FILE_BYTES
    for machine, target in zip(hosts, targets, strict=True):
        machine.lazyfs("umount", target)
    for machine in hosts:
        machine.forget()
    (_, best), *_ = packs(tmp_path, image)
    assert best.starts == 2 and len(best.touches) == 24


def test_without_the_right_to_push_it_is_said_once_and_nothing_fails(
    kernel_host: Host, proxy: FaultProxy, name: str, tmp_path: Path
) -> None:
    image = f"{proxy.host}/{name}"
    for method in ("POST", "PUT", "PATCH"):
        proxy.rules.append(Rule("status", method=method, status=403, times=None))
    start(kernel_host, image, NAMES[:6])
    with open(kernel_host.runtime / "daemon.log") as log:  # it goes with the daemon
        wait_until(lambda: proxy.count("POST"))
        start(kernel_host, image, NAMES[6:])
        kernel_host.forget()
        said = log.read()
    assert not packs(tmp_path, image)
    assert said.count("learn=push") == said.count("is not improved") == 1
