"""One pass over real layers: the index says where everything is, and a fill makes the cache complete."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.core.erofs.reader import ErofsReader
from lazyfs.core.index.imageindex import ImageIndex
from lazyfs.core.layer.blocks import BlockTable
from lazyfs.core.layer.spans import Compression, SpanTable
from lazyfs.core.oci.digests import Digest
from lazyfs.core.oci.documents import parse_config
from lazyfs.core.tar.kinds import Kind
from lazyfs.errors import ImageError, LazyfsError
from lazyfs.images.config import load_config
from lazyfs.indexing.build import build_index
from lazyfs.indexing.publish import push_index
from lazyfs.serving.image import Image
from lazyfs.sources.source import Source
from tests.indexing import localimages
from tests.indexing.localimages import (
    big_layer,
    empty_layer,
    image_store,
    indexed,
    layer_heads,
    noise,
    small_layer,
    write_image,
)
from tests.layertar import LayerTar
from tests.layout import GZIP, PLAIN, ZSTD, ZSTD_FRAMES, Layout

COMPRESSIONS = [GZIP, ZSTD, ZSTD_FRAMES, PLAIN]


@pytest.fixture
def store(tmp_path: Path) -> CacheDirectory:
    return CacheDirectory(str(tmp_path / "store"))


def tree(reader: ErofsReader) -> dict[str, int]:
    """Path -> nid of all regular files."""
    found: dict[str, int] = {}
    todo = [("", reader.root_nid)]
    while todo:
        path, nid = todo.pop()
        for name, child, _ in reader.entries(nid):
            if name in (b".", b".."):
                continue
            inode = reader.inode(child)
            full = f"{path}/{os.fsdecode(name)}"
            if inode.kind == Kind.DIR:
                todo.append((full, child))
            elif inode.kind == Kind.FILE:
                found[full] = child
    return found


async def read_files(image: Image, limit: int = 4 << 20) -> dict[str, bytes]:
    """The files of an opened image, the first `limit` bytes of each."""
    reader = ErofsReader(await trio.Path(image.namespace_path).read_bytes())
    contents = {}
    for path, nid in tree(reader).items():
        inode = reader.inode(nid)
        data = b""
        if inode.size:
            data = await image.layers[inode.device].read(inode.address, min(inode.size, limit))
        contents[path] = data[: inode.size]
    return contents


def from_tar(layer: bytes) -> dict[str, bytes]:
    contents = {}
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        for member in archive:
            if member.isreg() or member.islnk():
                file = archive.extractfile(member)
                assert file is not None
                contents["/" + member.name] = file.read()
    return contents


@pytest.mark.parametrize("compression", COMPRESSIONS)
async def test_an_index_serves_every_file_and_a_fill_needs_no_fetch(
    store: CacheDirectory, tmp_path: Path, compression: str
) -> None:
    reference = write_image(tmp_path / "image", [big_layer(), small_layer(), empty_layer()], compression)
    built, index = await indexed(store, reference)
    assert [layer.compression for layer in index.layers] == [
        compression.split("-")[0].replace("none", "plain")
    ] * 3
    assert store.content_roots() == []
    expected = from_tar(big_layer()) | from_tar(small_layer())
    del expected["/data/2"], expected["/data/.wh.2"]

    async with localimages.resolved(store, reference) as found:
        await push_index(store, found, built)
    async with image_store(store) as images:
        image = await localimages.opened(images, reference)
        assert await read_files(image) == expected
        assert image.source.counters.bytes_fetched > 0
        await images.close(image)

    filled = CacheDirectory(str(tmp_path / "filled"))
    built_again, _ = await indexed(filled, reference, fill=True)
    assert built_again == built  # deterministic, filling or not
    for number in range(3):
        layer = filled.open_layer(index.layers[number].content_root)
        assert layer is not None
        assert layer.missing(range(layer.table.count)) == []
        assert layer.verify() == []
        layer.close()
    assert os.listdir(os.path.join(filled.path, "tmp")) == []


class Recut:
    """A source whose streams come in pieces of another size, as a slower network would deliver them."""

    def __init__(self, source: Source, piece_bytes: int) -> None:
        self._source = source
        self._piece_bytes = piece_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    @asynccontextmanager
    async def blob_stream(self, digest: Digest, size_bytes: int) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._source.blob_stream(digest, size_bytes) as chunks:
            yield self._pieces(chunks)

    async def _pieces(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            for at in range(0, len(chunk), self._piece_bytes):
                yield chunk[at : at + self._piece_bytes]


@pytest.mark.parametrize("compression", COMPRESSIONS)
async def test_the_index_does_not_depend_on_how_the_network_cuts_a_layer(
    store: CacheDirectory, tmp_path: Path, compression: str
) -> None:
    reference = write_image(tmp_path / "image", [big_layer()], compression)
    built, index = await indexed(store, reference)
    record = index.layers[0]
    (head,) = layer_heads(built)
    spans = SpanTable(record.compression, record.blob_bytes, record.tar_bytes, head.spans())
    assert record.compression is not Compression.GZIP or spans.windows > 1
    async with localimages.resolved(store, reference) as found:
        config = parse_config(await load_config(store, found))
        source = found.source
        for piece_bytes in (1, 1000, 65_537) if record.blob_bytes < 100_000 else (999, 65_537, 1 << 20):
            found.source = cast(Source, Recut(source, piece_bytes))
            assert await build_index(found, config, None) == built


@pytest.mark.parametrize("compression", COMPRESSIONS)
async def test_block_tables_point_to_the_data_in_the_tar(
    store: CacheDirectory, tmp_path: Path, compression: str
) -> None:
    layer = big_layer()
    built, _ = await indexed(store, write_image(tmp_path / "image", [layer], compression))
    table = BlockTable(layer_heads(built)[0].table())
    assert table.tar_bytes == len(layer)
    for block in range(table.count):
        start = table.tar_offsets[block]
        content = layer[start : start + table.lengths[block]]
        assert hashlib.sha256(content).digest() == table.digest(block)


@pytest.mark.parametrize("form", ["--format=gnu", "--format=posix", "--format=posix --sparse-version=0.1"])
async def test_sparse_files_keep_their_holes(store: CacheDirectory, tmp_path: Path, form: str) -> None:
    reference = write_image(tmp_path / "image", [localimages.sparse_layer(tmp_path / "made", form)])
    built, index = await indexed(store, reference, fill=True)
    table = BlockTable(layer_heads(built)[0].table())
    assert sum(table.lengths) < 1_000_000
    reader = ErofsReader(index.namespace())
    files = tree(reader)
    holes, hole = reader.inode(files["/s/holes"]), reader.inode(files["/s/hole"])
    assert (holes.size, hole.size) == ((1 << 30) + 1, 1 << 40)
    layer = store.open_layer(index.layers[0].content_root)
    assert layer is not None
    for offset in (0, 5 << 20, 900 << 20):
        assert layer.read(holes.address + offset, 300_000) == noise(300_000, offset)
    assert layer.read(holes.address + (100 << 20), 100_000) == bytes(100_000)
    assert layer.read(hole.address + (1 << 39), 4096) == bytes(4096)
    layer.close()


async def test_a_layer_that_occurs_twice_is_read_once(store: CacheDirectory, tmp_path: Path) -> None:
    reference = write_image(tmp_path / "image", [small_layer(), empty_layer(), small_layer()])
    async with localimages.resolved(store, reference) as found:
        config = parse_config(await load_config(store, found))
        found.source.counters.requests = 0
        built = await build_index(found, config, None)
        assert found.source.counters.requests == 2
    index = ImageIndex(built.index)
    assert len(index.layers) == 3
    assert len(ErofsReader(index.namespace()).devices) == 1


async def test_an_image_of_nothing_but_empty_layers_or_none(store: CacheDirectory, tmp_path: Path) -> None:
    directories = LayerTar().dir("only").dir("only/directories").data()
    for number, layers in enumerate(([], [empty_layer()], [directories])):
        built, index = await indexed(store, write_image(tmp_path / f"image{number}", layers), fill=True)
        assert ErofsReader(index.namespace()).devices == ()
        assert [BlockTable(head.table()).count for head in layer_heads(built)] == [0] * len(layers)


def spoil_config(path: Path, change: Any) -> str:
    """A layout whose image config was changed (and its manifest with it); returns the reference."""
    layout = Layout(path)
    manifest = layout.document(layout.resolve("latest"))
    config = layout.document(manifest["config"])
    change(config["rootfs"]["diff_ids"])
    manifest["config"] = layout.add_json(config, manifest["config"]["mediaType"])
    layout.tag("spoiled", layout.add_json(manifest, manifest["mediaType"]))
    return f"oci:{path}:spoiled"


@pytest.mark.parametrize(
    "change",
    [
        lambda ids: ids.__setitem__(0, "sha256:" + "0" * 64),
        lambda ids: ids.pop(),
        lambda ids: ids.append(ids[0]),
        lambda ids: ids.reverse(),
    ],
)
async def test_layers_that_are_not_those_of_the_config_are_refused(
    store: CacheDirectory, tmp_path: Path, change: Any
) -> None:
    write_image(tmp_path / "image", [big_layer(), small_layer()])
    with pytest.raises(ImageError):
        await indexed(store, spoil_config(tmp_path / "image", change), fill=True)
    assert os.listdir(os.path.join(store.path, "tmp")) == []


@pytest.mark.parametrize("fault", ["cut", "flip", "garbage", "not a tar", "missing", "empty"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
async def test_a_broken_layer_is_a_clear_error_and_leaves_nothing(
    store: CacheDirectory, tmp_path: Path, compression: str, fault: str
) -> None:
    layout = Layout(tmp_path / "image")
    descriptor, diff_id = layout.add_layer(
        big_layer() if fault != "not a tar" else b"no tar" * 500, compression
    )
    blob = layout.blob_path(descriptor["digest"])
    data = bytearray(blob.read_bytes())
    if fault == "cut":
        del data[len(data) // 2 :]
    elif fault == "flip":
        data[len(data) // 2] ^= 1
    elif fault == "garbage":
        data += b"garbage"
    elif fault == "empty":
        data.clear()
    descriptor = {**layout.add_blob(bytes(data), descriptor["mediaType"])}
    if fault == "missing":
        layout.blob_path(descriptor["digest"]).unlink()
    layout.tag("latest", layout.add_image([(descriptor, diff_id)]))
    with pytest.raises(LazyfsError) as caught:
        await indexed(store, f"oci:{tmp_path}/image:latest", fill=True)
    assert caught.type.__name__ in ("ImageError", "NotFound")
    assert (caught.type.__name__ == "NotFound") == (fault == "missing")
    assert os.listdir(os.path.join(store.path, "tmp")) == []


async def test_a_blob_that_lies_about_its_digest_is_refused(store: CacheDirectory, tmp_path: Path) -> None:
    reference = write_image(tmp_path / "image", [big_layer()], PLAIN)
    layout = Layout(tmp_path / "image")
    manifest = layout.document(layout.resolve("latest"))
    blob = layout.blob_path(manifest["layers"][0]["digest"])
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1  # behind the end of the archive: only the digests can tell
    blob.write_bytes(data)
    with pytest.raises(ImageError):
        await indexed(store, reference, fill=True)
    assert os.listdir(os.path.join(store.path, "tmp")) == []
    assert json.loads((tmp_path / "image" / "index.json").read_text())
