"""The fetcher: every read gets the right bytes or an error in time, whatever the source does, with
few requests.
"""

from __future__ import annotations

import functools
import gzip
import random
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.lowlevel
import trio.testing
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyfs.cache.directory import BlockCache
from lazyfs.core.layer.blocks import BLOCK_BYTES, BlockTable
from lazyfs.core.layer.plan import spans_for_block
from lazyfs.core.layer.spans import Compression, Point, SpanTable, encode_points
from lazyfs.decoding.layers import layer_inflater
from lazyfs.errors import ImageError, LazyfsError, RemoteError
from lazyfs.serving.device import LayerHandle
from lazyfs.serving.fetcher import FetchLimits, LayerFetcher, Origin
from lazyfs.serving.windows import Windows
from lazyfs.sources.source import Source
from lazyfs.sources.transfer import TransferCounters
from tests.cache.cachelayers import make_layer

SIZES = [
    3 * BLOCK_BYTES,
    100,
    70_000,
    5 * BLOCK_BYTES + 17,
    4096,
    900_000,
    1,
    2 * BLOCK_BYTES,
    300_000,
] * 2 + [1_000_000]
LAYER = make_layer(SIZES)
Fault = Callable[[bytes], Awaitable[bytes]]


@functools.cache
def tar() -> bytes:
    table = BlockTable(LAYER.table)
    data = bytearray(table.tar_bytes)
    for block in range(table.count):
        start = table.tar_offsets[block]
        data[start : start + table.lengths[block]] = LAYER.content(block)
    return bytes(data)


@dataclass
class Stored:
    """The layer as a blob with its spans and windows."""

    blob: bytes
    spans: SpanTable
    points: list[Point] = field(default_factory=list)
    groups: tuple[tuple[int, int], ...] = ()
    windows: bytes = b""


@functools.cache
def stored(kind: str) -> Stored:
    if kind == "plain":
        return Stored(tar(), SpanTable(Compression.PLAIN, len(tar()), len(tar())))
    pieces = [tar()[at : at + 500_000] for at in range(0, len(tar()), 500_000)]
    blob = {
        "gzip": lambda: gzip.compress(tar(), 6),
        "members": lambda: b"".join(gzip.compress(piece, 1) for piece in pieces),
        "zstd": lambda: zstd.compress(tar()),
        "frames": lambda: b"".join(zstd.compress(piece) for piece in pieces),
    }[kind]()
    compression = Compression.GZIP if kind in ("gzip", "members") else Compression.ZSTD
    inflater = layer_inflater(compression)
    assert b"".join([*inflater.feed(blob), *inflater.finish()]) == tar()
    spans = SpanTable(compression, len(blob), len(tar()), encode_points(inflater.points))
    groups, at = [], 0
    for group in inflater.window_groups:
        groups.append((at, len(group)))
        at += len(group)
    return Stored(blob, spans, inflater.points, tuple(groups), b"".join(inflater.window_groups))


@dataclass(eq=False)
class FakeSource:
    """A source of one layer and its windows, in memory, that does to each answer what `faults` says,
    in turn.
    """

    stored: Stored
    faults: list[Fault] = field(default_factory=list)
    ranges: list[tuple[int, int]] = field(default_factory=list)
    counters: TransferCounters = field(default_factory=TransferCounters)

    async def blob_range(self, digest: str, start: int, end: int) -> bytes:
        await trio.lowlevel.checkpoint()
        if digest == "windows":
            return self.stored.windows[start:end]
        self.ranges.append((start, end))
        answer = self.stored.blob[start:end]
        return await self.faults.pop(0)(answer) if self.faults else answer


async def flip(answer: bytes) -> bytes:
    middle = len(answer) // 2
    return answer[:middle] + bytes([answer[middle] ^ 0x55]) + answer[middle + 1 :]


