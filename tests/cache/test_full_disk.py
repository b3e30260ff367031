"""A full disk is the host's fault; it loses no data, and the cache works on."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from lazyfs.cache.directory import CacheDirectory
from lazyfs.errors import HostError
from tests.cache.cachelayers import LAYER, make_layer, small_disk
from tests.cache.test_fill import fill


def test_a_full_disk_is_the_hosts_fault_and_the_cache_works_on(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 700_000) as disk:
        store = CacheDirectory(str(disk / "store"))
        layer = store.create_layer(LAYER.content_root, LAYER.table)
        with pytest.raises(HostError, match="No space"):
            LAYER.fill(layer)
        done = [block for block in range(layer.table.count) if layer.has(block)]
        assert done
        for block in done:
            address, length = layer.table.addresses[block], layer.table.lengths[block]
            assert layer.read(address, length) == LAYER.content(block)
        with pytest.raises(HostError, match="No space"):
            fill(store, LAYER)
        with pytest.raises(HostError, match="No space"):
            store.write_atomically(os.path.join(store.path, "refs", "x"), bytes(800_000))
        assert os.listdir(os.path.join(store.path, "tmp")) == []
        layer.close()
        del layer  # its table is mapped as long as it lives


def test_marks_have_their_space_before_the_disk_is_full(tmp_path: Path) -> None:
    """A store through a memory map into a hole of a full disk would kill the process (SIGBUS)."""
    many = make_layer([1] * 3000)
    with small_disk(tmp_path / "disk", 14 << 20) as disk:
        store = CacheDirectory(str(disk / "store"))
        layer = store.create_layer(many.content_root, many.table)
        with contextlib.suppress(OSError), open(disk / "hog", "wb", buffering=0) as hog:
            while hog.write(bytes(1 << 20)):
                pass
        with contextlib.suppress(HostError):
            many.fill(layer)
        # What has a page of data already needs no space for its mark, the last one on its page included.
        os.unlink(disk / "hog")
        many.fill(layer)
        assert layer.present_blocks() == 3000
        layer.close()
        del layer


def test_no_room_for_an_entry(tmp_path: Path) -> None:
    many = make_layer([1] * 3000)
    with small_disk(tmp_path / "disk", 100_000) as disk:
        store = CacheDirectory(str(disk / "store"))
        with pytest.raises(HostError):
            store.create_layer(many.content_root, many.table)
        assert store.content_roots() == []
        assert os.listdir(os.path.join(store.path, "tmp")) == []
