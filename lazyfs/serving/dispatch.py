"""Does what a schedule decides: the one loop that starts batches, and tells the schedule what ended."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import trio

from lazyfs.errors import HostError, LazyfsError
from lazyfs.serving.schedule import SLOTS, Rank, Schedule, Ticket
from lazyfs.serving.sources import Batch, BlockSource, Extent, Part

log = logging.getLogger("lazyfs.fetch")


class Reader(Ticket):
    """A ticket that a task sleeps on."""

    def __init__(self) -> None:
        super().__init__()
        self._woken = trio.Event()

    def wake(self) -> None:
        self._woken.set()

    async def woken(self) -> None:
        """Returns when something happened since the last time. No deadline of its own."""
        await self._woken.wait()
        self._woken = trio.Event()


class Dispatcher:
    """Fetches by way of one registry or layout, for all layers that come from there.

    Each has its own, so that a silent registry holds up nobody else's reads. Its tasks live in `nursery`, from the
    first want() to aclose(); batches outlive the readers they were begun for. Owned by the trio thread.
    """

    def __init__(self, nursery: trio.Nursery, slots: int = SLOTS) -> None:
        self._nursery = nursery
        self._schedule: Schedule[Reader] = Schedule(slots)
        self._scope = trio.CancelScope()
        self._running = False
        self._changed = trio.Event()
        self._at_rest = trio.Event()  # set, and replaced, when the loop finds nothing to do
        self._ended = trio.Event()

    def want(self, source: BlockSource, part: Part, rank: Rank, reader: Reader | None = None) -> bool:
        """As Schedule.want(). What is wanted in one turn of the loop may go into one batch.

        HostError: it was closed, or the process is ending.
        """
        if self._scope.cancel_called or self._ended.is_set():
            raise HostError("the daemon is ending")
        if not self._running:
            self._running = True
            self._nursery.start_soon(self._run)
        waits = self._schedule.want(source, part, rank, reader)
        self._changed.set()
        return waits

    def knows(self, source: BlockSource, parts: Iterable[Part]) -> bool:
        """Whether one of these pieces is on its way, or will be."""
        return self._schedule.knows(source, parts)

    def drop(self, source: BlockSource, rank: Rank) -> None:
        """As Schedule.drop()."""
        self._schedule.drop(source, rank)
        self._changed.set()

    def look_again(self, source: BlockSource, pieces: Sequence[int]) -> None:
        """Something happened to these pieces, or to what their source can bring: those who wait for them look whether
        that is enough for them, and sources that could not bring anything are asked again."""
        self._wake(self._schedule.waiting_for(Batch(source, pieces, Extent(0, 0))))
        self._changed.set()

    async def idle(self) -> None:
        """Returns once nothing is queued or in flight."""
        while not self._schedule.idle:
            await self._at_rest.wait()

    async def aclose(self) -> None:
        """Cancels what is in flight and waits for its end, so that the source can be closed. Readers that waited
        are woken: another source may have what they want."""
        self._scope.cancel()
        if self._running:
            await self._ended.wait()

    async def _run(self) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as acts:
                    while True:
                        self._changed = trio.Event()
                        for batch in self._schedule.start():
                            acts.start_soon(self._act, batch)
                        if self._schedule.idle:
                            self._at_rest.set()
                            self._at_rest = trio.Event()
                        await self._changed.wait()
                        # Whoever was woken by the same event asks first, and may be a neighbour of what is queued.
                        await trio.lowlevel.checkpoint()
        finally:
            self._wake(self._schedule.clear())
            self._at_rest.set()
            self._ended.set()

    async def _act(self, batch: Batch) -> None:
        error: LazyfsError | None = None
        try:
            error = await self._bring(batch)
        finally:
            self._wake(self._schedule.ended(batch, error))
            self._changed.set()

    async def _bring(self, batch: Batch) -> LazyfsError | None:
        """Why it did not come. (Returned from here: an error that its own frames hold would be left to the cycle
        collector, with all decoders.)"""
        try:
            await batch.source.bring(batch, lambda: self.look_again(batch.source, batch.pieces))
        except LazyfsError as failure:
            return failure
        except Exception as failure:
            log.exception("fetching failed in an unforeseen way")
            return HostError(f"fetching failed: {type(failure).__name__}: {failure}", "report this as a bug")
        return None

    @staticmethod
    def _wake(readers: Iterable[Reader]) -> None:
        for reader in readers:
            reader.wake()
