"""Decoded bytes of a layer, in any order of spans, to whole blocks in the cache."""

from __future__ import annotations

import collections
import threading

from lazyfs.cache import CachedLayer
from lazyfs.core.spans import Span

# Parts of blocks whose other part lies in a span not fetched yet, kept in memory by layer.
_MAX_FRAGMENTS = 32


class Fragments:
    """Parts of blocks that straddle two spans, until the other part comes. Shared by decoding threads."""

    def __init__(self, layer: CachedLayer) -> None:
        self._layer = layer
        self._lock = threading.Lock()
        self._parts: collections.OrderedDict[int, dict[int, bytes]] = collections.OrderedDict()

    def holds(self, block: int, span: Span) -> bool:
        """Whether all of the block that lies in this span is kept here."""
        table = self._layer.table
        at = max(0, span.tar_start - table.tar_offsets[block])
        end = min(table.lengths[block], span.tar_end - table.tar_offsets[block])
        with self._lock:
            parts = self._parts.get(block, {})
            for start in sorted(parts):
                if start <= at:
                    at = max(at, start + len(parts[start]))
        return at >= end

    def forget(self, blocks: list[int]) -> None:
        """Drops all parts of these blocks."""
        with self._lock:
            for block in blocks:
                self._parts.pop(block, None)

    def add(self, block: int, offset: int, part: bytes) -> bytes | None:
        """Keeps a part; returns the whole block if this was what was missing. Forget it once it is published:
        until then nobody must think that its parts have to be fetched again.
        """
        with self._lock:
            parts = self._parts.setdefault(block, {})
            parts[offset] = part
            self._parts.move_to_end(block)
            pieces = []
            end = 0
            for start in sorted(parts):
                if start > end:
                    break
                pieces.append(parts[start][end - start :])
                end = max(end, start + len(parts[start]))
            if end == self._layer.table.lengths[block]:
                return b"".join(pieces)
            if len(self._parts) > _MAX_FRAGMENTS:
                self._parts.popitem(last=False)
            return None


class Assembler:
    """Consecutive plain bytes of a layer -> whole blocks, published. Used by one thread at a time."""

    def __init__(self, layer: CachedLayer, fragments: Fragments, tar_start: int) -> None:
        self._layer = layer
        self._fragments = fragments
        self.at = tar_start  # the next plain byte
        self.bad = 0

    def add(self, raw: bytes) -> None:
        start, end = self.at, self.at + len(raw)
        self.at = end
        table = self._layer.table
        view = memoryview(raw)
        for block in table.from_tar(start, end):
            if self._layer.has(block):
                continue
            first = table.tar_offsets[block]
            last = first + table.lengths[block]
            low, high = max(first, start), min(last, end)
            part = view[low - start : high - start]
            if low == first and high == last:
                self._publish(block, part)
            elif (whole := self._fragments.add(block, low - first, bytes(part))) is not None:
                try:
                    self._publish(block, whole)
                finally:
                    self._fragments.forget([block])

    def _publish(self, block: int, content: bytes | memoryview) -> None:
        if not self._layer.publish(block, content):
            self.bad += 1
