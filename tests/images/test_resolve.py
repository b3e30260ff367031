"""From a reference to an opened image: registries, offline, attached indexes good and bad, joined opens."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.images import index_directory
from lazyfs.core.index.imageindex import ARTIFACT_TYPE, IMAGE_MEDIA_TYPE
from lazyfs.core.index.layerindex import LAYER_MEDIA_TYPE
from lazyfs.core.oci.digests import Digest
from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.oci.referrers import build_artifact
from lazyfs.errors import HostError, ImageError, LazyfsError, UserError
from lazyfs.images.documents import Found, Missing, find_index
from lazyfs.images.resolve import Resolved, resolve
from lazyfs.indexing.assemble import BuiltIndex
from lazyfs.indexing.publish import attach_index, push_index, write_layout
from lazyfs.serving.image import Image
from tests.indexing.localimages import (
    OFFLINE,
    big_layer,
    image_store,
    indexed,
    opened,
    resolved,
    small_layer,
    write_image,
)
from tests.indexing.test_indexer import from_tar, read_files
from tests.layout import push
from tests.servers import RegistryServer


@pytest.fixture
def store(tmp_path: Path) -> CacheDirectory:
    return CacheDirectory(str(tmp_path / "store"))


async def build(store: CacheDirectory, reference: str) -> BuiltIndex:
    built, _ = await indexed(store, reference)
    return built


async def test_an_image_in_a_registry_with_an_attached_index_mounts_from_an_empty_cache(
    registry: RegistryServer, tmp_path: Path
) -> None:
    write_image(tmp_path / "image", [big_layer()])
    reference = f"{registry.host}/resolve/attached:latest"
    push(tmp_path / "image", "latest", reference)
    maker = CacheDirectory(str(tmp_path / "maker"))
    built = await build(maker, reference)
    async with resolved(maker, reference) as found:
        first = await attach_index(found.source, found, built)
        assert await attach_index(found.source, found, built) == first  # safe to repeat
    user = CacheDirectory(str(tmp_path / "user"))
    async with image_store(user) as images:
        image = await opened(images, reference)
        assert await read_files(image) == from_tar(big_layer())
        digest = image.manifest_digest
        await images.close(image)
        # Now everything is here: offline, and by digest without a request.
        image = await opened(images, reference, OFFLINE)
        assert await read_files(image) == from_tar(big_layer())
        assert image.source.counters.requests == 0
        await images.close(image)
        pinned = f"{registry.host}/resolve/attached@{digest}"
        with pytest.raises(UserError, match="not in the cache"):
            await opened(images, pinned, OFFLINE)
        await images.close(await opened(images, pinned))
        image = await opened(images, pinned)
        assert image.source.counters.requests == 0
        await images.close(image)
        assert not images.devices and not images.images


async def test_offline_and_unknown(store: CacheDirectory, tmp_path: Path) -> None:
    reference = write_image(tmp_path / "image", [small_layer()])
    with pytest.raises(UserError, match="not in the cache"):
        await resolve(store, reference, OFFLINE)
    async with resolved(store, reference) as found:
        assert await find_index(store, found) == Missing(found.manifest_digest)
    async with resolved(store, reference, OFFLINE) as again:
        assert again.manifest_digest == found.manifest_digest


async def test_a_damaged_note_or_manifest_is_asked_for_again(store: CacheDirectory, tmp_path: Path) -> None:
    reference = write_image(tmp_path / "image", [small_layer()])
    async with resolved(store, reference) as found:
        pass
    refs = os.path.join(store.path, "refs")
    (note,) = os.listdir(refs)
    manifest = Path(index_directory(store, found.manifest_digest), "manifest")
    for path in (Path(refs, note), manifest):
        for damage in (b"", bytes(71), b"sha256:../../..", b"\xff" * 10):
            good = path.read_bytes()
            path.write_bytes(damage)
            with pytest.raises(UserError):
                await resolve(store, reference, OFFLINE)
            async with resolved(store, reference) as again:
                assert again.manifest_bytes == found.manifest_bytes
            assert path.read_bytes() == good


async def attach(found: Resolved, image: bytes, *more: bytes, media_type: str = IMAGE_MEDIA_TYPE) -> None:
    source = found.source
    await source.push_blob(b"{}")
    layers = [Descriptor(media_type, await source.push_blob(image), len(image))]
    layers += [Descriptor(LAYER_MEDIA_TYPE, await source.push_blob(one), len(one)) for one in more]
    subject = Descriptor(found.manifest.media_type, Digest(found.manifest_digest), len(found.manifest_bytes))
    await source.attach(subject, build_artifact(ARTIFACT_TYPE, layers, subject, {}))


async def test_bad_indexes_are_passed_over_for_a_good_one(store: CacheDirectory, tmp_path: Path) -> None:
    reference = write_image(tmp_path / "image", [big_layer()])
    other = write_image(tmp_path / "other", [small_layer()])
    built, foreign = await build(store, reference), await build(store, other)
    async with resolved(store, reference) as found:
        (layer,) = built.layers.values()
        await attach(found, b"rubbish")
        await attach(found, foreign.index)
        await attach(found, built.index[:-1], layer)
        await attach(found, built.index, layer, media_type="application/octet-stream")
        await attach(found, b"LZFSIMG3" + built.index[8:], layer)
        missing = await find_index(store, found)
        assert isinstance(missing, Missing) and missing.manifest_digest == found.manifest_digest
        assert len(missing.reasons) == 5
        for reason in ("belongs to another image", "no index of a version that lazyfs knows"):
            assert any(reason in one for one in missing.reasons), missing.reasons
        await attach_index(found.source, found, built)
        index = await find_index(store, found)
        assert isinstance(index, Found) and index.index.manifest_digest == found.manifest_digest
        assert index.artifact_digest and [one.windows_digest for one in index.layers.values()] == list(built.layers)
        # It was kept; rot in it leads back to the attached one.
        kept = trio.Path(index_directory(store, found.manifest_digest), "image-attached")
        assert await kept.read_bytes() == built.index
        await kept.write_bytes(b"")
        missing = await find_index(store, found, offline=True)
        assert isinstance(missing, Missing) and "in the cache" in missing.reasons[0]
        assert isinstance(await find_index(store, found), Found)
        assert await kept.read_bytes() == built.index


async def test_an_index_can_be_written_to_a_layout_of_its_own(store: CacheDirectory, tmp_path: Path) -> None:
    reference = write_image(tmp_path / "image", [big_layer()])
    built = await build(store, reference)
    async with resolved(store, reference) as found:
        digest = await write_layout(str(tmp_path / "out"), found, built)
    manifest = json.loads((tmp_path / "out/blobs/sha256" / digest.removeprefix("sha256:")).read_bytes())
    assert manifest["artifactType"] == ARTIFACT_TYPE
    assert manifest["subject"]["digest"] == found.manifest_digest
    (tmp_path / "file").write_text("")
    async with resolved(store, reference) as found:
        with pytest.raises(HostError):
            await write_layout(str(tmp_path / "file"), found, built)


async def test_images_that_are_opened_twice_are_shared_and_closed_with_the_last_user(
    store: CacheDirectory, tmp_path: Path
) -> None:
    reference = write_image(tmp_path / "image", [big_layer(), small_layer()])
    second = write_image(tmp_path / "second", [big_layer()], "zstd")  # the same layer in another blob
    for image_reference in (reference, second):
        async with resolved(store, image_reference) as found:
            built = await build(store, image_reference)
            await attach_index(found.source, found, built)
    async with image_store(store) as images:
        users: list[Image] = []

        async def open_one(text: str) -> None:
            users.append(await opened(images, text))

        async with trio.open_nursery() as openers:
            for text in [reference, second] * 4:
                openers.start_soon(open_one, text)
        assert len({id(image) for image in users}) == 2
        assert sorted(image.users for image in images.images.values()) == [4, 4]
        assert len(images.devices) == 2  # the big layer once
        one = next(image for image in users if image.reference == second)
        for image in [image for image in users if image is not one]:
            await images.close(image)
        assert len(images.devices) == 2 - 1 and len(images.images) == 1
        for _ in range(3):
            await images.close(one)
        assert await read_files(one) == from_tar(big_layer())
        await images.close(one)
        assert not images.images and not images.devices
        with pytest.raises(HostError, match="closed"):
            one.layers[0].read_cached(0, 1)


async def test_a_failed_open_leaves_nothing_open(store: CacheDirectory, tmp_path: Path) -> None:
    reference = write_image(tmp_path / "image", [big_layer()])
    built = await build(store, reference)
    async with resolved(store, reference) as found:
        await push_index(store, found, built)
    async with image_store(store) as images:
        before = len(os.listdir("/proc/self/fd"))
        config = json.loads(found.manifest_bytes)["config"]["digest"].removeprefix("sha256:")
        kept = tmp_path / "image/blobs/sha256" / config
        content = kept.read_bytes()
        kept.write_bytes(b"{}")
        os.unlink(os.path.join(index_directory(store, found.manifest_digest), "config"))
        with pytest.raises(ImageError):
            await opened(images, reference)
        kept.write_bytes(content)
        os.chmod(store.path, 0o700)
        os.rename(os.path.join(store.path, "layers"), os.path.join(store.path, "moved"))
        await trio.Path(store.path, "layers").write_text("")
        with pytest.raises(LazyfsError):
            await opened(images, reference)
        os.unlink(os.path.join(store.path, "layers"))
        os.rename(os.path.join(store.path, "moved"), os.path.join(store.path, "layers"))
        assert not images.images and not images.devices
        assert len(os.listdir("/proc/self/fd")) <= before + 2  # trio keeps idle worker threads, not files
        image = await opened(images, reference)
        await images.close(image)
