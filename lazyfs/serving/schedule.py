"""What is fetched next by way of one registry or layout. Decides; does nothing: no await, no clock.

A piece (sources.py) is wanted, then in flight, then forgotten. What was wanted once is brought, whether or not
somebody still waits for it: the kernel asks again for what a read did not get in time.
"""

from __future__ import annotations

import enum
import itertools
from collections import ChainMap, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from lazyfs.errors import LazyfsError
from lazyfs.serving.sources import Batch, BlockSource, Extent, Part

# Batches in flight at once. Four keep the decoder busy (loopback, 2 cores); more only take memory.
SLOTS = 6
# Of which only readers take the last ones, so that a read never waits for the end of something less urgent.
READ_SLOTS = 1
# A guess begins only while fewer batches are in flight: on a slow link all that are share it with the next read.
AHEAD_SLOTS = 3
# The same for what a start will want: these are large, and few of them fill a link.
PACK_SLOTS = 4


class Rank(enum.IntEnum):
    """How urgent something is; the lower, the sooner."""

    READ = 0  # somebody waits for it, or soon will
    AHEAD = 1  # a guess, from what is read
    PACK = 2  # a start will want it, as earlier ones did
    FILL = 3  # all the rest


_BELOW = {Rank.AHEAD: AHEAD_SLOTS, Rank.PACK: PACK_SLOTS}


class Ticket:
    """One reader's claim on all that it waits for, perhaps in several schedules."""

    def __init__(self) -> None:
        self.failures: dict[BlockSource, LazyfsError] = {}  # of what was begun for this reader
        self.served = 0  # batches that were begun for it, and came
        self.left = False  # nobody waits any more

    def leave(self) -> None:
        """The reader is gone, with or without what it wanted."""
        self.left = True
        self.failures.clear()  # the one that was raised knows the frames that know this


T = TypeVar("T", bound=Ticket)
_Key = tuple[BlockSource, int]  # a source and one of its pieces


@dataclass(slots=True)
class _Late(Generic[T]):
    """Those who came when a piece was in flight already. If that fails, they have not tried yet."""

    rank: Rank
    extent: Extent | None = None
    tickets: dict[T, None] = field(default_factory=dict)