async def cut(answer: bytes) -> bytes:
    return answer[: len(answer) // 3]


async def refuse(answer: bytes) -> bytes:
    raise RemoteError("the test says no")


async def hang(answer: bytes) -> bytes:
    await trio.sleep_forever()
    raise AssertionError


async def fine(answer: bytes) -> bytes:
    return answer


@dataclass
class Rig:
    handle: LayerHandle
    source: FakeSource
    nursery: trio.Nursery

    async def read(self, address: int = 0, size_bytes: int = len(LAYER.device)) -> None:
        """Reads, and compares with the truth."""
        expected = LAYER.device[address : address + size_bytes]
        assert await self.handle.read(address, size_bytes) == expected

    @property
    def fetched(self) -> int:
        """Bytes of the blob that came so far."""
        return sum(end - start for start, end in self.source.ranges)

    async def landed(self) -> None:
        """Waits for the end of all flights."""
        with trio.fail_after(10):
            while self.nursery.child_tasks:
                await trio.lowlevel.checkpoint()

    def blocks(self, *numbers: int) -> tuple[int, int]:
        """Address and size of a run of blocks."""
        table = self.handle.layer.table
        return table.addresses[numbers[0]], table.addresses[numbers[-1]] + table.lengths[
            numbers[-1]
        ] - table.addresses[numbers[0]]


@asynccontextmanager
async def rig(kind: str, *faults: Fault, timeout_s: float = 30.0) -> AsyncIterator[Rig]:
    """A handle on the layer in an empty cache, its source answering with `faults` first."""
    kept = stored(kind)
    source = FakeSource(kept, list(faults))
    with tempfile.TemporaryDirectory(prefix="fetch-") as directory:
        cache = BlockCache(directory)
        layer = cache.create_layer(LAYER.content_root, LAYER.table)
        async with trio.open_nursery() as nursery:
            fetcher = LayerFetcher(layer, FetchLimits(timeout_s=timeout_s), nursery)
            windows = Windows(kept.groups, directory, (cast(Source, source), "windows"))
            fetcher.add_origin(Origin(cast(Source, source), "layer", kept.spans, windows))
            handle = LayerHandle(layer, fetcher)
            handle.timeout_s = timeout_s
            yield Rig(handle, source, nursery)
            nursery.cancel_scope.cancel()
        layer.close()


KINDS = ["plain", "gzip", "members", "zstd", "frames"]


@pytest.mark.parametrize("kind", KINDS)
async def test_reads_the_layer_whole(kind: str) -> None:
    async with rig(kind) as it:
        assert it.handle.read_cached(0, 4096) is None
        await it.read()
        assert it.handle.read_cached(0, len(LAYER.device)) == LAYER.device
        fetched = sum(end - start for start, end in it.source.ranges)
        assert fetched <= len(stored(kind).blob) + len(it.source.ranges)
        before = len(it.source.ranges)
        await it.read()
        assert len(it.source.ranges) == before


@pytest.mark.parametrize("kind", KINDS)
async def test_reads_block_by_block_in_any_order(kind: str) -> None:
    async with rig(kind) as it:
        numbers = list(range(it.handle.layer.table.count))
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
            for number in range(8):
                nursery.start_soon(it.read, *it.blocks(number))
        assert len(it.source.ranges) == 1


async def test_a_block_across_two_spans_fetches_each_once() -> None:
    async with rig("plain") as it:
        table, spans = it.handle.layer.table, stored("plain").spans
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
        table = it.handle.layer.table
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
        assert it.handle.read_cached(address, size) is None
        go_on.set()
        await it.read(address, size)
        assert len(it.source.ranges) == 1
        await it.landed()


async def test_a_layer_without_a_source_says_so() -> None:
    async with rig("plain") as it:
        it.handle.fetcher.remove_origins(cast(Source, it.source))
        with pytest.raises(RemoteError, match="no source"):
            await it.read()


async def test_another_origin_steps_in_for_one_that_fails() -> None:
    async with rig("gzip") as it:
        kept = stored("gzip")
        broken = FakeSource(kept, [refuse] * 100)
        again = SpanTable(Compression.GZIP, len(kept.blob), len(tar()), encode_points(kept.points))
        windows = Windows(kept.groups, "/nonexistent", (cast(Source, broken), "windows"))
        it.handle.fetcher.add_origin(Origin(cast(Source, broken), "layer", again, windows))
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
        windows = Windows((), "/nonexistent", None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.read, *it.blocks(it.handle.layer.table.count - 1))
            await arrived.wait()
            it.handle.fetcher.add_origin(Origin(cast(Source, other), "other", stored("zstd").spans, windows))
            nursery.start_soon(it.read, *it.blocks(0))
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
        it.handle.fetcher.remove_origins(cast(Source, other))
        await it.read()


async def test_damaged_windows_in_the_cache_are_fetched_again(tmp_path: Path) -> None:
    kept = stored("gzip")
    source = FakeSource(kept)
    if not kept.groups:
        raise AssertionError("the layer needs windows for this test")
    windows = Windows(kept.groups, str(tmp_path), (cast(Source, source), "windows"))
    first = await windows.get(0)
    (tmp_path / "0").write_bytes(b"rotten")
    fresh = Windows(kept.groups, str(tmp_path), (cast(Source, source), "windows"))
    assert await fresh.get(0) == first
    assert await Windows(kept.groups, str(tmp_path), None).get(0) == first  # it was put right on disk
    with pytest.raises(ImageError):
        await fresh.get(10_000)
    with pytest.raises(ImageError):
        await Windows(kept.groups, str(tmp_path / "none"), None).get(0)


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
