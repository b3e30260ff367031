"""Packs: made of what the cache has, attached, replaced, improved by several at once; in registries and layouts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.core.index.imageindex import ImageIndex
from lazyfs.core.oci.digests import Digest
from lazyfs.core.starts.pack import PACK_ARTIFACT_TYPE, parse_head
from lazyfs.core.starts.profile import Profile
from lazyfs.errors import HostError, NotFound, RemoteError
from lazyfs.images.attached import Attached
from lazyfs.images.packs import FoundPack, find_packs, listed_packs
from lazyfs.indexing.assemble import BuiltIndex
from lazyfs.indexing.packs import attach_pack, improve_pack, make_pack
from lazyfs.indexing.publish import push_index
from tests.indexing.localimages import OPTIONS, big_layer, indexed, resolved, small_layer, write_image
from tests.indexing.somestarts import cached_blocks, pack_blocks, push_pack, some_starts
from tests.layout import push
from tests.servers import FaultProxy, RegistryServer, Rule


@dataclass
class Host:
    """A cache that has read all of an image."""

    cache: CacheDirectory
    image: str
    built: BuiltIndex

    @property
    def manifest_digest(self) -> Digest:
        return Digest(ImageIndex(self.built.index).manifest_digest)

    async def pack(self, profile: Profile, **limits: int) -> bytes:
        return await make_pack(self.cache, self.manifest_digest, profile, **limits)

    async def push(self, pack: bytes, repository: str = "") -> str:
        async with resolved(self.cache, self.image) as it:
            return await push_pack(it, pack, repository)

    async def improve(self, profile: Profile, repository: str = "") -> int:
        async with resolved(self.cache, self.image) as it:
            return (await improve_pack(self.cache, it, profile, repository)).starts

    async def attached(self) -> list[FoundPack]:
        async with resolved(self.cache, self.image) as it:
            artifacts = await it.source.referrers(it.manifest_digest, PACK_ARTIFACT_TYPE)
            return await listed_packs(it.source, "", it.manifest_digest, artifacts)

    async def blob(self, pack: FoundPack) -> bytes:
        async with resolved(self.cache, self.image) as it:
            return await it.source.blob(pack.digest, pack.size_bytes)


@pytest.fixture(params=["registry", "layout"])
def image(request: pytest.FixtureRequest, registry: RegistryServer, tmp_path: Path) -> Iterator[str]:
    """An image without index; of a registry, behind a proxy."""
    written = write_image(tmp_path / "image", [big_layer(), small_layer()])
    if request.param == "layout":
        yield written
        return
    with FaultProxy(registry) as proxy:
        name = f"packs/{os.urandom(4).hex()}:latest"
        push(tmp_path / "image", "latest", f"{registry.host}/{name}")
        yield f"{proxy.host}/{name}"


async def host(tmp_path: Path, image: str, name: str = "host") -> Host:
    cache = CacheDirectory(str(tmp_path / name))
    built, _ = await indexed(cache, image, fill=True)
    return Host(cache, image, built)


async def test_a_pack_has_the_blocks_that_the_cache_has(tmp_path: Path, image: str) -> None:
    one = await host(tmp_path, image)
    profile = some_starts(one.built, [3, 0, 5, 1], starts=4)
    pack = await one.pack(profile)
    assert list(pack_blocks(pack)) == [(profile.layers[touch.layer], touch.block) for touch in profile.touches]
    everything = cached_blocks(one.cache, one.built)
    assert all(everything[block] == content for block, content in pack_blocks(pack).items())
    head = parse_head(pack, len(pack))
    assert head.manifest_digest == one.manifest_digest
    assert Profile.decode(head.profile) == profile.without_paths()
    assert await one.pack(profile) == pack


async def test_what_the_cache_lacks_is_left_out(tmp_path: Path, image: str) -> None:
    one = await host(tmp_path, image)
    profile = some_starts(one.built)
    foreign = profile._replace(layers=(*profile.layers[:-1], "f" * 64))  # type: ignore[arg-type]
    assert len({root for root, _ in pack_blocks(await one.pack(foreign))}) == len(profile.layers) - 1
    damage(Path(one.cache.path, "layers", profile.layers[0], "data"))
    assert (profile.layers[0], 0) not in pack_blocks(await one.pack(profile))
    empty = CacheDirectory(str(tmp_path / "empty"))
    with pytest.raises(HostError, match="none of the blocks"):
        await make_pack(empty, one.manifest_digest, profile)
    with pytest.raises(HostError, match="allow a larger pack"):
        await one.pack(profile, max_bytes=10)


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"damage")


async def test_a_pack_is_attached_and_replaced(tmp_path: Path, image: str) -> None:
    """The former one is no longer listed, and only the pack, its artifact and the list are uploaded."""
    one = await host(tmp_path, image)
    async with resolved(one.cache, image) as it:
        await push_index(one.cache, it, one.built)
    first = await one.pack(some_starts(one.built, [0]))
    assert await one.push(first) == await one.push(first)
    (found,) = await one.attached()
    assert await one.blob(found) == first and (found.starts, found.revision) == (1, 1)
    second = await one.pack(some_starts(one.built, starts=5))
    await one.push(second)
    (now,) = await one.attached()
    assert await one.blob(now) == second and (now.starts, now.revision) == (5, 2)
    if image.startswith("oci:"):
        with pytest.raises(NotFound):  # nobody else collects it
            await one.blob(found)
    # The index is still there, and pushing it again keeps the pack.
    async with resolved(one.cache, image) as it:
        assert len(await it.source.referrers(it.manifest_digest, PACK_ARTIFACT_TYPE)) == 1
        await push_index(one.cache, it, one.built)
    assert await one.attached() and (await one.attached())[0].digest == now.digest


async def test_replacing_uploads_the_pack_only(tmp_path: Path, registry: RegistryServer) -> None:
    write_image(tmp_path / "image", [big_layer()])
    name = f"packs/{os.urandom(4).hex()}:latest"
    push(tmp_path / "image", "latest", f"{registry.host}/{name}")
    with FaultProxy(registry) as proxy:
        one = await host(tmp_path, f"{proxy.host}/{name}")
        await one.push(await one.pack(some_starts(one.built, [0])))
        pack = await one.pack(some_starts(one.built, [0, 1]))
        proxy.clear()
        await one.push(pack)
        written = [one.path.rpartition("/")[2].partition("?")[0] for one in proxy.matching("PUT")]
        assert len(proxy.matching("PUT", "/blobs/")) == 1
        assert len(written) == 4  # and artifact, and the list with it, and without the former one
        assert not proxy.matching("DELETE")


async def test_two_packs_are_both_listed_and_the_best_goes_first(tmp_path: Path, image: str) -> None:
    """Of the same revision, the one of more starts; of as many, always the same one; and no manifest is fetched."""
    one = await host(tmp_path, image)
    packs = [
        await one.pack(some_starts(one.built, blocks, starts)) for blocks, starts in (([0], 2), ([1], 3), ([2], 3))
    ]
    async with resolved(one.cache, image) as it:
        for pack in packs:
            await attach_pack(it.source, "", it, pack)
    found = await one.attached()
    assert [pack.revision for pack in found] == [3, 2, 1]
    same = [pack._replace(revision=1) for pack in found]
    annotations = [{**pack.artifact.annotations, "vnd.lazyfs.pack.revision": "1"} for pack in same]
    listed = [pack.artifact._replace(annotations=own) for pack, own in zip(same, annotations, strict=True)]
    async with resolved(one.cache, image) as it:
        before = it.source.counters.requests
        for order in (listed, listed[::-1]):
            best = await listed_packs(it.source, "", it.manifest_digest, order)
            assert [pack.starts for pack in best] == [3, 3, 2]
            assert best[0].artifact.digest == max(pack.artifact.digest for pack in best if pack.starts == 3)
        assert it.source.counters.requests == before


async def test_learners_at_the_same_time_lose_nothing(tmp_path: Path, image: str) -> None:
    """Each has seen another start, and has only the blocks that it touched."""
    whole = await host(tmp_path, image, "whole")
    profiles = [some_starts(whole.built, blocks) for blocks in ([0, 1], [2, 3], [1, 4])]
    hosts = [
        Host(part(tmp_path, whole, profile, number), image, whole.built) for number, profile in enumerate(profiles)
    ]
    async with trio.open_nursery() as nursery:
        for one, profile in zip(hosts, profiles, strict=True):
            nursery.start_soon(one.improve, profile)
    (best, *others) = await whole.attached()
    assert not others
    head = parse_head(pack := await whole.blob(best), len(pack))
    merged = Profile.decode(head.profile)
    touched = {(profile.layers[touch.layer], touch.block) for profile in profiles for touch in profile.touches}
    assert set(pack_blocks(pack)) == touched == {(merged.layers[one.layer], one.block) for one in merged.touches}
    assert merged.starts >= 3
    # Again, one after the other: one more start, in one round.
    assert await hosts[0].improve(profiles[0]) == merged.starts + 1
    assert len(await whole.attached()) == 1


def part(tmp_path: Path, whole: Host, profile: Profile, number: int) -> CacheDirectory:
    """A cache that has the blocks of one profile."""
    cache = CacheDirectory(str(tmp_path / f"part{number}"))
    contents = cached_blocks(whole.cache, whole.built)
    for at, root in enumerate(profile.layers):
        source = whole.cache.open_layer(root)
        assert source is not None
        layer = cache.create_layer(root, bytes(source.table.buffer))
        for touch in profile.touches:
            if touch.layer == at:
                assert layer.publish(touch.block, contents[root, touch.block])
        layer.close()
        source.close()
    return cache


async def test_a_damaged_pack_does_not_stop_the_next_one(tmp_path: Path, image: str) -> None:
    """Rubbish that claims to be the best pack, and one whose frames are damaged."""
    one = await host(tmp_path, image)
    good = await one.pack(some_starts(one.built, [0]))
    head = parse_head(good, len(good))
    damaged = bytearray(await one.pack(some_starts(one.built, [1])))
    damaged[-20:] = bytes(20)
    await one.push(bytes(damaged))
    assert await one.improve(some_starts(one.built, [0])) == 2
    (found,) = await one.attached()
    assert set(pack_blocks(await one.blob(found))) == {(root, block) for root in head.layers for block in (0, 1)} & set(
        cached_blocks(one.cache, one.built)
    )


async def test_an_index_repository_holds_a_pack(tmp_path: Path, image: str) -> None:
    one = await host(tmp_path, image)
    repository = f"oci:{tmp_path}/indexes"
    pack = await one.pack(some_starts(one.built))
    await one.push(pack, repository)
    assert not await one.attached()
    assert await one.improve(some_starts(one.built), repository) == 2


async def test_a_directory_keeps_the_last_pack_only(tmp_path: Path, image: str) -> None:
    """It need not be there; and what this host was told before counts no more."""
    one = await host(tmp_path, image)
    repository = f"oci:{tmp_path}/out"
    async with resolved(one.cache, image, OPTIONS._replace(index_repositories=(repository,))) as it:
        attached = Attached(one.cache, it)
        assert await find_packs(attached) == []
        for blocks in ([0], [0, 1]):
            await one.improve(some_starts(one.built, blocks), repository)
        await attached.aclose()
        attached = Attached(one.cache, it)
        (found,) = await find_packs(attached)
        await attached.aclose()
    written = [path.stat().st_size for path in (tmp_path / "out/blobs/sha256").iterdir()]
    assert max(written) == found.size_bytes and sum(size > 10_000 for size in written) == 1


async def test_a_push_that_fails_changes_nothing(tmp_path: Path, registry: RegistryServer) -> None:
    write_image(tmp_path / "image", [small_layer()])
    name = f"packs/{os.urandom(4).hex()}:latest"
    push(tmp_path / "image", "latest", f"{registry.host}/{name}")
    with FaultProxy(registry) as proxy:
        one = await host(tmp_path, f"{proxy.host}/{name}")
        first = await one.pack(some_starts(one.built, [0]))
        await one.push(first)
        proxy.rules[:] = [Rule("status", "/manifests/", "PUT", status=403, times=None)]
        with pytest.raises(RemoteError):
            await one.push(await one.pack(some_starts(one.built, [0], starts=2)))
        proxy.clear()
        (found,) = await one.attached()
        assert await one.blob(found) == first
