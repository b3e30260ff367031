"""The windows that gzip spans are entered with: kept in the cache, fetched by groups when first needed."""

from __future__ import annotations

import collections
import logging
import os

import trio

from lazyfs.core.index.windows import unpack_windows
from lazyfs.core.layer.deflate import WINDOW_BYTES
from lazyfs.core.layer.spans import WINDOWS_PER_GROUP
from lazyfs.errors import ImageError
from lazyfs.sources.source import Source

log = logging.getLogger("lazyfs.fetch")

_GROUPS_IN_MEMORY = 4


class Windows:
    """The windows of one layer, by group, from a file in the cache or by range from the index artifact."""

    def __init__(
        self,
        groups: tuple[tuple[int, int], ...],
        directory: str,
        remote: tuple[Source, str] | None,
    ) -> None:
        self._groups = groups
        self._directory = directory  # holds one file a group, named by the group's offset in the windows blob
        self._remote = remote  # source and digest of the windows blob
        self._recent: collections.OrderedDict[int, bytes] = collections.OrderedDict()
        self._lock = trio.Lock()

    async def get(self, number: int) -> bytes:
        """Window number `number` of the layer, 32 KiB. Raises LazyfsError."""
        group, place = divmod(number, WINDOWS_PER_GROUP)
        async with self._lock:  # single flight; held across one small request that has its own deadline
            raw = self._recent.get(group)
            if raw is None:
                raw = await self._load(group)
                self._recent[group] = raw
                if len(self._recent) > _GROUPS_IN_MEMORY:
                    self._recent.popitem(last=False)
        window = raw[place * WINDOW_BYTES : (place + 1) * WINDOW_BYTES]
        if len(window) != WINDOW_BYTES:
            raise ImageError("the index lacks a window that a span needs", "index the image again")
        return window

    async def _load(self, group: int) -> bytes:
        if group >= len(self._groups):
            raise ImageError("the index lacks a window that a span needs", "index the image again")
        offset, length = self._groups[group]
        path = os.path.join(self._directory, str(offset))
        try:
            return unpack_windows(_read_at_most(path, length + 1))
        except (OSError, ImageError):  # not fetched yet, or rotten
            pass
        if self._remote is None:
            raise ImageError("the windows of a local index are missing", "index the image again")
        source, digest = self._remote
        stored = await source.blob_range(digest, offset, offset + length)
        raw = unpack_windows(stored)
        try:
            _write(path, stored)
        except OSError as error:
            log.warning("cannot keep windows in the cache: %s", error)
        return raw


def _read_at_most(path: str, size_bytes: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size_bytes)


def _write(path: str, data: bytes) -> None:
    """A small file (tens of kilobytes, not synced: well below what a thread would cost)."""
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(data)
    os.replace(temporary, path)
