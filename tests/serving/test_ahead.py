"""What is fetched before it is asked for: nobody waits for it, and it comes in few requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from lazyfs.core.layer.plan import Cost
from lazyfs.sources.transfer import Take
from tests.serving.rig import LAYER, FakeSource, FixedCost, Rig, rig, stored


class Paced(FakeSource):
    """Its answers come in pieces of 64 KiB; `before` is awaited with the number of bytes that came, ahead of each."""

    before: Callable[[int], Awaitable[None]]

    async def blob_range(self, digest: str, start: int, end: int, take: Take | None = None) -> bytes:
        if digest == "windows" or take is None:
            return await super().blob_range(digest, start, end, take)
        self.ranges.append((start, end))
        for at in range(start, end, 64 << 10):
            await self.before(at - start)
            await take(self.stored.blob[at : min(at + (64 << 10), end)])
        return b""


async def paced(it: Rig, kind: str, before: Callable[[int], Awaitable[None]]) -> Paced:
    """The rig's only source from now on."""
    source = Paced(stored(kind))
    source.before = before
    await it.remove()
    it.add(source, "paced")
    return source


@pytest.mark.parametrize("kind", ["plain", "gzip"])
async def test_a_reader_goes_on_when_its_bytes_came_and_the_guess_behind_them_comes_later(kind: str) -> None:
    go_on = trio.Event()

    async def before(came_bytes: int) -> None:
        if came_bytes >= 512 << 10:
            await go_on.wait()

    async with rig(kind, cost=FixedCost(1 << 20)) as it:
        source = await paced(it, kind, before)
        with trio.fail_after(5):
            await it.read(*it.blocks(0))
        assert not go_on.is_set() and len(source.ranges) == 1
        last = it.device.layer.table.count // 2
        assert not it.device.layer.has(last)
        go_on.set()
        await it.landed()
        assert it.device.layer.has(1) and it.device.layer.has(2)


async def test_a_read_elsewhere_does_not_wait_for_guesses_that_are_stuck() -> None:
    """All slots that guesses may have are taken by answers that never come; who waits is served nevertheless."""
    stuck = trio.Event()

    async def before(came_bytes: int) -> None:
        if came_bytes >= 512 << 10:
            await stuck.wait()

    async with rig("plain", cost=FixedCost(1 << 20)) as it:
        source = await paced(it, "plain", before)
        table = it.device.layer.table
        with trio.fail_after(5):
            for block in (0, table.count // 2, table.count - 2):
                await it.read(*it.blocks(block))
        assert len(source.ranges) >= 3
        stuck.set()


async def test_reading_block_by_block_takes_few_requests() -> None:
    async with rig("gzip", cost=Cost()) as it:
        for block in range(it.device.layer.table.count):
            await it.read(*it.blocks(block))
        await it.landed()
        assert len(it.source.ranges) <= len(LAYER.device) >> 18
        assert it.fetched <= len(stored("gzip").blob) + len(it.source.ranges)


async def test_a_small_file_comes_whole() -> None:
    async with rig("gzip", cost=FixedCost(100_000)) as it:
        table = it.device.layer.table
        first = next(block for block in range(table.count) if sum(table.lengths[block : block + 3]) > 600_000)
        await it.read(*it.blocks(first + 1))
        await it.landed()
        assert it.device.layer.has(first) and it.device.layer.has(first + 2)


async def test_a_guess_that_is_damaged_is_nobody_s_error() -> None:
    """What is wanted comes before it; who reads the rest later has it fetched anew."""

    async def flip_late(answer: bytes) -> bytes:
        late = len(answer) * 3 // 4
        return answer[:late] + bytes([answer[late] ^ 0x55]) + answer[late + 1 :]

    async with rig("gzip", flip_late, flip_late, flip_late, cost=FixedCost(1 << 20)) as it:
        await it.read(*it.blocks(0))
        await it.landed()
        assert it.source.counters.retries == 3 and not it.source.faults
        await it.read()


async def test_windows_side_by_side_come_by_one_request() -> None:
    kept = stored("gzip")
    asked: list[tuple[int, int]] = []

    class Counting(FakeSource):
        async def blob_range(self, digest: str, start: int, end: int, take: Take | None = None) -> bytes:
            if digest == "windows":
                asked.append((start, end))
            return await super().blob_range(digest, start, end, take)

    async with rig("gzip", cost=FixedCost(1 << 20)) as it:
        await it.remove()
        it.add(Counting(kept), "counting")
        await it.read()
        assert asked == [(0, len(kept.windows))] and len(kept.groups) >= 1
