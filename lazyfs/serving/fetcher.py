"""Brings missing blocks of one layer into the cache, from whichever source has them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

from lazyfs.cache.layer import CachedLayer
from lazyfs.core.layer.plan import Readahead, nearby
from lazyfs.core.retries import MAX_ROUNDS
from lazyfs.errors import LazyfsError, RemoteError
from lazyfs.serving.assemble import Fragments
from lazyfs.serving.dispatch import Dispatcher, Reader
from lazyfs.serving.schedule import Rank
from lazyfs.serving.sources import BlockSource, Part


class _Supplier(NamedTuple):
    """A source, and who fetches from it."""

    source: BlockSource
    dispatcher: Dispatcher

    def want(self, part: Part, rank: Rank, reader: Reader | None = None) -> bool:
        return self.dispatcher.want(self.source, part, rank, reader)


class LayerFetcher:
    """Says for each missing block where it shall come from, and waits for it. Owned by the trio thread."""

    def __init__(self, layer: CachedLayer) -> None:
        self.layer = layer
        self.fragments = Fragments(layer)  # for the layer's sources
        self._suppliers: list[_Supplier] = []  # in the order in which they are asked
        self._demanded_bytes = 0  # of blocks that were missing when they were read
        self._readahead = Readahead()
        # Block -> where it was to come from. What follows these is known, too: there is nothing to guess.
        self._foreseen: dict[int, BlockSource] = {}

    @property
    def sources(self) -> list[BlockSource]:
        """Where the layer can come from at present."""
        return [supplier.source for supplier in self._suppliers]

    def add(self, source: BlockSource, dispatcher: Dispatcher) -> None:
        """A source for this layer, asked before those known so far. Any thread."""
        self._suppliers = [_Supplier(source, dispatcher), *self._suppliers]

    def drop(self, source: BlockSource) -> None:
        """Forgets one source."""
        self._suppliers = [supplier for supplier in self._suppliers if supplier.source is not source]

    def remove(self, dispatcher: Dispatcher) -> None:
        """Forgets the sources of a dispatcher that is about to be closed."""
        self._suppliers = [supplier for supplier in self._suppliers if supplier.dispatcher is not dispatcher]

    async def ensure(self, blocks: range, rank: Rank = Rank.READ) -> None:
        """Returns when all `blocks` are present; raises LazyfsError if one cannot be had.

        No deadline of its own: the caller sets one. Cancelled or not, what it asked for goes on.
        """
        missing = self.layer.missing(blocks)
        if rank is Rank.READ:
            self._demanded_bytes += sum(self.layer.table.lengths[block] for block in missing)
        reader = Reader()
        guessed = False
        try:
            while missing:
                supplier = self._ask(missing, rank, reader)
                if rank is Rank.READ and not guessed and not self._foreseen.keys() >= set(missing):
                    self._guess(missing, supplier)
                    guessed = True
                await reader.woken()
                left = self.layer.missing(blocks)
                if len(left) < len(missing):
                    reader.served = 0
                elif reader.served > MAX_ROUNDS:
                    raise RemoteError(
                        "blocks of the layer do not match their index",
                        "the registry serves damaged data, or the index is not of this image",
                        temporary=False,
                    )
                missing = left
        finally:
            reader.leave()

    def foresee(self, blocks: Iterable[int]) -> None:
        """Wants those of `blocks` that are absent, in this order, at the rank PACK: nobody waits for them. What cannot
        be had from anywhere is passed over. Raises LayerClosed."""
        reader = Reader()  # for whom nothing is begun
        for block in blocks:
            if self.layer.has(block):
                continue
            with contextlib.suppress(LazyfsError):
                supplier, parts = self._offer(block, reader)
                for part in parts:
                    supplier.want(part, Rank.PACK)
                self._foreseen[block] = supplier.source

    def foreseen(self) -> tuple[int, int]:
        """How many blocks were foreseen, and how many of these are still absent."""
        foreseen = list(self._foreseen)
        return len(foreseen), sum(not self.layer.has(block) for block in foreseen)

    def forget_foreseen(self) -> None:
        """What was foreseen, and is not on its way, is not fetched, unless it is read."""
        sources = set(self._foreseen.values())  # not a pack that was found since then
        self._foreseen.clear()
        for supplier in self._suppliers:
            if supplier.source in sources:
                supplier.dispatcher.drop(supplier.source, Rank.PACK)

    def _ask(self, missing: list[int], rank: Rank, reader: Reader) -> _Supplier:
        """Sees to it that all missing blocks are wanted. Returns where the last one shall come from."""
        for block in missing:
            supplier, parts = self._offer(block, reader)
            waits = [supplier.want(part, rank, reader) for part in parts]
            if not any(waits):  # every part of it came, and still it is not there: one was damaged
                self.fragments.forget(block)
                reader.served += 1
                reader.wake()
        return supplier

    def _guess(self, missing: list[int], supplier: _Supplier) -> None:
        """Wants what is probably read next, behind all that somebody waits for."""
        blocks = range(missing[0], missing[-1] + 1)
        start, end = self.layer.table.tar_offsets[missing[0]], self._end_of(missing[-1])
        upto = self._readahead.after(start, end)
        near = range(end, end)
        if worth_bytes := supplier.source.worth_bytes:
            near = nearby(self.layer.table, blocks, worth_bytes, self._demanded_bytes)
        if near or upto > end:
            for part in supplier.source.ahead(self.layer.content_root, near.start, max(near.stop, upto)):
                supplier.want(part, Rank.AHEAD)

    def _offer(self, block: int, reader: Reader) -> tuple[_Supplier, list[Part]]:
        """Where a block shall come from: wherever it is on its way already, else the first that can bring it and has
        not failed this reader.
        """
        offers = []
        for supplier in self._suppliers:
            if supplier.source not in reader.failures:
                parts = supplier.source.parts(self.layer.content_root, block)
                if parts is not None:
                    offers.append((supplier, list(parts)))
        if not offers:
            if reader.failures:
                raise list(reader.failures.values())[-1]  # of the place that should have it in any case
            raise RemoteError("this layer has no source at present", "mount its image again while online")
        if len(offers) > 1:
            for supplier, parts in offers:
                if supplier.dispatcher.knows(supplier.source, parts):
                    return supplier, parts
        return offers[0]

    def _end_of(self, block: int) -> int:
        """Where a block ends in the plain layer."""
        return self.layer.table.tar_offsets[block] + self.layer.table.lengths[block]
