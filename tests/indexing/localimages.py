"""Small images in layout directories, made in a moment, and what they decode to."""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from backports import zstd

from lazyfs.cache.directory import CacheDirectory
from lazyfs.core.index.imageindex import ImageIndex
from lazyfs.core.index.layerindex import LayerHead
from lazyfs.core.oci.documents import parse_config
from lazyfs.images.config import load_config
from lazyfs.images.resolve import Resolved, resolve
from lazyfs.indexing.assemble import BuiltIndex
from lazyfs.indexing.build import build_index
from lazyfs.serving.image import Image
from lazyfs.serving.store import ImageStore
from lazyfs.sources.access import Access
from tests.layertar import LayerTar
from tests.layout import GZIP, Layout

OPTIONS = Access(platform="linux/amd64")
OFFLINE = OPTIONS._replace(pull="never")


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes that compress to about half."""
    return random.Random(seed).randbytes(size // 2).hex().encode()[:size]


def big_layer() -> bytes:
    """5 MiB in files of all sizes: several spans, however it is compressed."""
    tar = LayerTar().dir("data")
    for number, size in enumerate((3_000_000, 0, 1, 700_000, 4096, 262_145, 1_000_000)):
        tar.file(f"data/{number}", noise(size, number))
    return tar.hardlink("data/link", "data/0").symlink("data/symbolic", "0").data()


def small_layer() -> bytes:
    return LayerTar().file("etc/one", b"one\n").whiteout("data/2").file("data/3", b"replaced\n").data()


def empty_layer() -> bytes:
    return LayerTar().data()


def sparse_layer(directory: Path, form: str) -> bytes:
    """A file with large holes and one that is nothing but a hole, by GNU tar."""
    (directory / "s").mkdir(parents=True)
    with open(directory / "s" / "holes", "wb") as file:
        for offset in (0, 5 << 20, 900 << 20):
            file.seek(offset)
            file.write(noise(300_000, offset))
        file.truncate((1 << 30) + 1)
    with open(directory / "s" / "hole", "wb") as file:
        file.truncate(1 << 40)
    command = ["tar", "--sparse", *form.split(), "-C", str(directory), "-cf", "-", "s"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def write_image(path: Path, layers: Sequence[bytes], compression: str = GZIP, tag: str = "latest") -> str:
    """A layout with one image; returns its reference."""
    layout = Layout(path)
    layout.tag(tag, layout.add_image([layout.add_layer(layer, compression) for layer in layers]))
    return f"oci:{path}:{tag}"


async def opened(store: ImageStore, reference: str, access: Access = OPTIONS) -> Image:
    """The image, which has an index, opened."""
    image = await store.open(reference, access, 30.0)
    assert isinstance(image, Image)
    return image


@asynccontextmanager
async def resolved(
    cache: CacheDirectory, reference: str, access: Access = OPTIONS
) -> AsyncIterator[Resolved]:
    found = await resolve(cache, reference, access)
    try:
        yield found
    finally:
        await found.source.aclose()


@asynccontextmanager
async def image_store(cache: CacheDirectory) -> AsyncIterator[ImageStore]:
    async with trio.open_nursery() as nursery:
        images = ImageStore(cache, nursery)
        try:
            yield images
        finally:
            await images.aclose()


async def indexed(cache: CacheDirectory, reference: str, *, fill: bool = False) -> tuple[BuiltIndex, ImageIndex]:
    async with resolved(cache, reference) as found:
        config = parse_config(await load_config(cache, found))
        built = await build_index(found, config, cache if fill else None)
    return built, ImageIndex(built.index)


def layer_heads(built: BuiltIndex) -> list[LayerHead]:
    """The indexes of all layers, opened."""
    return [LayerHead(built.layers[part.index_digest]) for part in ImageIndex(built.index).parts]


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def zstd_chunks(data: bytes, size: int) -> bytes:
    return b"".join(zstd.compress(data[at : at + size]) for at in range(0, len(data), size))
