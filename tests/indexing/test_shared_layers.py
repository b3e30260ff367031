"""The index of a layer is made, stored, pushed and fetched once, for all images that have the layer."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.evict import collect, entries, remove
from lazyfs.core.erofs.metadata import Metadata
from lazyfs.core.index.imageindex import ImageIndex
from lazyfs.core.oci.documents import parse_config
from lazyfs.core.tar.tree import LayerEntry, Node, extend
from lazyfs.errors import ImageError
from lazyfs.images.config import load_config
from lazyfs.images.documents import Found, Missing, find_index
from lazyfs.indexing import assemble
from lazyfs.indexing.assemble import BuiltIndex
from lazyfs.indexing.build import build_index
from lazyfs.indexing.publish import push_index
from lazyfs.indexing.small import make_index
from lazyfs.sources.access import Access
from tests.faultproxy import FaultProxy
from tests.indexing.localimages import (
    OFFLINE,
    big_layer,
    image_store,
    indexed,
    noise,
    opened,
    resolved,
    small_layer,
    write_image,
)
from tests.indexing.test_indexer import from_tar, read_files
from tests.layertar import LayerTar
from tests.layout import Layout, push
from tests.servers import RegistryServer


@pytest.fixture
def store(tmp_path: Path) -> CacheDirectory:
    return CacheDirectory(str(tmp_path / "store"))


def base_layer(files: int = 1200) -> bytes:
    """Many small files, whose digests make a large table."""
    tar = LayerTar().dir("lib")
    for number in range(files):
        tar.file(f"lib/{number}", noise(40 + number % 700, number))
    return tar.data()


def cached(cache: CacheDirectory, pattern: str) -> list[Path]:
    return sorted(Path(cache.path).glob(pattern))


def layer_files(cache: CacheDirectory, pattern: str) -> list[Path]:
    return cached(cache, f"scans/{pattern}")


async def made(cache: CacheDirectory, reference: str, *, attach: bool = False) -> BuiltIndex:
    async with resolved(cache, reference) as image:
        built = await make_index(cache, image, parse_config(await load_config(cache, image)), fill=False)
        if attach:
            await push_index(cache, image, built)
    return built


async def found_in(cache: CacheDirectory, reference: str, access: Access | None = None) -> Found | Missing:
    async with resolved(cache, reference, *([access] if access else [])) as image:
        return await find_index(cache, image, offline=access is not None)


async def test_of_a_second_image_only_what_is_new_is_pushed_and_fetched(
    registry: RegistryServer, store: CacheDirectory, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "layout")
    base = [layout.add_layer(base_layer()), layout.add_layer(big_layer())]
    references = []
    with FaultProxy(registry) as proxy:
        for number in range(2):
            change = layout.add_layer(LayerTar().file("app", b"version %d" % number).data())
            layout.tag(f"v{number}", layout.add_image([*base, change]))
            push(layout.path, f"v{number}", f"{registry.host}/shared/app:v{number}")
            references.append(f"{proxy.host}/shared/app:v{number}")
        await made(store, references[0], attach=True)
        proxy.clear()
        second = await made(store, references[1], attach=True)
        assert len(proxy.matching("POST", "/blobs/uploads/")) == 2  # the image's index, and that of its new layer
        assert len(proxy.matching("GET", "/blobs/")) == 2  # the config, and the new layer

        user = CacheDirectory(str(tmp_path / "user"))
        async with image_store(user) as images:
            first = await opened(images, references[0])
            proxy.clear()
            image = await opened(images, references[1])
            new = image.source.counters.bytes_fetched
            assert new <= 0.4 * second.size_bytes
            asked = proxy.matching("GET", "/blobs/")
            assert len(asked) == 2 and not any(request.range for request in asked)  # config and the image's index
            assert (await read_files(image))["/app"] == b"version 1"
            await images.close(image)
            await images.close(first)


async def test_a_mount_reads_no_entries_and_only_those_windows_that_it_needs(
    registry: RegistryServer, store: CacheDirectory, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "layout")
    layers = [base_layer(), *(LayerTar().file(f"f{n}", noise(500, n)).data() for n in range(9))]
    layout.tag("v", layout.add_image([layout.add_layer(layer) for layer in layers]))
    push(layout.path, "v", f"{registry.host}/shared/ten:v")
    with FaultProxy(registry) as proxy:
        reference = f"{proxy.host}/shared/ten:v"
        built = await made(store, reference, attach=True)
        index = ImageIndex(built.index)
        user = CacheDirectory(str(tmp_path / "user"))
        proxy.clear()
        async with image_store(user) as images:
            image = await opened(images, reference)
            asked = proxy.matching("GET", "/blobs/")
            ranges = [request.range for request in asked if request.range]
            # Config, the image's index with nine small heads in it, and the tables of the large layer.
            assert ranges == [f"bytes=0-{index.parts[0].head_bytes - 1}"] and len(asked) == 3
            await images.close(image)
            proxy.clear()
            await images.close(await opened(images, reference, OFFLINE))
            assert not proxy.requests


async def test_a_warm_open_decodes_no_table_and_reads_the_namespace_once(
    store: CacheDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = write_image(tmp_path / "image", [base_layer(), big_layer(), small_layer()])
    await made(store, reference, attach=True)
    for cache in (store, CacheDirectory(str(tmp_path / "user"))):
        async with image_store(cache) as images:
            await images.close(await opened(images, reference))
        read: list[int] = []

        def count(buffer: bytes, read: list[int] = read) -> Metadata:
            read.append(len(buffer))
            return Metadata(buffer)

        def refuse(decoded: object) -> bytes:
            raise AssertionError("it is here already")

        async with image_store(cache) as images:
            with monkeypatch.context() as patch:
                patch.setattr("lazyfs.images.documents.Metadata", count)
                patch.setattr("lazyfs.core.index.layerindex.unpack_table", refuse)
                patch.setattr("lazyfs.core.index.imageindex.ImageIndex.namespace", refuse)
                image = await opened(images, reference, OFFLINE)
            assert len(read) == 1
            await images.close(image)


async def test_rot_in_kept_tables_is_repaired(store: CacheDirectory, tmp_path: Path) -> None:
    """Also where the layer itself is in the cache, so that its table is not read from the index."""
    reference = write_image(tmp_path / "image", [base_layer()])
    await made(store, reference, attach=True)
    user = CacheDirectory(str(tmp_path / "user"))
    async with image_store(user) as images:
        await images.close(await opened(images, reference))
    (head,) = layer_files(user, "*/*/head-*")
    (table,) = cached(user, "layers/*/table")
    whole, whole_table = head.read_bytes(), table.read_bytes()
    head.write_bytes(whole[:-5] + bytes(5))  # in the spans
    async with image_store(user) as images:
        await images.close(await opened(images, reference))
    assert head.read_bytes() == whole
    head.write_bytes(whole[:-500] + bytes(100) + whole[-400:])  # in the table, which nobody reads ...
    async with image_store(user) as images:
        await images.close(await opened(images, reference))
    table.write_bytes(bytes(len(whole_table)))  # ... until that of the layer is damaged, too
    async with image_store(user) as images:
        with pytest.raises(ImageError):
            await opened(images, reference)
        await images.close(await opened(images, reference))
    assert (head.read_bytes(), table.read_bytes()) == (whole, whole_table)


async def test_every_way_to_an_index_makes_the_same_bytes(store: CacheDirectory, tmp_path: Path) -> None:
    """Read anew, from kept scans, grown from a kept tree of the same, of lower, or of other layers."""
    rng = random.Random(5)
    pool = [big_layer(), small_layer(), base_layer(30)]
    for number in range(3):
        tar = LayerTar().file(f"etc/{number}", b"%d" % number).whiteout(f"lib/{number}").hardlink("l", "lib/20")
        pool.append(tar.data())
    for number in range(12):
        layers = [pool[2], *rng.choices(pool, k=rng.randrange(4))]
        reference = write_image(tmp_path / f"image{number}", layers)
        expected, _ = await indexed(CacheDirectory(str(tmp_path / f"fresh{number}")), reference)
        for _ in range(2):
            assert await made(store, reference) == expected


async def test_a_tree_is_grown_by_the_new_layer_alone(
    store: CacheDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replaced last layer, again and again: from the second time on nothing below is flattened."""
    grown: list[tuple[int, int]] = []

    def watch(base: Node, layers: list[list[LayerEntry]], first: int) -> Node:
        grown.append((first, len(layers)))
        return extend(base, layers, first)

    monkeypatch.setattr(assemble, "extend", watch)
    for number in range(3):
        change = LayerTar().file("app", b"version %d" % number).data()
        await made(store, write_image(tmp_path / f"image{number}", [base_layer(50), small_layer(), change]))
    assert grown == [(0, 2), (2, 1), (2, 1), (2, 1)]
    # One that is built on the last.
    await made(store, write_image(tmp_path / "above", [base_layer(50), small_layer(), change, big_layer()]))
    assert grown[4:] == [(3, 1)]


