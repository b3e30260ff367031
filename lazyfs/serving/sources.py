"""What a place that blocks of a layer can come from says and does. Values and one protocol; no await here.

A source divides what it can bring into numbered *pieces* of its own choice: spans of a compressed blob, blocks of
another layer, one stream of many blocks. The schedule (schedule.py) knows pieces only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from lazyfs.core.oci.digests import ContentRoot


class Extent(NamedTuple):
    """Plain bytes [start, end) of the layer's tar."""

    start: int
    end: int

    def union(self, other: Extent) -> Extent:
        """The smallest extent that holds both."""
        return Extent(min(self.start, other.start), max(self.end, other.end))


class Part(NamedTuple):
    """A piece that has something of a block. `lacks`: which of the piece's plain bytes are wanted; None: nothing,
    they came already, and wait for the block's other parts or are just being published."""

    piece: int
    lacks: Extent | None


class Batch(NamedTuple):
    """What one act of a source brings: some of its pieces, as far as `extent` goes in the last of them."""

    source: BlockSource
    pieces: Sequence[int]
    extent: Extent


class BlockSource(Protocol):
    """Brings blocks of the layers it was made for, into the cache. Hashed by identity. Owned by the trio thread.

    A layer is named by its content root, as one source may bring blocks of many.
    """

    @property
    def worth_bytes(self) -> int:
        """So many plain bytes take about as long as the act that brings them; 0 if guesses are not worth it."""

    def parts(self, layer: ContentRoot, block: int) -> Sequence[Part] | None:
        """Which pieces a block of a layer lies in, and what is wanted of each; None if it cannot come from here, or
        not soon."""

    def ahead(self, layer: ContentRoot, start: int, end: int) -> Sequence[Part]:
        """Pieces of the plain bytes [start, end) of a layer that are worth fetching before they are read."""

    def batch(
        self,
        first: int,
        wanted: Mapping[int, Extent],
        behind: Mapping[int, Extent],
        free: Callable[[int], bool] | None = None,
    ) -> Batch | None:
        """What one act would bring: the piece `first` and some others of `wanted`, none of which is in flight; and of
        `behind` what comes after all those, so that nobody waits for it.

        With `free` nobody waits for anything of it: it may be large, and may have further pieces, which nobody wants,
        if that saves an act; they must be `free`, that is not in flight.
        None: not now; the schedule asks again when something else has ended.
        """

    async def bring(self, batch: Batch, published: Callable[[], None]) -> None:
        """Fetches and publishes; returns when all is here that can be had. Ends by itself within a deadline.

        Calls `published` whenever blocks were published before the end. Raises LazyfsError.
        """
