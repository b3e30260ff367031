"""Layers for the tests of the block cache: block tables with the bytes they stand for."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.layer import CachedLayer
from lazyfs.core.layer.blocks import BLOCK_BYTES, BlockTable, BlockTableBuilder
from lazyfs.core.oci.digests import ContentRoot


@dataclass
class TestLayer:
    """A block table and the whole data device it describes."""

    __test__ = False

    table: bytes
    content_root: ContentRoot
    device: bytes

    @property
    def blocks(self) -> BlockTable:
        return BlockTable(self.table)

    def content(self, block: int) -> bytes:
        table = self.blocks
        return self.device[table.addresses[block] : table.addresses[block] + table.lengths[block]]

    def fill(self, layer: CachedLayer, blocks: range | None = None) -> None:
        for block in blocks if blocks is not None else range(self.blocks.count):
            assert layer.publish(block, self.content(block))


def make_layer(sizes: list[int], seed: int = 1) -> TestLayer:
    """A layer of files of these sizes with noise in them."""
    source = random.Random(seed)
    builder = BlockTableBuilder()
    device = bytearray()
    tar = 0
    for size in sizes:
        address = builder.place(size)
        device += bytes(address - len(device))
        data = source.randbytes(size)
        device += data
        tar += 512
        for at in range(0, size, BLOCK_BYTES):
            piece = data[at : at + BLOCK_BYTES]
            builder.add(address + at, tar + at, len(piece), hashlib.sha256(piece).digest())
        tar += -(-size // 512) * 512
    table = builder.finish(tar + 1024)
    device += bytes(BlockTable(table).device_bytes - len(device))
    return TestLayer(table, BlockTable(table).content_root, bytes(device))


LAYER = make_layer([1, 4096, 5000, BLOCK_BYTES + 1, 70_000, 3 * BLOCK_BYTES])


def entry(cache: CacheDirectory, layer: TestLayer, name: str) -> str:
    """Path of one file of a layer's cache entry."""
    return os.path.join(cache.layer_path(layer.content_root), name)


@contextmanager
def small_disk(directory: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of that size at `directory`."""
    directory.mkdir()
    options = f"size={size_bytes},mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)