async def test_a_kept_tree_that_is_damaged_or_of_other_layers_is_not_used(
    store: CacheDirectory, tmp_path: Path
) -> None:
    layers = [base_layer(30), small_layer(), LayerTar().file("app", b"1").data()]
    reference = write_image(tmp_path / "image", layers)
    expected = await made(store, reference)
    other = await made(store, write_image(tmp_path / "other", [small_layer()]))
    chains = layer_files(store, "*/chain-*")
    assert len(chains) == 3
    for content in (b"", b"noise", other.index, expected.index[:-1], expected.index[:-9] + bytes(9)):
        for chain in chains:
            chain.write_bytes(content)
        assert await made(store, reference) == expected


async def test_what_was_fetched_makes_no_index(store: CacheDirectory, tmp_path: Path) -> None:
    """Who may attach an index to one image has no say about others that share its layers."""
    reference = write_image(tmp_path / "image", [base_layer()])
    built = await made(store, reference, attach=True)
    user = CacheDirectory(str(tmp_path / "user"))
    assert isinstance(await found_in(user, reference), Found)
    assert layer_files(user, "*/*/head-*") and not layer_files(user, "*/*/layer")
    async with resolved(user, reference) as image:
        config = parse_config(await load_config(user, image))
        (layer,) = image.manifest.layers
        image.source.counters.bytes_fetched = 0
        assert await build_index(image, config, None, index_cache=user) == built
        assert image.source.counters.bytes_fetched == layer.size_bytes
    # The other way round it serves: nothing is fetched of an index whose layers were indexed here.
    shutil.rmtree(Path(user.path, "indexes"))
    async with resolved(user, reference) as image:
        image.source.counters.bytes_fetched = 0
        assert isinstance(await find_index(user, image), Found)
        assert image.source.counters.bytes_fetched < len(built.index) + 4000  # and the artifact's manifest