class Schedule(Generic[T]):
    """Owned by one dispatcher. What holds between two calls:

    - a piece is queued at one rank, or in flight, or neither;
    - at most `slots` batches are in flight; a batch below READ started while READ_SLOTS more were free, one of guesses
      while fewer than AHEAD_SLOTS were in flight, one at PACK while fewer than PACK_SLOTS were;
    - a ticket waits for a piece only while that is queued or in flight.
    """

    def __init__(self, slots: int = SLOTS) -> None:
        self._slots = slots
        self._going = 0  # batches in flight
        # By rank, then by source in the order of their turns: what is wanted of each piece, first come first.
        self._queues: dict[Rank, dict[BlockSource, dict[int, Extent]]] = {rank: {} for rank in Rank}
        self._order: dict[_Key, int] = {}  # of what is queued at PACK, over all sources: as a start needs it
        self._wishes = itertools.count()
        self._in_flight: set[_Key] = set()
        self._tickets: dict[_Key, dict[T, None]] = {}  # who waits for a piece, and waited when it was begun
        self._late: dict[_Key, _Late[T]] = {}

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or in flight."""
        return not self._going and not any(self._queues.values())

    def knows(self, source: BlockSource, parts: Iterable[Part]) -> bool:
        """Whether one of these pieces is queued or in flight."""
        keys = [(source, part.piece) for part in parts]
        return any(key in self._in_flight or self._rank_of(key) is not None for key in keys)

    def want(self, source: BlockSource, part: Part, rank: Rank, ticket: T | None = None) -> bool:
        """Somebody wants a part of a block. False: there is nothing to wait for, as all of it came already.

        What is queued at a lower rank rises to `rank`; what is in flight is joined.
        """
        key = source, part.piece
        if key in self._in_flight:
            self._join(key, part.lacks, rank, ticket)
            return True
        queued_at = self._rank_of(key)
        extent = part.lacks
        if queued_at is None:
            if extent is None:
                return False
            self._put(key, rank, extent)
        else:
            queued = self._queues[queued_at][source][part.piece]
            extent = queued if extent is None else queued.union(extent)
            if rank < queued_at:
                self._take(key, queued_at)
                self._put(key, rank, extent)
            else:
                self._queues[queued_at][source][part.piece] = extent
        if ticket is not None:
            self._tickets.setdefault(key, {})[ticket] = None
        return True

    def start(self) -> list[Batch]:
        """What may go now, and is in flight from now on. The most urgent first; sources of one rank in turn, but at
        PACK in the order of need."""
        batches: list[Batch] = []
        for rank in Rank:
            slots = self._slots if rank is Rank.READ else self._slots - READ_SLOTS
            slots = min(slots, _BELOW.get(rank, slots))
            queue = self._queues[rank]
            turns = deque(sorted(queue, key=self._since) if rank is Rank.PACK else queue)
            while turns and self._going < slots:
                source = turns.popleft()
                batch = self._batch(rank, source)
                if batch is None:
                    continue
                for piece in batch.pieces:
                    self._begin((source, piece))
                if source in queue:
                    queue[source] = queue.pop(source)  # behind the others
                    turns.append(source)
                    if rank is Rank.PACK:
                        turns = deque(sorted(turns, key=self._since))
                self._going += 1
                batches.append(batch)
        return batches

    def _batch(self, rank: Rank, source: BlockSource) -> Batch | None:
        """What one act brings. What nobody waits for goes behind what is read, and guesses behind each other: never
        more of that in one act than the source likes, since a reader who comes later may have to wait for all of it."""
        wanted = self._queues[rank][source]
        first = next(iter(wanted))
        if rank is Rank.AHEAD:
            return source.batch(first, {first: wanted[first]}, wanted)
        if rank is Rank.READ:
            behind = [self._queues[below].get(source, {}) for below in (Rank.AHEAD, Rank.PACK)]
            return source.batch(first, wanted, ChainMap(*behind))
        return source.batch(first, wanted, {}, lambda piece: (source, piece) not in self._in_flight)

    def _since(self, source: BlockSource) -> int:
        """When the first of what is wanted of a source at PACK was wanted."""
        return self._order[source, next(iter(self._queues[Rank.PACK][source]))]

    def ended(self, batch: Batch, error: LazyfsError | None) -> list[T]:
        """A batch came, or failed. Returns whom to wake: each looks for itself what it still misses.

        An error is that of those for whom the batch was begun. Who came later tries for himself: what he wants
        is queued again, and he sleeps on.
        """
        self._going -= 1
        keys = [(batch.source, piece) for piece in batch.pieces]
        self._in_flight.difference_update(keys)
        woken = {ticket: None for key in keys for ticket in self._tickets.pop(key, ()) if not ticket.left}
        for ticket in woken:
            if error is None:
                ticket.served += 1
            else:
                ticket.failures.setdefault(batch.source, error)
        for key in keys:
            if (late := self._late.pop(key, None)) is None:
                continue
            waiting = {ticket: None for ticket in late.tickets if not ticket.left and ticket not in woken}
            if error is not None and waiting and late.extent is not None:
                self._put(key, late.rank, late.extent)
                self._tickets[key] = waiting
            else:
                woken |= waiting
        return list(woken)

    def waiting_for(self, batch: Batch) -> list[T]:
        """Who waits for something that is in flight."""
        found: dict[T, None] = {}
        for piece in batch.pieces:
            key = batch.source, piece
            found |= self._tickets.get(key, {})
            if (late := self._late.get(key)) is not None:
                found |= late.tickets
        return [ticket for ticket in found if not ticket.left]

    def drop(self, source: BlockSource, rank: Rank) -> None:
        """Forgets what of a source is queued at a rank, unless somebody waits for it."""
        for piece in list(self._queues[rank].get(source, ())):
            if all(ticket.left for ticket in self._tickets.get((source, piece), ())):
                self._take((source, piece), rank)
                self._tickets.pop((source, piece), None)

    def clear(self) -> list[T]:
        """Forgets what is queued. Returns who waited for it."""
        for queue in self._queues.values():
            queue.clear()
        self._order.clear()
        dropped = [key for key in self._tickets if key not in self._in_flight]
        found = {ticket: None for key in dropped for ticket in self._tickets.pop(key) if not ticket.left}
        return list(found)

    def _join(self, key: _Key, extent: Extent | None, rank: Rank, ticket: T | None) -> None:
        """Waits for what is in flight. Without a ticket there is nothing to do: it comes anyway."""
        if ticket is None or ticket in self._tickets.get(key, ()):
            return
        late = self._late.setdefault(key, _Late(rank))
        late.rank = min(late.rank, rank)
        late.tickets[ticket] = None
        if extent is not None:
            late.extent = extent if late.extent is None else late.extent.union(extent)

    def _rank_of(self, key: _Key) -> Rank | None:
        source, piece = key
        return next((rank for rank in Rank if piece in self._queues[rank].get(source, ())), None)

    def _put(self, key: _Key, rank: Rank, extent: Extent) -> None:
        source, piece = key
        self._queues[rank].setdefault(source, {})[piece] = extent
        if rank is Rank.PACK:
            self._order[key] = next(self._wishes)

    def _take(self, key: _Key, rank: Rank) -> None:
        source, piece = key
        of_source = self._queues[rank][source]
        del of_source[piece]
        self._order.pop(key, None)
        if not of_source:
            del self._queues[rank][source]

    def _begin(self, key: _Key) -> None:
        rank = self._rank_of(key)
        if rank is not None:
            self._take(key, rank)
        self._in_flight.add(key)
