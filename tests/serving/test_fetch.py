"""The fetcher: every read gets the right bytes or an error in time, whatever the source does, with
few requests.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import random
import weakref
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.lowlevel
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyfs.cache.images import WindowGroups
from lazyfs.core.index.windows import WindowGroup, pack_windows
from lazyfs.core.layer.plan import Cost, spans_for_block
from lazyfs.core.layer.spans import Compression, SpanTable, encode_points
from lazyfs.core.oci.digests import Digest
from lazyfs.decoding.span import SpanDecoder
from lazyfs.errors import ImageError, LazyfsError, RemoteError
from lazyfs.serving.dispatch import Reader
from lazyfs.serving.windows import Windows
from lazyfs.sources.source import Source
from tests.serving.rig import (
    KINDS,
    LAYER,
    FakeSource,
    Fault,
    Rig,
    Stored,
    cut,
    fine,
    flip,
    hang,
    refuse,
    rig,
    stored,
    tar,
)


@pytest.mark.parametrize("kind", KINDS)
async def test_reads_the_layer_whole(kind: str) -> None:
    async with rig(kind) as it:
        assert it.device.read_cached(0, 4096) is None
        await it.read()
        assert it.device.read_cached(0, len(LAYER.device)) == LAYER.device
        fetched = sum(end - start for start, end in it.source.ranges)
        assert fetched <= len(stored(kind).blob) + len(it.source.ranges)
        before = len(it.source.ranges)
        await it.read()
        assert len(it.source.ranges) == before


@pytest.mark.parametrize("kind", KINDS)
async def test_reads_block_by_block_in_any_order(kind: str) -> None:
    async with rig(kind) as it:
        numbers = list(range(it.device.layer.table.count))
        random.Random(1).shuffle(numbers)
        for number in numbers:
            await it.read(*it.blocks(number))


async def test_many_readers_of_one_block_make_one_request() -> None:
    async with rig("gzip") as it:
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(it.read, *it.blocks(4))
        assert len(it.source.ranges) == 1


async def test_neighbours_go_into_one_request() -> None:
    async with rig("plain") as it:
        async with trio.open_nursery() as nursery:
            for number in range(5):  # less than what makes a stream
                nursery.start_soon(it.read, *it.blocks(number))
        assert len(it.source.ranges) == 1


async def test_a_block_across_two_spans_fetches_each_once() -> None:
    async with rig("plain") as it:
        table, spans = it.device.layer.table, stored("plain").spans
        straddling = [
            block
            for block in range(table.count)
            if len(spans.covering(table.tar_offsets[block], table.tar_offsets[block] + table.lengths[block]))
            == 2
        ]
        first, second = straddling[0], straddling[1]
        await it.read(*it.blocks(first))
        await it.read(*it.blocks(second))
        spans_asked = [start for start, _ in it.source.ranges]
        assert len(set(spans_asked)) == len(spans_asked)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", [flip, cut])
async def test_damage_on_the_wire_is_fetched_again(kind: str, fault: Fault) -> None:
    async with rig(kind, fault, fault) as it:
        await it.read()
        assert it.source.counters.retries >= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", [flip, cut, refuse])
async def test_lasting_damage_is_an_error_and_the_next_read_tries_again(kind: str, fault: Fault) -> None:
    async with rig(kind, *[fault] * 200) as it:
        with pytest.raises((RemoteError, ImageError)):
            await it.read()
        assert len(it.source.ranges) < 100
        it.source.faults.clear()
        await it.read(*it.blocks(2, 3, 4, 5))
        await it.read()


async def test_a_straddling_block_with_a_lasting_flaw_ends_in_an_error() -> None:
    """Each span comes whole, yet the block they share never verifies: that must not go round for ever."""
    async with rig("plain") as it:
        spoiled = bytearray(stored("plain").blob)
        table = it.device.layer.table
        block = next(
            block
            for block in range(table.count)
            if len(spans_for_block(table, stored("plain").spans, block)) == 2
        )
        spoiled[table.tar_offsets[block]] ^= 1
        it.source.stored = Stored(bytes(spoiled), stored("plain").spans)
        for _ in range(3):
            with pytest.raises((RemoteError, ImageError)):
                await it.read(*it.blocks(block))
        assert len(it.source.ranges) < 150
        it.source.stored = stored("plain")
        await it.read()


async def test_a_silent_source_ends_in_an_error_in_time(autojump_clock: trio.testing.MockClock) -> None:
    async with rig("plain", *[hang] * 8, timeout_s=10) as it:
        started = trio.current_time()
        with pytest.raises(RemoteError, match="10 s"):
            await it.read(*it.blocks(0))
        assert trio.current_time() - started <= 10


async def test_a_cancelled_reader_leaves_the_flight_going() -> None:
    arrived = trio.Event()
    go_on = trio.Event()

    async def slow(answer: bytes) -> bytes:
        arrived.set()
        await go_on.wait()
        return answer

    async with rig("plain", slow) as it:
        address, size = it.blocks(0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.read, address, size)
            await arrived.wait()
            nursery.cancel_scope.cancel()
        assert it.device.read_cached(address, size) is None
        go_on.set()
        await it.read(address, size)
        assert len(it.source.ranges) == 1
        await it.landed()


async def test_a_layer_without_a_source_says_so() -> None:
    async with rig("plain") as it:
        await it.remove()
        with pytest.raises(RemoteError, match="no source"):
            await it.read()


async def test_another_image_s_source_steps_in_for_one_that_fails() -> None:
    async with rig("gzip") as it:
        kept = stored("gzip")
        broken = FakeSource(kept, [refuse] * 100)
        again = SpanTable(Compression.GZIP, len(kept.blob), len(tar()), encode_points(kept.points))
        it.add(broken, spans=again)
        await it.read()
        assert broken.ranges and it.source.ranges


async def test_an_image_with_the_layer_in_another_blob_opens_and_closes_during_a_flight() -> None:
    """Span numbers of one blob mean nothing in another one."""
    arrived, go_on = trio.Event(), trio.Event()

    async def slow(answer: bytes) -> bytes:
        arrived.set()
        await go_on.wait()
        return answer

    async with rig("plain", slow) as it:
        other = FakeSource(stored("zstd"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.read, *it.blocks(it.device.layer.table.count - 1))
            await arrived.wait()
            it.add(other, "other")
            nursery.start_soon(it.read, *it.blocks(0))
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
        await it.remove(1)
        await it.read()


async def test_damaged_windows_in_the_cache_are_fetched_again(tmp_path: Path) -> None:
    kept = stored("gzip")
    source = FakeSource(kept)
    if not kept.groups:
        raise AssertionError("the layer needs windows for this test")
    windows = Windows(kept.groups, WindowGroups(str(tmp_path)), (cast(Source, source), Digest("windows")))
    first = await windows.get(0, Cost())
    (tmp_path / "0").write_bytes(b"rotten")
    fresh = Windows(kept.groups, WindowGroups(str(tmp_path)), (cast(Source, source), Digest("windows")))
    assert await fresh.get(0, Cost()) == first
    # It was put right on disk.
    assert await Windows(kept.groups, WindowGroups(str(tmp_path)), None).get(0, Cost()) == first
    (forged,) = pack_windows([b"another"])
    (tmp_path / "0").write_bytes(forged.ljust(kept.groups[0].length, b"\0"))
    again = Windows(kept.groups, WindowGroups(str(tmp_path)), (cast(Source, source), Digest("windows")))
    assert await again.get(0, Cost()) == first
    with pytest.raises(ImageError):
        await fresh.get(10_000, Cost())
    with pytest.raises(ImageError):
        await Windows(kept.groups, WindowGroups(str(tmp_path / "none")), None).get(0, Cost())


async def test_windows_of_another_registry_are_not_used(tmp_path: Path) -> None:
    """Sound in form, but not those whose digest the index gives: what another image's registry said of a shared layer
    must not harm this one."""
    (forged,) = pack_windows([b"another"])
    lying = FakeSource(dataclasses.replace(stored("gzip"), windows=forged))
    remote = (cast(Source, lying), Digest("windows"))
    asked = WindowGroup(0, len(forged), stored("gzip").groups[0].sha256)
    with pytest.raises(ImageError, match="digest"):
        await Windows((asked,), WindowGroups(str(tmp_path)), remote).get(0, Cost())
    assert not os.listdir(tmp_path)
    unsaid = asked._replace(sha256="")  # as in version 1
    assert (await Windows((unsaid,), WindowGroups(str(tmp_path)), remote).get(0, Cost())).endswith(b"another")



@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(KINDS),
    faults=st.lists(st.sampled_from([fine, fine, flip, cut, refuse]), max_size=12),
    reads=st.lists(
        st.lists(
            st.tuples(st.integers(0, len(LAYER.device)), st.integers(1, 400_000)), min_size=1, max_size=4
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_any_reads_under_any_faults_are_right_or_an_error(
    kind: str, faults: list[Fault], reads: list[list[tuple[int, int]]]
) -> None:
    errors: list[LazyfsError] = []

    async def read(it: Rig, address: int, size_bytes: int) -> None:
        try:
            await it.read(address, size_bytes)
        except LazyfsError as error:
            errors.append(error)

    async def main() -> None:
        async with rig(kind, *faults) as it:
            for together in reads:  # those of one list at once
                async with trio.open_nursery() as nursery:
                    for address, size_bytes in together:
                        nursery.start_soon(read, it, address, size_bytes)
            it.source.faults.clear()
            await it.read()

    run: Any = trio.run
    run(main)
    assert not errors or faults


async def test_nothing_on_the_way_of_a_read_waits_for_the_cycle_collector() -> None:
    """It seldom looks, and a decoder has 0.1 MB."""
    gc.collect()
    gc.disable()
    try:
        async with rig("gzip", fine, fine, refuse, refuse) as it:
            for number in range(0, it.device.layer.table.count, 5):
                try:
                    await it.read(*it.blocks(number))
                except LazyfsError:
                    await it.landed()
            await it.landed()
            held = weakref.ref(it.device.layer), weakref.ref(it.sources[0]), weakref.ref(it.dispatchers[0])
            await it.remove()
        del it
        await trio.lowlevel.checkpoint()
        assert [one() for one in held] == [None] * len(held)
        assert not [one for one in gc.get_objects() if isinstance(one, SpanDecoder | Reader)]
    finally:
        gc.enable()
