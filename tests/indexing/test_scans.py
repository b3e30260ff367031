"""A layer that was read for one image is not read again for another one, and nothing else changes by that."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.evict import collect, entries
from lazyfs.cache.images import has_index
from lazyfs.cache.scans import KeptLayerIndex
from lazyfs.core.oci.digests import Digest
from lazyfs.core.oci.documents import parse_config
from lazyfs.errors import HostError, ImageError
from lazyfs.images.config import load_config
from lazyfs.indexing.assemble import BuiltIndex
from lazyfs.indexing.build import build_index
from lazyfs.indexing.small import make_small_index
from tests.indexing import localimages
from tests.indexing.localimages import big_layer, empty_layer, small_layer, write_image


@pytest.fixture
def store(tmp_path: Path) -> CacheDirectory:
    return CacheDirectory(str(tmp_path / "store"))


async def build(store: CacheDirectory, reference: str, scans: CacheDirectory | None) -> tuple[BuiltIndex, list[int]]:
    """An index, and the numbers of the layers that were read for it, by the bytes that came."""
    async with localimages.resolved(store, reference) as found:
        config = parse_config(await load_config(store, found))
        found.source.counters.bytes_fetched = 0
        built = await build_index(found, config, None, index_cache=scans)
        sizes = [layer.size_bytes for layer in found.manifest.layers]
        ways = [n for n in range(1 << len(sizes)) if _sum(sizes, n) == found.source.counters.bytes_fetched]
        assert len(ways) == 1, "the sizes of the layers do not tell them apart"
        return built, [i for i in range(len(sizes)) if ways[0] >> i & 1]


def _sum(sizes: list[int], chosen: int) -> int:
    return sum(size for i, size in enumerate(sizes) if chosen >> i & 1)


def kept(store: CacheDirectory) -> list[Path]:
    return sorted(Path(store.path, "scans").glob("*/*/layer"))


async def test_only_new_layers_are_read(store: CacheDirectory, tmp_path: Path) -> None:
    first = write_image(tmp_path / "first", [big_layer(), small_layer()])
    second = write_image(tmp_path / "second", [big_layer(), empty_layer(), small_layer()])
    _, read = await build(store, first, store)
    assert read == [0, 1]
    assert len(kept(store)) == 2
    built, read = await build(store, second, store)
    assert read == [1]
    assert (await build(store, second, None)) == (built, [0, 1, 2])
    assert (await build(store, second, store)) == (built, [])


async def test_a_small_index_that_takes_long_is_left_to_the_command(
    store: CacheDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is kept, and the next try may be in time."""
    async with localimages.resolved(store, write_image(tmp_path / "image", [small_layer()])) as found:
        config = parse_config(await load_config(store, found))
        with monkeypatch.context() as patch:
            patch.setattr("lazyfs.indexing.small._SMALL_S", 0.0)
            assert not await make_small_index(store, found, config)
        assert not has_index(store, found.manifest_digest)
        assert await make_small_index(store, found, config)
        assert has_index(store, found.manifest_digest)


@pytest.mark.parametrize("content", [b"", b"noise", None])
async def test_a_damaged_scan_is_made_anew(store: CacheDirectory, tmp_path: Path, content: bytes | None) -> None:
    reference = write_image(tmp_path / "image", [big_layer()])
    built, _ = await build(store, reference, store)
    (path,) = kept(store)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10] if content is None else content)
    assert await build(store, reference, store) == (built, [0])
    assert path.read_bytes() == whole


async def test_a_scan_of_other_content_is_not_taken(store: CacheDirectory, tmp_path: Path) -> None:
    """As if another layer had been filed under this digest: the config's DiffID tells."""
    reference = write_image(tmp_path / "image", [big_layer()])
    built, _ = await build(store, reference, store)
    (path,) = kept(store)
    other = write_image(tmp_path / "other", [small_layer()])
    await build(store, other, store)
    (strange,) = set(kept(store)) - {path}
    path.write_bytes(strange.read_bytes())
    assert await build(store, reference, store) == (built, [0])


async def test_a_layer_of_another_size_is_read(store: CacheDirectory, tmp_path: Path) -> None:
    """The manifest lies about the size: that has to be found out, not taken for known."""
    reference = write_image(tmp_path / "image", [big_layer()])
    await build(store, reference, store)
    async with localimages.resolved(store, reference) as found:
        config = parse_config(await load_config(store, found))
        (layer,) = found.manifest.layers
        other = layer._replace(size_bytes=layer.size_bytes - 1)
        found.manifest = found.manifest._replace(layers=(other,))
        with pytest.raises(ImageError):
            await build_index(found, config, None, index_cache=store)


async def test_a_scan_that_cannot_be_kept_is_an_error_of_this_host(store: CacheDirectory, tmp_path: Path) -> None:
    """Whoever mounts the image takes the windows from there."""
    os.rmdir(os.path.join(store.path, "scans"))
    os.symlink("nowhere", os.path.join(store.path, "scans"))
    with pytest.raises(HostError):
        await build(store, write_image(tmp_path / "image", [small_layer()]), store)


async def test_scans_are_listed_and_pruned(store: CacheDirectory, tmp_path: Path) -> None:
    await build(store, write_image(tmp_path / "image", [big_layer()]), store)
    (scan,) = [entry for entry in entries(store) if entry.kind == "scan"]
    assert scan.size_bytes > 0
    assert not scan.in_use
    collect(store, None)
    assert kept(store) == []


def test_a_head_is_found_by_who_names_its_digest(store: CacheDirectory) -> None:
    """An image's index that names a wrong head of another's layer index has it to itself."""
    with contextlib.closing(KeptLayerIndex(store, Digest("sha256:" + "1" * 64), Digest("sha256:" + "2" * 64))) as kept:
        kept.keep_head(b"wrong", "a" * 64)
        kept.keep_head(b"right", "b" * 64)
        assert kept.head(5, "a" * 64) == b"wrong" and kept.head(5, "b" * 64) == b"right"
        assert kept.head(5, "c" * 64) is None
        kept.forget()
        assert kept.head(5, "a" * 64) is kept.head(5, "b" * 64) is None
