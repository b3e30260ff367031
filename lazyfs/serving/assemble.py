"""Decoded bytes of a layer, in any order of spans, to whole blocks in the cache."""

from __future__ import annotations

import collections
import threading

from lazyfs.cache.layer import CachedLayer
from lazyfs.core.layer.spans import Span

# Parts of blocks whose other part lies in a span not fetched yet, kept in memory by layer.
_MAX_FRAGMENTS = 32


class Fragments:
    """Parts of blocks that straddle two spans, until the other part comes. Shared by decoding threads."""

    def __init__(self, layer: CachedLayer) -> None:
        self.layer = layer
        self._lock = threading.Lock()
        # By block: where in it a part begins -> the part.
        self._parts: collections.OrderedDict[int, dict[int, bytearray]] = collections.OrderedDict()

    def lacks_from(self, block: int, span: Span) -> int | None:
        """The first plain byte of a block in a span that is not kept here; None if all of that are."""
        start = self.layer.table.tar_offsets[block]
        at = max(start, span.tar_start)
        with self._lock:
            for offset, part in sorted(self._parts.get(block, {}).items()):
                if start + offset <= at:
                    at = max(at, start + offset + len(part))
        return at if at < min(start + self.layer.table.lengths[block], span.tar_end) else None

    def forget(self, block: int) -> None:
        """Drops all parts of a block."""
        with self._lock:
            self._parts.pop(block, None)

    def add(self, block: int, offset: int, part: bytes | memoryview) -> bytes | None:
        """Keeps a copy of a part; returns the whole block if this was what was missing. Forget it once it is
        published: until then nobody must think that its parts have to be fetched again.
        """
        with self._lock:
            parts = self._parts.setdefault(block, {})
            self._parts.move_to_end(block)
            before = next((one for one, kept in parts.items() if one + len(kept) == offset), None)
            if before is not None and offset not in parts:
                parts[before] += part  # a layer of tiny members comes in thousands of parts a block
            else:
                parts[offset] = bytearray(part)
            pieces: list[bytearray] = []
            end = 0
            for start, kept in sorted(parts.items()):
                if start > end:
                    break
                pieces.append(kept[end - start :] if end > start else kept)
                end = max(end, start + len(kept))
            if end == self.layer.table.lengths[block]:
                return b"".join(pieces)
            if len(self._parts) > _MAX_FRAGMENTS:
                self._parts.popitem(last=False)
            return None


class Assembler:
    """Consecutive plain bytes of a layer -> whole blocks, published. Used by one thread at a time."""

    def __init__(self, fragments: Fragments, tar_start: int) -> None:
        self._layer = fragments.layer
        self._fragments = fragments
        self.at = tar_start  # the next plain byte
        self.published = 0
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
            elif (whole := self._fragments.add(block, low - first, part)) is not None:
                try:
                    self._publish(block, whole)
                finally:
                    self._fragments.forget(block)

    def _publish(self, block: int, content: bytes | memoryview) -> None:
        if self._layer.publish(block, content):
            self.published += 1
        else:
            self.bad += 1
