"""Images that are open at the same time, and share a layer."""

from __future__ import annotations

from pathlib import Path

import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.serving.image import Image
from lazyfs.serving.store import ImageStore
from lazyfs.sources.access import Access
from tests.layertar import LayerTar
from tests.layout import GZIP, PLAIN, Layout


def two_images(directory: Path) -> list[str]:
    """References of two images over one layer, of which each has another one, too."""
    layout = Layout(directory)
    shared = layout.add_layer(LayerTar().file("shared", b"s" * 100_000).data(), GZIP)
    for name in ("one", "other"):
        own = layout.add_layer(LayerTar().file(name, name.encode() * 20_000).data(), PLAIN)
        layout.tag(name, layout.add_image([shared, own]))
    return [f"oci:{directory}:{name}" for name in ("one", "other")]


async def test_a_shared_layer_keeps_the_shortest_timeout_of_the_images_that_are_open(tmp_path: Path) -> None:
    references = two_images(tmp_path / "layout")
    async with trio.open_nursery() as nursery:
        store = ImageStore(CacheDirectory(str(tmp_path / "cache")), nursery)
        opened: list[Image] = []
        for reference, timeout_s in zip([*references, references[0]], (60.0, 5.0, 600.0), strict=True):
            image = await store.open(reference, Access(), timeout_s)
            assert isinstance(image, Image)
            opened.append(image)
        one, other, again = opened
        assert one is again
        [shared] = set(one.layers) & set(other.layers)
        assert shared.timeout_s == 5
        assert sorted(device.timeout_s for device in one.layers) == [5, 60]
        await store.close(other)
        assert shared.timeout_s == 60
        await store.close(one)  # it has another user
        assert shared.timeout_s == 60
        third = await store.open(references[1], Access(), 700.0)
        assert isinstance(third, Image) and set(third.layers) & set(one.layers) == {shared}
        assert shared.timeout_s == 60
        await store.close(again)
        assert shared.timeout_s == 700
        assert await shared.read(0, 100_000) == b"s" * 100_000
        await store.close(third)
        await store.aclose()
        nursery.cancel_scope.cancel()


async def test_a_shared_layer_is_served_until_the_last_of_its_images_is_closed(tmp_path: Path) -> None:
    references = two_images(tmp_path / "layout")
    async with trio.open_nursery() as nursery:
        store = ImageStore(CacheDirectory(str(tmp_path / "cache")), nursery)
        one, other = [await store.open(reference, Access(), 30.0) for reference in references]
        assert isinstance(one, Image) and isinstance(other, Image)
        [shared] = set(one.layers) & set(other.layers)
        await store.close(other)
        assert len(shared.fetcher.sources) == 1
        assert await shared.read(0, 4096) == b"s" * 4096
        await store.close(one)
        assert not shared.fetcher.sources and not store.devices
        await store.aclose()
        nursery.cancel_scope.cancel()
