"""Index repositories: an image whose own repository has no index, and what others have of it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
import trio.testing

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.images import LACKING_S
from lazyfs.cache.scans import MadeLayer
from lazyfs.core.index.imageindex import ARTIFACT_TYPE, IMAGE_MEDIA_TYPE, INLINE_BYTES, ImageIndex, encode_image
from lazyfs.core.index.layerindex import LayerHead, encode_parts
from lazyfs.core.oci.digests import Digest
from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.oci.reference import parse_reference
from lazyfs.core.oci.referrers import build_artifact
from lazyfs.errors import UserError
from lazyfs.images.documents import Found, Missing, find_index
from lazyfs.images.elsewhere import ANSWER_S, MIN_BYTES_PER_S, Delivery
from lazyfs.images.resolve import Resolved, close_source
from lazyfs.indexing.assemble import BuiltIndex
from lazyfs.indexing.publish import push_index
from lazyfs.sources.source import Source
from tests.indexing.localimages import (
    OPTIONS,
    big_layer,
    image_store,
    indexed,
    opened,
    resolved,
    small_layer,
    write_image,
)
from tests.indexing.test_indexer import from_tar, read_files
from tests.layertar import LayerTar
from tests.layout import push
from tests.servers import FaultProxy, RegistryServer, Rule, StaticServer

SLACK_S = 1.5  # of a loaded machine


class Case(NamedTuple):
    """An image without an index in its own repository, made by a host of its own. `other`: another image."""

    image: str
    other: str
    registry: RegistryServer
    name: str  # in this test's repositories only
    tmp: Path

    async def push_to(self, repository: str, image: str = "") -> BuiltIndex:
        """As a host that may push there does."""
        maker = CacheDirectory(str(self.tmp / "maker"))
        built, _ = await indexed(maker, image or self.image)
        async with resolved(maker, image or self.image) as found:
            await push_index(maker, found, built, repository)
        return built

    def host(self, name: str = "user") -> CacheDirectory:
        return CacheDirectory(str(self.tmp / name))


@pytest.fixture
def case(registry: RegistryServer, tmp_path: Path) -> Case:
    name = f"elsewhere/{abs(hash(tmp_path.name)):x}"
    write_image(tmp_path / "image", [big_layer()])
    write_image(tmp_path / "other", [small_layer()])
    for image in ("image", "other"):
        push(tmp_path / image, "latest", f"{registry.host}/{name}/{image}:latest")
    return Case(
        f"{registry.host}/{name}/image:latest", f"{registry.host}/{name}/other:latest", registry, name, tmp_path
    )


@pytest.fixture
def proxy(registry: RegistryServer) -> Iterator[FaultProxy]:
    with FaultProxy(registry) as made:
        yield made


async def search(cache: CacheDirectory, case: Case, *repositories: str, image: str = "") -> Found | Missing:
    """What is found; its source is closed."""
    access = OPTIONS._replace(index_repositories=repositories)
    async with resolved(cache, image or case.image, access) as it:
        found = await find_index(cache, it)
        if isinstance(found, Found):
            await close_source(found.source)
    return found


async def test_an_image_is_mounted_by_an_index_from_elsewhere(case: Case) -> None:
    """From a registry with and without placeholders, a directory, and that directory behind a web server."""
    one = f"{case.registry.host}/{case.name}/indexes"
    many = f"{case.registry.host}/{case.name}/by/{{registry}}/{{repository}}"
    directory = f"oci:{case.tmp}/indexes"
    for repository in (one, many, directory):
        await case.push_to(repository)
        await case.push_to(repository, case.other)
    expected = case.registry.host.replace(":", "-")
    assert (case.registry.request("GET", f"/v2/{case.name}/by/{expected}/{case.name}/image/tags/list"))[0] == 200
    with StaticServer(case.tmp / "indexes", case.tmp) as web:
        for number, repository in enumerate((one, many, directory, f"oci+{web.url}")):
            cache = case.host(f"user{number}")
            assert isinstance(await search(case.host(f"without{number}"), case), Missing)
            access = OPTIONS._replace(index_repositories=(repository,))
            async with image_store(cache) as images:
                image = await opened(images, case.image, access)
                assert image.index_place and image.index_source is not image.source
                assert await read_files(image) == from_tar(big_layer())
                assert image.statistics()["requests"] > image.index_source.counters.requests > 0
                await images.close(image)
                # It is kept, with where it comes from, and serves who does not name the index repository.
                image = await opened(images, case.image, OPTIONS._replace(pull="never"))
                assert image.index_place and image.index_source is not image.source
                await images.close(image)
            assert kept(cache, "scans/*/*/[0-9]*")  # windows came, too


async def test_the_own_repository_goes_first_then_in_order(case: Case) -> None:
    first, second, third = (f"oci:{case.tmp}/{name}" for name in ("first", "second", "third"))
    for repository in (second, third):
        await case.push_to(repository)
    await case.push_to(first, case.other)
    found = await search(case.host("a"), case, first, second, third)
    assert isinstance(found, Found) and found.place == second and found.artifact_digest
    await case.push_to("")
    found = await search(case.host("b"), case, first, second, third)
    assert isinstance(found, Found) and found.place == ""


async def test_a_dead_or_missing_one_is_a_reason(case: Case) -> None:
    with FaultProxy(case.registry) as dead:
        pass
    bad = (f"{dead.host}/x", f"oci:{case.tmp}/nowhere", "a.example/{what}", f"oci+http://{dead.host}")
    begun_s = time.monotonic()
    missing = await search(case.host("a"), case, *bad)
    assert time.monotonic() - begun_s < ANSWER_S + SLACK_S
    assert isinstance(missing, Missing) and len(missing.reasons) == 4 and not missing.damaged
    assert all(name in reason for name, reason in zip(bad, missing.reasons, strict=True))
    await case.push_to(f"oci:{case.tmp}/indexes")
    found = await search(case.host("b"), case, *bad, f"oci:{case.tmp}/indexes")
    assert isinstance(found, Found)


@pytest.mark.parametrize(
    ("path", "after_bytes", "costs_s", "reason"),
    [
        ("", None, ANSWER_S, "no answer within 2 s"),
        ("/blobs/", None, ANSWER_S, "comes too slowly"),
        ("/blobs/", 200, ANSWER_S, "comes too slowly"),
    ],
)
async def test_a_silent_one_costs_a_bounded_time(
    case: Case, proxy: FaultProxy, path: str, after_bytes: int | None, costs_s: float, reason: str
) -> None:
    repository = f"{proxy.host}/{case.name}/indexes"
    await case.push_to(repository)
    proxy.rules[:] = [Rule("stall", path, times=None, after_bytes=after_bytes)]
    begun_s = time.monotonic()
    missing = await search(case.host(), case, repository)
    assert time.monotonic() - begun_s < costs_s + SLACK_S
    assert isinstance(missing, Missing) and reason in missing.reasons[0]
    # It said nothing, which is not remembered as a no.
    proxy.clear()
    proxy.break_connections()
    assert isinstance(await search(case.host(), case, repository), Found)


def kept(cache: CacheDirectory, pattern: str) -> list[Path]:
    return list(Path(cache.path).glob(pattern))


def without_windows(built: BuiltIndex) -> bytes:
    """The image's index for a layer whose spans need windows, of which its index has none."""
    (blob,) = built.layers.values()
    head = LayerHead(blob)
    layer = encode_parts(head.record, head.table(), bytes(head.spans()), [], head.entries())
    part = MadeLayer(layer).part
    index = ImageIndex(built.index)
    assert part.head_bytes <= INLINE_BYTES  # so it needs no blob of its own
    heads = {part.index_digest: layer[: part.head_bytes]}
    return encode_image(index.manifest_digest, index.namespace(), [part], heads)


