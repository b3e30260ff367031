"""A layer's data device: the reads of the kernel."""

from __future__ import annotations

import trio

from lazyfs.cache.layer import CachedLayer
from lazyfs.core.deadlines import answer_s
from lazyfs.core.retries import MAX_REREADS
from lazyfs.errors import HostError, RemoteError
from lazyfs.serving.fetcher import LayerFetcher


class DataDevice:
    """One layer of the open images that have it: its data device, readable at any address."""

    def __init__(self, layer: CachedLayer, fetcher: LayerFetcher) -> None:
        self.layer = layer
        self.fetcher = fetcher
        self.content_root = layer.content_root
        self.size_bytes = layer.size_bytes
        self._timeouts_s: dict[str, float] = {}  # what each image that has the layer open promised, by its digest
        # Reads answered from the cache, reads that had to fetch, and bytes given to both. Counted without a lock by
        # several threads: a lost count is cheaper than a lock on the hot path.
        self.hits = self.misses = self.bytes_read = 0

    def promise(self, image: str, timeout_s: float) -> None:
        """An image has the layer open, whose reads shall end within `timeout_s`. What it promised before holds, too.
        Any thread."""
        shortest_s = min(timeout_s, self._timeouts_s.get(image, timeout_s))
        self._timeouts_s = {**self._timeouts_s, image: shortest_s}

    def release(self, image: str) -> None:
        """An image is closed: what it promised does not bind any more."""
        self._timeouts_s = {one: timeout_s for one, timeout_s in self._timeouts_s.items() if one != image}

    @property
    def timeout_s(self) -> float:
        """Within this a read(2) ends. The kernel does not say for which image a page is read: the shortest of all."""
        return min(self._timeouts_s.values(), default=0.0)

    def read_cached(self, address: int, size_bytes: int) -> bytes | memoryview | None:
        """Exactly the bytes asked for (cut at the end of the device) if all are here, else None. Any
        thread.
        """
        data = self.layer.read(address, size_bytes)
        if data is None:
            self.misses += 1
        else:
            self.hits += 1
            self.bytes_read += len(data)
        return data

    async def read(self, address: int, size_bytes: int) -> bytes:
        """The bytes, fetched if need be, within its share of `timeout_s`; raises LazyfsError. Never short,
        never zeros for data.
        """
        blocks = self.layer.table.overlapping(address, size_bytes)
        timeout_s = self.timeout_s
        try:
            with trio.fail_after(answer_s(timeout_s)):
                for _ in range(MAX_REREADS):
                    await self.fetcher.ensure(blocks)
                    data = self.layer.read(address, size_bytes)
                    if data is not None:
                        self.bytes_read += len(data)
                        return bytes(data)
        except trio.TooSlowError:
            raise RemoteError(
                f"data did not arrive within {timeout_s:g} s",
                "see the registry's state; the next read tries again",
            ) from None
        raise HostError("the block cache does not keep what is written to it", "check the disk")
