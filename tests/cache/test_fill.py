"""A whole layer is filled in at once; the entry is complete, or there is none."""

from __future__ import annotations

import os

import pytest

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.fill import LayerFill
from lazyfs.errors import ImageError
from tests.cache.cachelayers import LAYER, TestLayer, make_layer


def fill(store: CacheDirectory, layer: TestLayer) -> None:
    filling = LayerFill(store)
    try:
        for block in range(layer.blocks.count):
            filling.add(layer.blocks.addresses[block], layer.content(block))
        filling.publish(layer.content_root, layer.table)
    finally:
        filling.discard()


@pytest.mark.parametrize("present", [range(0), range(3), None])
def test_a_fill_makes_a_complete_entry_also_beside_an_open_one(
    store: CacheDirectory, present: range | None
) -> None:
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer, present)
    fill(store, LAYER)
    assert layer.read(0, len(LAYER.device)) == LAYER.device
    layer.close()
    assert os.listdir(os.path.join(store.path, "tmp")) == []


def test_a_fill_of_an_empty_layer(store: CacheDirectory) -> None:
    empty = make_layer([])
    fill(store, empty)
    layer = store.open_layer(empty.content_root)
    assert layer is not None and layer.read(0, 100) == b""
    layer.close()


@pytest.mark.parametrize("discard", [True, False])
def test_an_abandoned_fill_leaves_nothing(store: CacheDirectory, discard: bool) -> None:
    filling = LayerFill(store)
    filling.add(0, b"x" * 1000)
    if not discard:  # the wrong table
        with pytest.raises((ImageError, ValueError)):
            filling.publish(LAYER.content_root, LAYER.table)
    filling.discard()
    filling.discard()
    assert os.listdir(os.path.join(store.path, "tmp")) == []
    assert store.content_roots() == []
