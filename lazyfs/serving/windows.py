"""The windows that gzip spans are entered with: kept in the cache, fetched by groups when first needed."""

from __future__ import annotations

import collections
import contextlib
from typing import Protocol

import trio

from lazyfs.core.index.windows import WindowGroup
from lazyfs.core.layer.deflate import WINDOW_BYTES
from lazyfs.core.layer.plan import Cost
from lazyfs.core.layer.spans import WINDOWS_PER_GROUP
from lazyfs.core.oci.digests import Digest
from lazyfs.errors import ImageError
from lazyfs.sources.source import Source

_GROUPS_IN_MEMORY = 4


class KeptGroups(Protocol):
    """Groups of windows in the cache, by their place in a blob of the index. Small files: no thread is worth it."""

    def group(self, offset: int, length: int) -> bytes | None:
        """A group as stored, if it is here."""

    def keep_group(self, offset: int, stored: bytes) -> None:
        """Files one, if the disk has room."""


class Windows:
    """The windows of one layer, by group, from the cache or by range from the index artifact."""

    def __init__(
        self,
        groups: tuple[WindowGroup, ...],
        kept: KeptGroups,
        remote: tuple[Source, Digest] | None,
    ) -> None:
        """`remote`: source and digest of the blob in which the groups lie."""
        self._groups = groups
        self._kept = kept
        self._remote = remote
        self._recent: collections.OrderedDict[int, bytes] = collections.OrderedDict()
        self._lock = trio.Lock()

    async def get(self, number: int, cost: Cost) -> bytes:
        """Window number `number` of the layer, 32 KiB. `cost`: what requests for the layer cost. LazyfsError."""
        group, place = divmod(number, WINDOWS_PER_GROUP)
        async with self._lock:  # single flight; held across one small request that has its own deadline
            raw = self._recent.get(group)
            if raw is None:
                raw = await self._load(group, cost)
                self._recent[group] = raw
                if len(self._recent) > _GROUPS_IN_MEMORY:
                    self._recent.popitem(last=False)
        window = raw[place * WINDOW_BYTES : (place + 1) * WINDOW_BYTES]
        if len(window) != WINDOW_BYTES:
            raise ImageError("the index lacks a window that a span needs", "index the image again")
        return window

    async def _load(self, place: int, cost: Cost) -> bytes:
        if place >= len(self._groups):
            raise ImageError("the index lacks a window that a span needs", "index the image again")
        group = self._groups[place]
        kept = self._kept.group(group.offset, group.length)
        if kept is not None:
            with contextlib.suppress(ImageError):  # rotten
                return group.unpack(kept)
        if self._remote is None:
            raise ImageError("the windows of a local index are missing", "index the image again")
        source, digest = self._remote
        around = self._around(place, cost.worth_bytes)
        start = around[0].offset
        stored = await source.blob_range(digest, start, around[-1].offset + around[-1].length)
        raw = group.unpack(stored[group.offset - start : group.offset - start + group.length])
        await trio.to_thread.run_sync(self._keep, around, stored)
        return raw

    def _around(self, place: int, worth_bytes: int) -> tuple[WindowGroup, ...]:
        """The groups that one request brings: all that lie side by side with this one and cost no more time than the
        request itself. Those behind first, since layers are read forwards."""
        groups, first, last = self._groups, place, place
        left = worth_bytes
        while last + 1 < len(groups) and groups[last].offset + groups[last].length == groups[last + 1].offset:
            left -= groups[last + 1].length
            if left < 0:
                break
            last += 1
        while first and groups[first - 1].offset + groups[first - 1].length == groups[first].offset:
            left -= groups[first - 1].length
            if left < 0:
                break
            first -= 1
        return groups[first : last + 1]

    def _keep(self, groups: tuple[WindowGroup, ...], stored: bytes) -> None:
        """Files groups that came together; each is compared with its digest when it is used. In a worker thread: there
        may be a hundred."""
        start = groups[0].offset
        for group in groups:
            self._kept.keep_group(group.offset, stored[group.offset - start : group.offset - start + group.length])

