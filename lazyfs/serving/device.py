"""A layer's data device, which answers the reads of the kernel."""

from __future__ import annotations

from collections import deque
from time import monotonic

import trio

from lazyfs.cache.layer import CachedLayer
from lazyfs.core.deadlines import answer_s
from lazyfs.core.retries import MAX_REREADS
from lazyfs.errors import HostError, RemoteError
from lazyfs.serving.fetcher import LayerFetcher


class DataDevice:
    """The data of one layer, readable at any address. All open images that have the layer share it."""

    def __init__(self, layer: CachedLayer, fetcher: LayerFetcher) -> None:
        self.layer = layer
        self.fetcher = fetcher
        self.content_root = layer.content_root
        self.size_bytes = layer.size_bytes
        self._timeouts_s: dict[str, float] = {}  # what each image that has the layer open promised, by its digest
        # Reads answered from the cache, reads that had to fetch, and bytes given to both. Counted without a lock by
        # several threads: a lost count is cheaper than a lock on the hot path.
        self.hits = self.misses = self.bytes_read = 0
        # When, where and how much was read, while a start is traced (trace.py).
        self.reads: deque[tuple[float, int, int]] | None = None
        self.waiting = 0  # reads that wait for data

    def promise(self, image: str, timeout_s: float) -> None:
        """An open image promises that reads end within `timeout_s`. What it promised before still holds. Any thread."""
        shortest_s = min(timeout_s, self._timeouts_s.get(image, timeout_s))
        self._timeouts_s = {**self._timeouts_s, image: shortest_s}

    def release(self, image: str) -> None:
        """An image is closed: its promises bind no more."""
        self._timeouts_s = {one: timeout_s for one, timeout_s in self._timeouts_s.items() if one != image}

    @property
    def timeout_s(self) -> float:
        """How long a read(2) may take: the shortest promise of all images, because the kernel does not say for which
        one it reads a page."""
        return min(self._timeouts_s.values(), default=0.0)

    def read_cached(self, address: int, size_bytes: int) -> bytes | memoryview | None:
        """Exactly the bytes asked for, cut at the end of the device, if all are cached; else None. Any thread."""
        reads = self.reads
        if reads is not None:
            reads.append((monotonic(), address, size_bytes))
        data = self.layer.read(address, size_bytes)
        if data is None:
            self.misses += 1
        else:
            self.hits += 1
            self.bytes_read += len(data)
        return data

    async def read(self, address: int, size_bytes: int) -> bytes:
        """The bytes, fetched if need be, within the share of `timeout_s` (core/deadlines.py). Raises LazyfsError; never
        short, never zeros in place of data.
        """
        blocks = self.layer.table.overlapping(address, size_bytes)
        timeout_s = self.timeout_s
        self.waiting += 1
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
        finally:
            self.waiting -= 1
        raise HostError("the block cache does not keep what is written to it", "check the disk")
