"""Other kinds of source beside spans: a stream of many blocks, whole blocks from elsewhere; and what is less urgent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import trio
import trio.testing

from lazyfs.core.layer.spans import PLAIN_SPAN_BYTES
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.errors import RemoteError
from lazyfs.serving.dispatch import Dispatcher
from lazyfs.serving.schedule import SLOTS, Rank
from lazyfs.serving.sources import Batch, BlockSource, Extent, Part
from tests.serving.rig import LAYER, Rig, rig


class Stream(BlockSource):
    """Blocks in an order of its own, all in one act. Gives one each time `go_on` is called."""

    worth_bytes = 0

    def __init__(self, it: Rig, order: list[int]) -> None:
        self._it = it
        self._left = order
        self._steps = trio.Semaphore(0)
        self.breaks = False

    def go_on(self, blocks: int = 1) -> None:
        for _ in range(blocks):
            self._steps.release()

    def parts(self, layer: ContentRoot, block: int) -> Sequence[Part] | None:
        return [Part(0, Extent(0, 0))] if block in self._left else None

    def ahead(self, layer: ContentRoot, start: int, end: int) -> Sequence[Part]:
        return ()

    def batch(
        self, first: int, wanted: Mapping[int, Extent], behind: Mapping[int, Extent], free: object = None
    ) -> Batch:
        return Batch(self, [0], wanted[0])

    async def bring(self, batch: Batch, published: Callable[[], None]) -> None:
        while self._left:
            await self._steps.acquire()
            if self.breaks:
                self._left.clear()
                raise RemoteError("the stream broke")
            assert self._it.device.layer.publish(self._left[0], LAYER.content(self._left[0]))
            del self._left[0]
            published()


class Neighbour(BlockSource):
    """Whole blocks that somebody else has; some are rotten."""

    worth_bytes = 0

    def __init__(self, it: Rig, blocks: set[int], rotten: set[int]) -> None:
        self._it = it
        self._blocks = blocks
        self._rotten = rotten

    def parts(self, layer: ContentRoot, block: int) -> Sequence[Part] | None:
        return [Part(block, Extent(0, 0))] if block in self._blocks else None

    def ahead(self, layer: ContentRoot, start: int, end: int) -> Sequence[Part]:
        return ()

    def batch(
        self, first: int, wanted: Mapping[int, Extent], behind: Mapping[int, Extent], free: object = None
    ) -> Batch:
        return Batch(self, list(wanted), wanted[first])

    async def bring(self, batch: Batch, published: Callable[[], None]) -> None:
        await trio.lowlevel.checkpoint()
        for block in batch.pieces:
            if block in self._rotten or not self._it.device.layer.publish(block, LAYER.content(block)):
                self._blocks.discard(block)


async def test_a_reader_waits_for_what_a_stream_brings_and_no_longer() -> None:
    async with rig("plain") as it:
        stream = Stream(it, [4, 3, 9])
        it.device.fetcher.add(stream, it.dispatchers[0])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.device.fetcher.ensure, range(9, 10), Rank.PACK)
            await trio.testing.wait_all_tasks_blocked()
            stream.go_on(2)
            await it.read(*it.blocks(3, 4))  # the stream has not ended
            assert not it.source.ranges
            await it.read(*it.blocks(6))  # it does not bring this one
            assert len(it.source.ranges) == 1
            assert not it.device.layer.has(9)
            stream.go_on()
        assert it.device.layer.has(9) and len(it.source.ranges) == 1


async def test_what_a_broken_stream_did_not_bring_comes_from_spans() -> None:
    async with rig("gzip") as it:
        stream = Stream(it, [4, 3, 9])
        it.device.fetcher.add(stream, it.dispatchers[0])
        async with trio.open_nursery() as nursery:
            for block in (4, 3, 9):
                nursery.start_soon(it.read, *it.blocks(block))
            stream.go_on()
            await trio.testing.wait_all_tasks_blocked()
            assert not it.source.ranges
            stream.breaks = True
            stream.go_on()
        assert it.source.ranges


async def test_blocks_that_are_elsewhere_are_not_fetched_unless_they_are_rotten() -> None:
    async with rig("plain") as it:
        count = it.device.layer.table.count
        dispatcher = Dispatcher(it.nursery)
        it.device.fetcher.add(Neighbour(it, set(range(count)), rotten={5, 6}), dispatcher)
        await it.read()
        table = it.device.layer.table
        starts = {table.tar_offsets[block] // PLAIN_SPAN_BYTES * PLAIN_SPAN_BYTES for block in (5, 6)}
        assert {start for start, _ in it.source.ranges} <= starts | {start + PLAIN_SPAN_BYTES for start in starts}
        await dispatcher.aclose()


async def test_a_read_does_not_wait_for_what_is_less_urgent() -> None:
    """All slots that a fill may have are taken, by answers that do not come; more is queued."""
    go_on = trio.Event()

    async def slow(answer: bytes) -> bytes:
        await go_on.wait()
        return answer

    async with rig("plain", *[slow] * (SLOTS - 1)) as it:
        table = it.device.layer.table
        last = table.count - 1
        async with trio.open_nursery() as nursery:
            for block in range(0, last - 1, 3):
                nursery.start_soon(it.device.fetcher.ensure, range(block, block + 1), Rank.FILL)
                await trio.testing.wait_all_tasks_blocked()
            assert len(it.source.ranges) == SLOTS - 1
            await it.read(*it.blocks(last))
            assert len(it.source.ranges) == SLOTS
            go_on.set()
        assert all(it.device.layer.has(block) for block in range(0, last - 1, 3))


async def test_a_fill_is_no_demand() -> None:
    """It neither makes reads reach further nor looks like a stream."""
    async with rig("plain") as it:
        for block in range(20):
            await it.device.fetcher.ensure(range(block, block + 1), Rank.FILL)
        await it.landed()
        assert it.fetched < sum(it.device.layer.table.lengths[:20]) + 20 * 8192


async def test_closing_wakes_readers_who_go_on_elsewhere_or_say_why_not() -> None:
    arrived = trio.Event()

    async def never(answer: bytes) -> bytes:
        arrived.set()
        await trio.sleep_forever()
        raise AssertionError

    async with rig("gzip", never, never) as it:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.read, *it.blocks(4))
            await arrived.wait()
            it.add(second := type(it.source)(it.source.stored))
            await it.remove(0)
        assert second.ranges
        second.faults.append(never)
        arrived = trio.Event()

        async def close() -> None:
            await arrived.wait()
            await it.remove(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            with pytest.raises(RemoteError, match="no source"):
                await it.read()
