"""What the two FUSE backends need of a layer: its data device, an address space of decoded file data."""

from __future__ import annotations

from typing import Protocol


class LayerData(Protocol):
    """One layer's data."""

    @property
    def size_bytes(self) -> int: ...

    def read_cached(self, address: int, size: int, /) -> bytes | memoryview | None:
        """Exactly `size` verified bytes, or None if they must be fetched. May read the disk, not the network.

        The bytes are valid until the calling thread's next call.
        """

    async def read(self, address: int, size: int, /) -> bytes:
        """Exactly `size` bytes, fetched if need be. Raises LazyfsError before a deadline of its own."""


class Device(LayerData, Protocol):
    """A layer that is served under its content root. `read_cached` is called in reader threads."""

    @property
    def content_root(self) -> str: ...
