"""Indexes of version 1, attached or in a cache, are read as ever; what is made new is of version 2, and preferred."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.cache.directory import CacheDirectory
from lazyfs.core.erofs.reader import ErofsReader
from lazyfs.core.index.imageindex import ImageIndex
from lazyfs.core.index.v1 import IndexV1
from lazyfs.core.oci.documents import parse_config
from lazyfs.errors import ImageError
from lazyfs.images.config import load_config
from lazyfs.images.documents import Found, find_index
from lazyfs.indexing.publish import push_index
from lazyfs.indexing.small import make_index
from lazyfs.sources.access import Access
from tests.images import v1image
from tests.indexing.localimages import OFFLINE, image_store, indexed, opened, resolved
from tests.indexing.test_indexer import read_files


def kept(cache: CacheDirectory, pattern: str) -> list[Path]:
    return list(Path(cache.path).glob(pattern))


async def found_in(cache: CacheDirectory, reference: str) -> Found:
    async with resolved(cache, reference) as image:
        found = await find_index(cache, image)
    assert isinstance(found, Found)
    return found


async def test_an_attached_index_mounts(tmp_path: Path) -> None:
    reference, _ = v1image.unpack(tmp_path)
    cache = CacheDirectory(str(tmp_path / "new"))
    assert isinstance((await found_in(cache, reference)).index, IndexV1)
    for access in (Access(platform="linux/amd64"), OFFLINE):
        async with image_store(cache) as images:
            image = await opened(images, reference, access)
            assert await read_files(image) == v1image.contents(tmp_path)
            await images.close(image)
    assert kept(cache, "indexes/*/groups/*")  # a window was needed


async def test_an_existing_cache_is_used(tmp_path: Path) -> None:
    reference, directory = v1image.unpack(tmp_path)
    for path in (tmp_path / "image/blobs/sha256").iterdir():
        if path.stat().st_size < 2000 and b"lazyfs.index" in path.read_bytes():
            path.unlink()  # the artifact
    cache = CacheDirectory(str(directory))
    found = await found_in(cache, reference)
    assert isinstance(found.index, IndexV1) and not found.artifact_digest
    async with image_store(cache) as images:
        image = await opened(images, reference)
        assert await read_files(image) == v1image.contents(tmp_path)
        await images.close(image)


async def test_old_scans_are_made_anew(tmp_path: Path) -> None:
    """And what is made of it is what a host without them makes."""
    reference, directory = v1image.unpack(tmp_path)
    cache = CacheDirectory(str(directory))
    assert len(kept(cache, "scans/*/scan")) == v1image.LAYERS
    async with resolved(cache, reference) as image:
        built = await make_index(cache, image, parse_config(await load_config(cache, image)), fill=False)
    assert not kept(cache, "scans/*/scan")
    assert len(kept(cache, "scans/*/*/layer")) == v1image.LAYERS
    assert built == (await indexed(CacheDirectory(str(tmp_path / "other")), reference))[0]
    assert isinstance((await found_in(cache, reference)).index, ImageIndex)


async def test_version_2_is_attached_beside_it_and_preferred(tmp_path: Path) -> None:
    reference, _ = v1image.unpack(tmp_path)
    maker, user = (CacheDirectory(str(tmp_path / name)) for name in ("maker", "user"))
    built, _ = await indexed(maker, reference)
    async with resolved(maker, reference) as image:
        await push_index(maker, image, built)
    found = await found_in(user, reference)
    assert isinstance(found.index, ImageIndex) and found.artifact_digest
    async with image_store(user) as images:
        image_2 = await opened(images, reference)
        assert await read_files(image_2) == v1image.contents(tmp_path)
        await images.close(image_2)


@pytest.fixture(scope="module")
def blob(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("v1")
    v1image.unpack(directory)
    (path,) = (directory / "cache").glob("indexes/*/index")
    content = path.read_bytes()
    shutil.rmtree(directory)
    return content


def read_all(blob: bytes) -> tuple[bytes, ...]:
    index = IndexV1(blob)
    ErofsReader(index.namespace()).check()
    layers = [index.layer(number) for number in range(len(index.layers))]
    return (index.namespace(), *(part for layer in layers for part in (layer.table(), layer.spans())))


@settings(deadline=None, max_examples=300)
@given(at=st.integers(0, 1 << 20), mask=st.integers(1, 255))
def test_a_flipped_byte_changes_nothing_or_is_noticed(blob: bytes, at: int, mask: int) -> None:
    damaged = bytearray(blob)
    damaged[at % len(blob)] ^= mask
    with contextlib.suppress(ImageError):
        assert read_all(bytes(damaged)) == read_all(blob)


@given(length=st.integers(0, 1 << 20), noise=st.binary(max_size=100))
def test_cut_and_foreign_blobs_are_refused(blob: bytes, length: int, noise: bytes) -> None:
    for content in (blob[: length % len(blob)], noise, b"LZFSIDX1" + noise):
        with pytest.raises(ImageError):
            read_all(content)
