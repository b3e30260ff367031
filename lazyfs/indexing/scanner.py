"""Turns the plain bytes of a layer into entries, block table and DiffID."""

from __future__ import annotations

import hashlib

from lazyfs.cache.fill import LayerFill
from lazyfs.core.layer.blocks import BLOCK_BYTES, BlockTableBuilder
from lazyfs.core.oci.digests import DiffId
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.reader import TarData, TarEntry, TarReader
from lazyfs.core.tar.tree import LayerEntry


class LayerScanner:
    """Plain bytes of a layer -> entries with addresses, block table, DiffID. Blocks; for one thread at a time."""

    def __init__(self, fill: LayerFill | None) -> None:
        self.entries: list[LayerEntry] = []
        self._fill = fill
        self._reader = TarReader()
        self._tables = BlockTableBuilder()
        self._tar = hashlib.sha256()
        self._tar_bytes = 0
        self._segments: list[tuple[int, int, int]] = []  # what is left of the current file's data
        self._address = 0
        self._partial = bytearray()

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the uncompressed layer. Raises ImageError or HostError."""
        self._tar.update(chunk)
        self._tar_bytes += len(chunk)
        for event in self._reader.feed(chunk):
            if isinstance(event, TarData):
                self._data(event.view)
            else:
                self._entry(event)

    def feed_all(self, chunks: list[bytes]) -> None:
        """As `feed`, for several chunks."""
        for chunk in chunks:
            self.feed(chunk)

    def _entry(self, entry: TarEntry) -> None:
        self._segments = []
        self._address = 0
        if entry.kind is Kind.FILE and entry.size:
            self._address = self._tables.place(entry.size)
            self._segments = list(reversed(entry.segments))
        self.entries.append(LayerEntry(entry, self._address))

    def _data(self, view: memoryview) -> None:
        """Cuts data into blocks. If a chunk ends inside a block, its part waits in `_partial`."""
        while view:
            file_offset, tar_offset, length = self._segments[-1]
            wanted = min(length, BLOCK_BYTES)
            part = view[: wanted - len(self._partial)]
            view = view[len(part) :]
            content: memoryview | bytes = part
            if len(self._partial) + len(part) < wanted or self._partial:
                self._partial += part
                if len(self._partial) < wanted:
                    return
                content = bytes(self._partial)
                self._partial.clear()
            address = self._address + file_offset
            self._tables.add(address, tar_offset, wanted, hashlib.sha256(content).digest())
            if self._fill is not None:
                self._fill.add(address, content)
            if length > wanted:
                self._segments[-1] = (file_offset + wanted, tar_offset + wanted, length - wanted)
            else:
                self._segments.pop()

    def finish(self) -> tuple[bytes, int, DiffId]:
        """The block table, the tar's length, and its DiffID."""
        self._reader.finish()
        return self._tables.finish(self._tar_bytes), self._tar_bytes, DiffId("sha256:" + self._tar.hexdigest())