async def test_a_large_one_takes_longer_up_to_a_limit(autojump_clock: trio.testing.MockClock) -> None:
    for until_s, expected_s in ((100.0, 2.0 + 8.0), (7.0, 7.0), (1.0, 2.0)):
        begun_s = trio.current_time()
        delivery = Delivery(2.0, begun_s + until_s)
        with delivery.scope:
            delivery.expect(6 * MIN_BYTES_PER_S)
            delivery.expect(2 * MIN_BYTES_PER_S)
            await trio.sleep_forever()
        assert trio.current_time() - begun_s == pytest.approx(expected_s)


async def test_what_was_evicted_of_a_kept_one_is_fetched_or_passed_over(case: Case, proxy: FaultProxy) -> None:
    """The index is here, the tables of its layers are not."""
    layers = [noise_layer(number) for number in range(3)]  # whose tables do not come with the image's index
    write_image(case.tmp / "large", layers)
    image = f"{case.registry.host}/{case.name}/large:latest"
    push(case.tmp / "large", "latest", image)
    repository = f"{proxy.host}/{case.name}/indexes"
    await case.push_to(repository, image)
    assert isinstance(await search(case.host(), case, repository, image=image), Found)
    proxy.rules[:] = [Rule("stall", times=None)]
    assert isinstance(await search(case.host(), case, image=image), Found)  # all is here
    shutil.rmtree(Path(case.host().path, "scans"))
    begun_s = time.monotonic()
    missing = await search(case.host(), case, image=image)
    assert time.monotonic() - begun_s < ANSWER_S + SLACK_S
    assert isinstance(missing, Missing) and "comes too slowly" in missing.reasons[0]
    proxy.clear()
    proxy.break_connections()
    found = await search(case.host(), case, image=image)
    assert isinstance(found, Found) and found.place == repository and not found.artifact_digest


def noise_layer(number: int) -> bytes:
    tar = LayerTar()
    for file in range(300):
        tar.file(f"{number}/{file}", b"%d %d" % (number, file))
    return tar.data()


async def attach(source: Source, to: Resolved, index: bytes, media_type: str = IMAGE_MEDIA_TYPE) -> None:
    """What somebody else may have put there as an index of an image."""
    await source.push_blob(b"{}")
    layers = [Descriptor(media_type, await source.push_blob(index), len(index))]
    subject = Descriptor(to.manifest.media_type, Digest(to.manifest_digest), len(to.manifest_bytes))
    await source.attach(subject, build_artifact(ARTIFACT_TYPE, layers, subject, {}))


