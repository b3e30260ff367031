"""What a start read is fetched ahead at the next cold one, of this image and of those that resemble it."""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.hellobench.links import Link, connected
from lazyfs.cache.directory import CacheDirectory
from tests.conftest import Lazyfs
from tests.layertar import LayerTar
from tests.layout import GZIP, Layout, push
from tests.servers import FaultProxy, RegistryServer
from tests.whole.mounting import Host, wait_until

FILE_BYTES = 150_000
FILES = 200


class Images(NamedTuple):
    """What was pushed: file contents by tag, and the repository that all tags but "other" are in."""

    repository: str
    contents: dict[str, dict[str, bytes]]

    def needed(self, tag: str) -> list[str]:
        """What a start of an image reads, in this order: a third of each layer, here and there."""
        names = [name for name in self.contents[tag] if name.rpartition("-")[2] in ("0", "3", "4")]
        return sorted(names, key=lambda name: hash_of(name))

    def reference(self, host: str, tag: str) -> str:
        return f"{host}/{'learning/else' if tag == 'other' else self.repository}:{tag}"


def hash_of(name: str) -> int:
    return int.from_bytes(random.Random(name).randbytes(8), "little")


def content(name: str, size: int = FILE_BYTES) -> bytes:
    return random.Random(name).randbytes(size // 2) + bytes(size - size // 2)


@pytest.fixture(scope="module")
def images(registry: RegistryServer, lazyfs: Lazyfs, tmp_path_factory: pytest.TempPathFactory) -> Images:
    """`one`; `two`, a version of it whose upper layer was built anew, its files elsewhere and some of them changed;
    `other`, which has the lower layer only."""
    directory = tmp_path_factory.mktemp("learning")
    layout = Layout(directory / "layout")
    base = {f"usr/lib/{number}-{number % 10}": content(f"base{number}") for number in range(FILES)}
    app = {f"app/{number}-{number % 10}": content(f"app{number}") for number in range(FILES)}
    moved = {f"new/{number}": content(f"new{number}") for number in range(20)}
    moved |= {name.replace("app/1", "srv/1"): data for name, data in reversed(app.items())}
    changed = [name for name in moved if name.startswith("app/2") and name.endswith("-3")]
    moved |= {name: content(f"changed {name}") for name in changed}
    trees = {"one": [base, app], "two": [base, moved], "other": [base, {"bin/other": content("other")}]}
    made = Images("learning/app", {tag: {**one, **two} for tag, (one, two) in trees.items()})
    (directory / "cache").mkdir(mode=0o700)
    for tag, layers in trees.items():
        tars = [functools.reduce(lambda tar, file: tar.file(*file), files.items(), LayerTar()) for files in layers]
        layout.tag(tag, layout.add_image([layout.add_layer(tar.data(), GZIP) for tar in tars]))
        push(layout.path, tag, made.reference(registry.host, tag))
        lazyfs("index", "--push", "-o", f"cache={directory / 'cache'}", made.reference(registry.host, tag))
    return made


def stats(machine: Host, target: Path) -> dict[str, Any]:
    found: dict[str, Any] = machine.json("stats", target)
    return found


def start(machine: Host, target: Path, images: Images, tag: str, names: list[str] | None = None) -> None:
    """Reads what a start needs, and compares."""
    for name in images.needed(tag) if names is None else names:
        assert (target / name).read_bytes() == images.contents[tag][name]


@pytest.fixture
def learn(machine: Host, proxy: FaultProxy, images: Images) -> Callable[[], int]:
    """Starts `one` on a cold host, and evicts all that can be. Returns how many requests for data that took."""

    def run() -> int:
        proxy.clear()
        target = machine.mount(images.reference(proxy.host, "one"))
        start(machine, target, images, "one")
        requests = ranges(proxy)
        machine.umount(target)
        machine.forget()
        machine.lazyfs("cache", "prune", "--cache", machine.cache)
        cache = CacheDirectory(str(machine.cache))
        assert len(cache.profile_paths()) == 1 and [kind for kind, _ in cache.entry_paths()] == ["profile"]
        proxy.clear()
        return requests

    return run


def ranges(proxy: FaultProxy) -> int:
    return sum(1 for request in proxy.matching("GET", "/blobs/") if request.range)


def settled(machine: Host, target: Path, least_blocks: int) -> None:
    """Waits until all that was foreseen is here, which are so many blocks at least."""

    def all_here() -> bool:
        found = stats(machine, target)
        return found["blocks_foreseen"] >= least_blocks and not found["blocks_awaited"]

    wait_until(all_here)


def test_the_next_cold_start_is_fetched_ahead_by_few_requests_and_waits_for_none(
    machine: Host, proxy: FaultProxy, images: Images, learn: Callable[[], int]
) -> None:
    requests = learn()
    target = machine.mount(images.reference(proxy.host, "one"))
    settled(machine, target, len(images.needed("one")))
    ahead = ranges(proxy)
    assert ahead <= requests // 2
    proxy.clear()
    start(machine, target, images, "one")
    assert ranges(proxy) == 0 and stats(machine, target)["cache_misses"] == 0


def test_a_new_version_is_fetched_ahead_by_content_and_by_name(
    machine: Host, proxy: FaultProxy, images: Images, learn: Callable[[], int]
) -> None:
    learn()
    target = machine.mount(images.reference(proxy.host, "two"))
    settled(machine, target, len(images.needed("two")))
    proxy.clear()
    start(machine, target, images, "two")
    assert ranges(proxy) == 0
    # The next start of that version goes by its own profile.
    machine.umount(target)
    machine.forget()
    assert len(CacheDirectory(str(machine.cache)).profile_paths()) == 2


def test_of_another_image_with_the_same_base_the_base_is_fetched_ahead(
    machine: Host, proxy: FaultProxy, images: Images, learn: Callable[[], int]
) -> None:
    learn()
    target = machine.mount(images.reference(proxy.host, "other"))
    base = [name for name in images.needed("other") if name.startswith("usr/")]
    settled(machine, target, len(base))
    proxy.clear()
    start(machine, target, images, "other", base)
    assert ranges(proxy) == 0
    start(machine, target, images, "other", ["bin/other"])
    assert ranges(proxy) >= 1


def test_nothing_is_fetched_ahead_if_nothing_shall_be_learned(
    machine: Host, proxy: FaultProxy, images: Images, learn: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    learn()
    before = (Path(CacheDirectory(str(machine.cache)).profile_paths()[0])).read_bytes()
    monkeypatch.setenv("LAZYFS_LEARN", "off")
    target = machine.mount(images.reference(proxy.host, "one"))
    (name, *_) = images.needed("one")
    start(machine, target, images, "one", [name])
    few = stats(machine, target)["blocks_present"]
    start(machine, target, images, "one")
    assert stats(machine, target)["cache_misses"] > 20 and few < len(images.needed("one"))
    machine.umount(target)
    machine.forget()
    (path,) = CacheDirectory(str(machine.cache)).profile_paths()
    assert Path(path).read_bytes() == before


@pytest.mark.parametrize("damage", ["garbage", "cut", "another"])
def test_a_damaged_or_foreign_profile_costs_bytes_only(
    machine: Host, proxy: FaultProxy, images: Images, learn: Callable[[], int], damage: str
) -> None:
    learn()
    (path,) = map(Path, CacheDirectory(str(machine.cache)).profile_paths())
    data = path.read_bytes()
    if damage == "another":  # as if it were of `two`: no block of its upper layer is that
        path.rename(path.with_name(digest_of(machine, images, proxy, "two").removeprefix("sha256:")))
    else:
        path.write_bytes(os.urandom(5000) if damage == "garbage" else data[: len(data) // 2])
    target = machine.mount(images.reference(proxy.host, "two"))
    start(machine, target, images, "two")


def digest_of(machine: Host, images: Images, proxy: FaultProxy, tag: str) -> str:
    found: str = machine.json("inspect", "-o", machine.options, images.reference(proxy.host, tag))["manifest_digest"]
    return found


@pytest.fixture
def slow_link(registry: RegistryServer) -> Iterator[str]:
    """20 Mbit/s: what is fetched ahead takes five seconds."""
    with connected(Link("slow", 20_000_000, 0.02, "slow"), registry.host) as route:
        yield route.host


def test_a_read_of_something_else_does_not_wait_until_a_slow_link_has_brought_what_was_foreseen(
    machine: Host, images: Images, learn: Callable[[], int], slow_link: str
) -> None:
    learn()
    target = machine.mount(images.reference(slow_link, "one"), options="insecure")
    wait_until(lambda: stats(machine, target)["blocks_foreseen"] > 0)
    unforeseen = [name for name in images.contents["one"] if name.startswith("app/") and name.endswith("-8")]
    begun = time.monotonic()
    start(machine, target, images, "one", unforeseen[-1:])
    took = time.monotonic() - begun
    assert stats(machine, target)["blocks_awaited"] > 0, "the link is too quick for this test"
    assert took < 2.0
