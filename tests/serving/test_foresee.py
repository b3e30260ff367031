"""What a start will want is fetched before it asks: in its order, in few large requests, and nobody waits for it."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from lazyfs.core.layer.plan import REQUEST_BYTES, Cost
from lazyfs.core.layer.spans import PLAIN_SPAN_BYTES
from lazyfs.serving.schedule import PACK_SLOTS, Rank
from tests.serving.rig import KINDS, LAYER, FakeSource, Fault, FixedCost, cut, flip, refuse, rig, stored


@pytest.mark.parametrize("kind", KINDS)
async def test_what_was_foreseen_comes_in_few_requests_and_is_read_without_any(kind: str) -> None:
    async with rig(kind, cost=Cost()) as it:
        wanted = [block for block in range(it.device.layer.table.count) if block % 4]
        it.device.fetcher.foresee(wanted)
        await it.landed()
        size = len(stored(kind).blob)
        assert not it.device.layer.missing(range(0, 0)) and all(map(it.device.layer.has, wanted))
        assert len(it.source.ranges) <= 1 + size // REQUEST_BYTES + len(stored(kind).groups)
        asked = list(it.source.ranges)
        for block in wanted:
            await it.read(*it.blocks(block))
        assert it.source.ranges == asked


async def test_the_first_wanted_comes_first() -> None:
    """Gaps cost more than a request here, so blocks that do not lie in neighbouring spans come by themselves."""
    async with rig("plain") as it:
        table = it.device.layer.table
        step = PLAIN_SPAN_BYTES
        apart = [table.from_tar(at, at + step)[0] for at in range(0, table.tar_bytes - step, 4 * step)]
        order = [*apart[3:], *apart[:3]]
        starts = [table.tar_offsets[block] for block in order]
        it.device.fetcher.foresee(order)
        await it.landed()
        came = [next(n for n, at in enumerate(starts) if start <= at < end) for start, end in it.source.ranges]
        assert sorted(came) == list(range(len(order)))
        assert set(came[:PACK_SLOTS]) == set(range(PACK_SLOTS))  # these at once


async def test_what_is_here_or_cannot_be_had_is_passed_over() -> None:
    async with rig("gzip") as it:
        await it.read(*it.blocks(3))
        asked = list(it.source.ranges)
        it.device.fetcher.foresee([3])
        await it.landed()
        assert it.source.ranges == asked
        await it.remove()
        it.device.fetcher.foresee([4, 5])
        assert not it.device.layer.has(4)


async def test_a_read_of_what_was_foreseen_guesses_nothing_and_another_one_does() -> None:
    async with rig("plain", cost=FixedCost(1 << 20)) as it:
        table = it.device.layer.table
        it.device.fetcher.foresee([2])
        await it.read(*it.blocks(2))
        await it.landed()
        few = it.fetched
        assert few <= 3 * table.lengths[2]
        await it.read(*it.blocks(table.count // 2))
        await it.landed()
        assert it.fetched - few > 4 * table.lengths[2]


async def test_a_read_waits_for_nothing_that_was_foreseen() -> None:
    """All that may be in flight for a start is stuck, and more is queued: a read of something else, and one of what is
    queued, are served at once."""
    stuck = trio.Event()

    async def slow(answer: bytes) -> bytes:
        await stuck.wait()
        return answer

    async with rig("plain", *[slow] * PACK_SLOTS) as it:
        table = it.device.layer.table
        it.device.fetcher.foresee(range(0, table.count - 4, 3))
        await trio.testing.wait_all_tasks_blocked()
        assert len(it.source.ranges) == PACK_SLOTS
        with trio.fail_after(5):
            await it.read(*it.blocks(table.count - 1))
            await it.read(*it.blocks((table.count - 5) // 3 * 3))
        assert not it.device.layer.has(0)
        it.device.fetcher.forget_foreseen()
        stuck.set()
        await it.landed()
        assert len(it.source.ranges) <= PACK_SLOTS + 4


async def test_what_comes_from_a_source_that_was_added_later_is_not_dropped() -> None:
    go_on = trio.Event()

    async def slow(answer: bytes) -> bytes:
        await go_on.wait()
        return answer

    async with rig("plain", *[slow] * PACK_SLOTS) as it:
        count = it.device.layer.table.count
        it.device.fetcher.foresee(range(0, count, 3))
        await trio.testing.wait_all_tasks_blocked()
        later = it.add(FakeSource(stored("plain"), [slow] * PACK_SLOTS), "later")
        (*_, last) = range(1, count, 3)
        for block in range(1, count, 3):
            for part in later.parts(it.device.layer.content_root, block):
                it.dispatchers[1].want(later, part, Rank.PACK)
        await trio.testing.wait_all_tasks_blocked()
        it.device.fetcher.forget_foreseen()
        assert it.device.fetcher.foreseen() == (0, 0)
        go_on.set()
        await it.landed()
        assert it.device.layer.has(last) and len(it.source.ranges) == PACK_SLOTS


@pytest.mark.parametrize("faults", [[flip] * 3, [cut] * 3, [refuse]])
async def test_a_failure_of_what_was_foreseen_is_nobody_s_error(faults: list[Fault]) -> None:
    async with rig("gzip", *faults) as it:
        it.device.fetcher.foresee(range(5))
        await it.landed()
        await it.read(0, len(LAYER.device) // 2)
