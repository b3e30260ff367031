"""A layer is sealed once all of it was compared, and no longer than nothing happens to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lazyfs.cache.directory import CacheDirectory
from lazyfs.core.layer.blocks import BLOCK_BYTES
from tests.cache.cachelayers import LAYER, entry


def test_complete_means_every_block(store: CacheDirectory) -> None:
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    for block in reversed(range(layer.table.count)):
        assert not layer.is_complete()
        LAYER.fill(layer, range(block, block + 1))
    assert layer.is_complete()
    layer.close()


def test_a_layer_is_sealed_once_all_of_it_was_compared(store: CacheDirectory) -> None:
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    last = layer.table.count - 1
    LAYER.fill(layer, range(last))
    assert not layer.seal() and not layer.is_sealed()
    LAYER.fill(layer, range(last, last + 1))
    assert not layer.is_sealed()  # nobody has compared it yet
    assert layer.seal() and layer.is_sealed()
    other = store.create_layer(LAYER.content_root, LAYER.table)
    assert other.is_sealed()
    assert Path(other.open_data_path()).read_bytes() == LAYER.device
    layer.close()
    other.close()


@pytest.mark.parametrize("event", ["write", "mark", "boot", "truncated note"])
def test_a_layer_is_no_longer_sealed_after(store: CacheDirectory, event: str) -> None:
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    assert layer.seal() and layer.is_sealed()
    if event == "write":
        with open(entry(store, LAYER, "data"), "r+b") as data:
            data.write(b"x")
    elif event == "mark":
        with open(entry(store, LAYER, "present"), "r+b") as marks:
            marks.write(bytes(8))
    else:
        note = Path(entry(store, LAYER, "sound"))
        note.write_bytes(note.read_bytes()[:-9] if event == "truncated note" else b"0" + note.read_bytes()[1:])
    assert not layer.is_sealed()
    layer.close()


def test_sealing_finds_damage(store: CacheDirectory) -> None:
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    with open(entry(store, LAYER, "data"), "r+b") as data:
        data.seek(1)  # behind the first file, which has one byte
        data.write(b"rubbish in the padding")
        data.seek(LAYER.blocks.addresses[2])
        data.write(b"damage")
    assert not layer.seal() and layer.has(2)  # the padding was mended: again from the start
    assert not layer.seal() and not layer.has(2) and not layer.is_sealed()
    LAYER.fill(layer, range(2, 3))
    assert layer.seal() and layer.is_sealed()
    assert Path(entry(store, LAYER, "data")).read_bytes() == LAYER.device
    layer.close()


def test_sealing_compares_what_was_read_before(store: CacheDirectory) -> None:
    """Damage to a block that was right when it was first read must not be sealed."""
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    assert layer.read(0, len(LAYER.device)) == LAYER.device
    with open(entry(store, LAYER, "data"), "r+b") as data:
        data.seek(LAYER.blocks.addresses[3])
        data.write(b"damage")
    assert not layer.seal() and not layer.has(3) and not layer.is_sealed()
    layer.close()


def test_sealing_goes_by_pieces(store: CacheDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazyfs.cache.layer.SEAL_STEP_BYTES", BLOCK_BYTES)
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    tries = [layer.seal() for _ in range(LAYER.blocks.count + 1)]
    assert 2 < tries.index(True) < LAYER.blocks.count and not any(tries[: tries.index(True)])
    layer.close()


def test_sealing_begins_anew_when_somebody_writes(store: CacheDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazyfs.cache.layer.SEAL_STEP_BYTES", BLOCK_BYTES)
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    assert not layer.seal()
    with open(entry(store, LAYER, "data"), "r+b") as data:
        data.seek(LAYER.blocks.addresses[0])
        data.write(b"!" if LAYER.device[:1] != b"!" else b"?")  # the first block was compared already
    tries = [layer.seal() for _ in range(2 * LAYER.blocks.count)]
    assert not any(tries) and not layer.has(0)
    layer.close()


def test_sealing_does_not_read_the_disk(store: CacheDirectory) -> None:
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    with open(entry(store, LAYER, "data"), "rb") as data:
        os.fsync(data.fileno())
        os.posix_fadvise(data.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert not layer.seal()
    assert layer.read(0, len(LAYER.device)) == LAYER.device
    assert layer.seal() and layer.is_sealed()
    layer.close()