async def test_evicted_parts_are_fetched_or_made_again(store: CacheDirectory, tmp_path: Path) -> None:
    reference = write_image(tmp_path / "image", [big_layer()])
    await made(store, reference)
    for entry in entries(store):
        if entry.kind == "scan":
            assert remove(store, entry)
    missing = await found_in(store, reference)
    assert isinstance(missing, Missing) and missing.reasons
    await made(store, reference, attach=True)
    for entry in entries(store):
        if entry.kind == "scan":
            assert remove(store, entry)
    async with image_store(store) as images:
        image = await opened(images, reference)
        assert await read_files(image) == from_tar(big_layer())
        collect(store, 0)  # what an open image needs stays
        assert sorted(entry.kind for entry in entries(store)) == ["image", "layer", "scan"]
        await images.close(image)
    async with image_store(store) as images:
        await images.close(await opened(images, reference, OFFLINE))


async def test_tables_that_are_not_those_of_the_index_are_refused(store: CacheDirectory, tmp_path: Path) -> None:
    reference = write_image(tmp_path / "image", [base_layer()])
    built = await made(store, reference, attach=True)
    (digest,) = built.layers
    blob = tmp_path / "image/blobs/sha256" / digest.removeprefix("sha256:")
    sound = blob.read_bytes()
    for number, content in enumerate((sound[:200], b"", None, sound[:100] + bytes(100) + sound[200:])):
        blob.unlink(missing_ok=True)
        if content is not None:
            blob.write_bytes(content)
        missing = await found_in(CacheDirectory(str(tmp_path / f"user{number}")), reference)
        assert isinstance(missing, Missing) and len(missing.reasons) == 1
    # Rot in what was fetched is noticed as well, and fetched again.
    blob.write_bytes(sound)
    user = CacheDirectory(str(tmp_path / "user"))
    assert isinstance(await found_in(user, reference), Found)
    (head,) = layer_files(user, "*/*/head-*")
    whole = head.read_bytes()
    for rotten in (whole[:-1], b"", whole[:-50] + bytes(50), bytes(len(whole))):
        head.write_bytes(rotten)
        assert isinstance(await found_in(user, reference, OFFLINE), Missing)
        assert isinstance(await found_in(user, reference), Found)
        assert head.read_bytes() == whole
