"""Fills the cache with a whole layer while its block table, and so its content root, is still being made."""

from __future__ import annotations

import os
import shutil
import tempfile
from array import array

import xxhash

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.layer import DATA, PRESENT, TABLE, write_block
from lazyfs.cache.places import LOCK
from lazyfs.core.layer.blocks import BlockTable
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.errors import HostError


class LayerFill:
    """Takes the blocks of one layer one by one. `publish` makes a cache entry of them, `discard` drops them."""

    def __init__(self, cache: CacheDirectory) -> None:
        self._cache = cache
        self._marks = array("Q")
        try:
            self._directory = tempfile.mkdtemp(dir=cache.tmp)
            self._data_fd = os.open(
                os.path.join(self._directory, DATA), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise HostError(f"cannot write to the block cache: {error.strerror}", "check the disk") from None

    def add(self, address: int, content: bytes | memoryview) -> None:
        """Writes the next block in table order. The caller has hashed it into the table. HostError: disk full."""
        self._marks.append(xxhash.xxh3_64_intdigest(content) or 1)
        write_block(self._data_fd, content, address)

    def publish(self, content_root: ContentRoot, table: bytes) -> None:
        """Makes the cache entry, complete. If one exists already, fills in its missing blocks. HostError: disk."""
        opened = BlockTable(table)
        if opened.count != len(self._marks):
            raise ValueError("the table has not the blocks that were added")
        try:
            os.ftruncate(self._data_fd, opened.device_bytes)
            for name, content in (
                (TABLE, table),
                (PRESENT, self._marks.tobytes().ljust(8, b"\0")),
                (LOCK, b""),
            ):
                with open(os.path.join(self._directory, name), "wb") as file:
                    file.write(content)
            try:
                os.rename(self._directory, self._cache.layer_path(content_root))
            except OSError:
                self._merge(content_root, opened)
        except OSError as error:
            raise HostError(
                f"cannot write to the block cache: {error.strerror}", "check the disk's space"
            ) from None
        finally:
            self.discard()

    def _merge(self, content_root: ContentRoot, table: BlockTable) -> None:
        layer = self._cache.create_layer(content_root, bytes(table.buffer))
        try:
            for block in layer.missing(range(table.count)):
                layer.publish(block, os.pread(self._data_fd, table.lengths[block], table.addresses[block]))
        finally:
            layer.close()

    def discard(self) -> None:
        """Drops what was not published. May be called twice."""
        if self._data_fd >= 0:
            os.close(self._data_fd)
            self._data_fd = -1
        shutil.rmtree(self._directory, ignore_errors=True)
