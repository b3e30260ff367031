"""A layer's data device: the reads of the kernel."""

from __future__ import annotations

import trio

from lazyfs.cache.layer import CachedLayer
from lazyfs.errors import RemoteError
from lazyfs.serving.fetcher import LayerFetcher

# When a readahead fails, the kernel asks once more for the page that read(2) waits for. What the first of the
# two has set going goes on meanwhile.
_KERNEL_ASKS = 2


class LayerHandle:
    """One layer of an open image: its data device, readable at any address."""

    def __init__(self, layer: CachedLayer, fetcher: LayerFetcher) -> None:
        self.layer = layer
        self.fetcher = fetcher
        self.content_root = layer.content_root
        self.size_bytes = layer.size_bytes
        # Reads answered from the cache, reads that had to fetch, and bytes given to both. Counted without a lock by
        # several threads: a lost count is cheaper than a lock on the hot path.
        self.hits = self.misses = self.bytes_read = 0

    @property
    def timeout_s(self) -> float:
        """Within this a read(2) ends, and a request to the registry."""
        return self.fetcher.timeout_s

    @timeout_s.setter
    def timeout_s(self, value_s: float) -> None:
        self.fetcher.timeout_s = value_s

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
        try:
            with trio.fail_after(self.timeout_s / _KERNEL_ASKS):
                while True:
                    await self.fetcher.ensure(blocks)
                    data = self.layer.read(address, size_bytes)
                    if data is not None:
                        self.bytes_read += len(data)
                        return bytes(data)
        except trio.TooSlowError:
            raise RemoteError(
                f"data did not arrive within {self.timeout_s:g} s",
                "see the registry's state; the next read tries again",
            ) from None