async def test_hostile_ones_are_passed_over(case: Case) -> None:
    """Another image's index, rubbish, what is cut, and one whose parts are sound but do not fit each other."""
    bad, good = f"oci:{case.tmp}/bad", f"oci:{case.tmp}/good"
    ours, foreign = await case.push_to(good), await case.push_to(bad, case.other)
    indexes = [foreign.index, b"rubbish", ours.index[:-1], without_windows(ours)]
    async with bad_source(case, bad) as (source, it):
        for blob in indexes:
            await attach(source, it, blob)
    missing = await search(case.host("a"), case, bad)
    assert isinstance(missing, Missing) and missing.damaged and len(missing.reasons) == len(indexes)
    assert "belongs to another image" in missing.reasons[0]
    assert all(bad in reason for reason in missing.reasons)
    assert "lacks windows" in missing.reasons[3]
    assert not kept(case.host("a"), "indexes/*/image-*")
    found = await search(case.host("b"), case, bad, good)
    assert isinstance(found, Found) and found.place == good


@asynccontextmanager
async def bad_source(case: Case, repository: str) -> AsyncIterator[tuple[Source, Resolved]]:
    """The layout, and the image."""
    async with resolved(case.host("hostile"), case.image) as it:
        source = it.open_beside(parse_reference(repository))
        yield source, it
        await source.aclose()


async def test_a_negative_answer_is_remembered_and_forgotten(case: Case, proxy: FaultProxy) -> None:
    repository = f"{proxy.host}/{case.name}/indexes"
    cache = case.host()
    assert await search(cache, case, repository) == await search(cache, case, repository)
    asked = len(proxy.requests)
    assert asked == 3  # the scheme, the referrers API and the tag; once
    await search(cache, case, repository, image=case.other)
    assert len(proxy.requests) > asked  # by image
    # Another host pushes one: here it is noticed after some minutes.
    await case.push_to(repository)
    proxy.clear()
    assert isinstance(await search(cache, case, repository), Missing) and not proxy.requests
    (noted,) = kept(cache, f"indexes/{digest_of(case).removeprefix('sha256:')}/lacks-*")
    for text in (str(int(time.time() - LACKING_S)), str(int(time.time()) + 1000), "", "rubbish"):
        noted.write_text(text)
        assert isinstance(await search(case.host(), case, repository), Found), text
        for path in noted.parent.glob("image-*"):
            path.unlink()
    assert not noted.exists()  # what is there is not lacking


def digest_of(case: Case) -> str:
    status, headers, _ = case.registry.request(
        "GET",
        f"/v2/{case.name}/image/manifests/latest",
        headers={"Accept": "application/vnd.oci.image.manifest.v1+json"},
    )
    assert status == 200
    return headers["docker-content-digest"]


async def test_who_pushes_one_forgets_that_it_was_lacking(case: Case, proxy: FaultProxy) -> None:
    repository = f"{proxy.host}/{case.name}/indexes"
    cache = case.host()
    assert isinstance(await search(cache, case, repository), Missing)
    built, _ = await indexed(cache, case.image)
    async with resolved(cache, case.image) as it:
        await push_index(cache, it, built, repository)
    assert not kept(cache, "indexes/*/lacks-*")
    # It is kept as one that comes from there.
    proxy.clear()
    found = await search(cache, case)
    assert isinstance(found, Found) and found.place == repository and found.index.manifest_digest == digest_of(case)


async def test_layers_are_pushed_once(case: Case, proxy: FaultProxy) -> None:
    """A base that two images share has one index in an index repository."""
    write_image(case.tmp / "grown", [big_layer(), small_layer()])
    push(case.tmp / "grown", "latest", f"{case.registry.host}/{case.name}/grown:latest")
    repository = f"{proxy.host}/{case.name}/indexes"
    built = await case.push_to(repository)
    (base,) = built.layers
    proxy.clear()
    grown = await case.push_to(repository, f"{case.registry.host}/{case.name}/grown:latest")
    assert base in grown.layers
    assert not [one for one in proxy.matching("PUT", "/blobs/") if base in one.path.replace("%3A", ":")]


async def test_a_web_server_cannot_be_pushed_to(case: Case) -> None:
    with StaticServer(case.tmp, case.tmp) as web, pytest.raises(UserError, match="cannot be written"):
        await case.push_to(f"oci+{web.url}")


async def test_nothing_is_left_open(case: Case) -> None:
    repository = f"oci:{case.tmp}/indexes"
    await case.push_to(repository)
    access = OPTIONS._replace(index_repositories=(f"oci:{case.tmp}/image", repository, f"oci:{case.tmp}/other"))
    await search(case.host(), case, *access.index_repositories)
    before = len(os.listdir("/proc/self/fd"))
    async with image_store(case.host()) as images:
        for _ in range(3):
            await images.close(await opened(images, case.image, access))
    with trio.move_on_after(0):
        await search(case.host("other"), case, *access.index_repositories)
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # trio keeps idle worker threads
