"""Spans fetched in part: only what is wanted comes, no byte comes twice, and damage still ends well."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
import trio
import trio.testing

from lazyfs.core.layer.plan import REQUEST_BYTES, nearby, spans_for_block
from lazyfs.core.layer.spans import PLAIN_SPAN_BYTES, Compression, Point, PointKind, Span, SpanTable, encode_points
from lazyfs.errors import ImageError, RemoteError
from tests.serving.rig import KINDS, LAYER, FakeSource, FixedCost, Rig, Stored, fine, refuse, rig, stored, tar

PARTED = ["plain", "gzip", "members"]  # spans that are fetched in part; zstd ones are whole frames


def blocks_inside(it: Rig, span: Span) -> list[int]:
    """Blocks that lie in one span as a whole."""
    table = it.device.layer.table
    inside = table.from_tar(span.tar_start, span.tar_end)
    ends = [table.tar_offsets[block] + table.lengths[block] for block in inside]
    return [
        block
        for block, end in zip(inside, ends, strict=True)
        if table.tar_offsets[block] >= span.tar_start and end <= span.tar_end
    ]


def end_of(it: Rig, block: int) -> int:
    return it.device.layer.table.tar_offsets[block] + it.device.layer.table.lengths[block]


def far_apart(it: Rig, spans: SpanTable) -> tuple[Span, int, int]:
    """A span, and two blocks in it of which the second does not come with the first."""
    for number in range(len(spans)):
        inside = blocks_inside(it, spans[number])
        for one, other in pairwise(inside):
            stop = spans.blob_end_for(spans[number], end_of(it, one))
            if stop < spans.blob_end_for(spans[number], end_of(it, other)):
                return spans[number], one, other
    raise AssertionError("the layer has no such span")


async def flip_early(answer: bytes) -> bytes:
    return answer[:1000] + bytes([answer[1000] ^ 0x55]) + answer[1001:]


def no_byte_twice(ranges: list[tuple[int, int]]) -> bool:
    """A span's first byte may be the last one of the span before."""
    return all(other[0] >= one[1] - 1 for one, other in pairwise(sorted(ranges)))


@pytest.mark.parametrize("kind", ["gzip", "members"])
async def test_a_span_is_fetched_as_far_as_it_is_wanted_and_then_gone_on_with(kind: str) -> None:
    async with rig(kind) as it:
        spans = stored(kind).spans
        span, one, other = far_apart(it, spans)
        await it.read(*it.blocks(one))
        end = spans.blob_end_for(span, end_of(it, one))
        assert it.source.ranges == [(span.blob_start, end)] and end < span.blob_end
        assert not it.device.layer.has(other)
        await it.read(*it.blocks(other))
        further = spans.blob_end_for(span, end_of(it, other))
        assert it.source.ranges[1:] == [(end, further)]


@pytest.mark.parametrize("kind", KINDS)
async def test_reading_in_order_fetches_each_byte_about_once(kind: str) -> None:
    async with rig(kind) as it:
        for address in range(0, len(LAYER.device), 64 * 1024):
            await it.read(address, min(64 * 1024, len(LAYER.device) - address))
        await it.landed()
        assert no_byte_twice(it.source.ranges)
        assert it.fetched <= len(stored(kind).blob) + len(it.source.ranges)
        assert len(it.source.ranges) <= 2 * len(stored(kind).spans) + len(stored(kind).blob) // REQUEST_BYTES
        assert not it.source.counters.retries


@pytest.mark.parametrize("kind", ["plain", "gzip", "members", "frames", "zstd"])
async def test_reading_blocks_in_order_fetches_no_byte_twice(kind: str) -> None:
    """Block by block, with jumps between two places: both go on where they were."""
    async with rig(kind) as it:
        count = it.device.layer.table.count
        for block in range(count // 2):
            await it.read(*it.blocks(block))
            await it.read(*it.blocks(count // 2 + block))
        await it.landed()
        assert no_byte_twice(it.source.ranges)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", PARTED)
async def test_many_readers_at_once_fetch_no_byte_twice(kind: str, seed: int) -> None:
    async with rig(kind) as it:
        spans = stored(kind).spans
        blocks = [block for number in range(len(spans)) for block in sorted(blocks_inside(it, spans[number]))]
        shuffler = random.Random(seed)

        async def reader(numbers: list[int]) -> None:
            for number in numbers:
                await it.read(*it.blocks(number))
                if shuffler.random() < 0.5:
                    await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            for first in range(4):  # each goes forwards: what lies before a cursor is never wanted again
                nursery.start_soon(reader, blocks[first::4])
        await it.landed()
        sizes = sum(end - start for start, end in it.source.ranges)
        assert sizes <= len(stored(kind).blob) + len(it.source.ranges)


async def test_what_straddles_the_place_where_a_span_was_left_is_completed() -> None:
    """The part of a block that came is kept, and is not taken for all that the span has of it."""
    async with rig("plain", cost=FixedCost(4096)) as it:
        spans, table = stored("plain").spans, it.device.layer.table
        block = next(
            block
            for block in range(1, table.count)
            for fetched_to in [nearby(table, range(block - 1, block), 4096, table.lengths[block - 1]).stop]
            if table.tar_offsets[block] // PLAIN_SPAN_BYTES == (end_of(it, block - 1) - 1) // PLAIN_SPAN_BYTES
            and 0 < fetched_to - table.tar_offsets[block] < table.lengths[block]
            and len(spans_for_block(table, spans, block)) == 2
            and fetched_to // PLAIN_SPAN_BYTES == table.tar_offsets[block] // PLAIN_SPAN_BYTES
        )
        await it.read(*it.blocks(block - 1))
        assert not it.device.layer.has(block)
        await it.read(*it.blocks(block))
        assert no_byte_twice(it.source.ranges)


@pytest.mark.parametrize("kind", ["gzip", "members"])
async def test_a_block_before_the_place_a_span_was_left_at_is_fetched_again(kind: str) -> None:
    async with rig(kind) as it:
        span, one, other = far_apart(it, stored(kind).spans)
        await it.read(*it.blocks(one))
        address, size = it.blocks(one)
        data_fd = os.open(it.device.layer.open_data_path(), os.O_WRONLY)
        os.pwrite(data_fd, bytes(size), address)
        os.close(data_fd)
        assert it.device.layer.verify() == [one]
        before = len(it.source.ranges)
        await it.read(address, size)
        assert it.source.ranges[before][0] == span.blob_start
        assert len(it.source.ranges) == before + 1
        await it.read(*it.blocks(other))


@pytest.mark.parametrize("kind", ["gzip", "members"])
async def test_damage_behind_the_place_a_span_was_left_at_is_fetched_from_its_start(kind: str) -> None:
    async with rig(kind) as it:
        span, one, other = far_apart(it, stored(kind).spans)
        await it.read(*it.blocks(one))
        it.source.faults.append(flip_early)
        await it.read(*it.blocks(other))
        assert it.source.counters.retries == 1
        assert [start for start, _ in it.source.ranges].count(span.blob_start) == 2


@pytest.mark.parametrize("kind", ["gzip", "members"])
async def test_a_refused_request_does_not_lose_what_was_decoded(kind: str) -> None:
    async with rig(kind) as it:
        _, one, other = far_apart(it, stored(kind).spans)
        await it.read(*it.blocks(one))
        it.source.faults.append(refuse)
        with pytest.raises(RemoteError):
            await it.read(*it.blocks(other))
        await it.read(*it.blocks(other))
        first, failed, again = it.source.ranges
        assert failed[0] == again[0] == first[1] and failed[1] <= again[1]  # asked for twice: with more slack


async def test_cursors_are_few_and_evicted_ones_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a layer with many spans, of which one place each is read."""
    monkeypatch.setattr("lazyfs.serving.spanrun.MAX_CURSORS", 2)
    kept = many_spans()
    async with rig("gzip") as it:
        source = FakeSource(kept)
        await it.remove()
        cursors = it.add(source, "other").cursors
        begun = []
        for number in range(len(kept.spans)):
            inside = blocks_inside(it, kept.spans[number])
            if inside and not it.device.layer.has(inside[0]):
                await it.read(*it.blocks(inside[0]))
                await it.landed()
                begun.append(number)
            assert len(cursors) <= 2 < len(kept.spans)
        assert len(cursors) == 2 < len(begun)
        await it.read()
        assert not it.source.ranges


def many_spans() -> Stored:
    """The layer stored with a span each 200 kB (of plain bytes that stand where they are, in stored blocks)."""
    out, points = bytearray(b"\x1f\x8b\x08\0\0\0\0\0\0\x03"), []
    for at in range(0, len(tar()), 5000):
        kind = PointKind.ENTRY if at % 200_000 == 0 else PointKind.MILESTONE
        points.append(Point(len(out), at, 0, kind))
        piece = tar()[at : at + 5000]
        out += b"\0" + len(piece).to_bytes(2, "little") + (len(piece) ^ 0xFFFF).to_bytes(2, "little") + piece
    out += b"\1\0\0\xff\xff" + bytes(8)
    return Stored(bytes(out), SpanTable(Compression.GZIP, len(out), len(tar()), encode_points(points)), points)


async def test_spans_without_milestones_are_fetched_whole() -> None:
    kept = stored("gzip")
    entries = [point for point in kept.points if point.kind is not PointKind.MILESTONE]
    spans = SpanTable(Compression.GZIP, len(kept.blob), len(tar()), encode_points(entries))
    async with rig("gzip", spans=spans) as it:
        for block in blocks_inside(it, spans[1]):
            await it.read(*it.blocks(block))
        await it.landed()
        assert it.source.ranges == [(spans[1].blob_start, spans[1].blob_end)]
        assert not len(it.sources[0].cursors)


def hostile_milestones(kind: str) -> Iterator[list[Point]]:
    """Points that are in order, but lead nowhere."""
    kept = stored(kind)
    for step in (1, 7, 1000):
        yield [
            kept.points[0],
            *(
                Point(kept.points[0].blob + n * step, n * 65536, n % 8, PointKind.MILESTONE)
                for n in range(1, len(tar()) // 65536)
            ),
        ]


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
async def test_milestones_that_lie_only_cost_requests(kind: str) -> None:
    kept = stored(kind)
    for points in hostile_milestones(kind):
        spans = SpanTable(kept.spans.compression, len(kept.blob), len(tar()), encode_points(points))
        async with rig(kind, spans=spans) as it:
            for block in (0, 3, it.device.layer.table.count - 1):
                await it.read(*it.blocks(block))
            await it.read()
            assert len(it.source.ranges) < 40


async def test_entries_that_lie_end_in_an_error() -> None:
    kept = stored("gzip")
    points = [kept.points[0], Point(5000, 100_000, 3, PointKind.ENTRY), Point(9000, 300_000, 0, PointKind.ENTRY)]
    spans = SpanTable(Compression.GZIP, len(kept.blob), len(tar()), encode_points(points))
    async with rig("gzip", spans=spans) as it:
        with pytest.raises((ImageError, RemoteError)):
            await it.read()
        assert len(it.source.ranges) < 100


async def test_one_large_frame_is_read_in_steps_and_gone_on_with() -> None:
    """A frame is fetched by requests of bounded size, only as far as wanted, and not from its start again."""
    kept = stored("zstd")
    assert len(kept.spans) == 1 and len(kept.blob) > 2 * REQUEST_BYTES
    async with rig("zstd") as it:
        last = it.device.layer.table.count - 1
        await it.read(*it.blocks(0))
        assert it.source.ranges == [(0, REQUEST_BYTES)]
        it.source.faults += [fine, refuse]
        with pytest.raises(RemoteError):
            await it.read(*it.blocks(last))
        del it.source.ranges[-1]  # it brought nothing
        await it.read(*it.blocks(last))
        await it.landed()
        assert it.fetched == len(kept.blob) and no_byte_twice(it.source.ranges)


async def test_a_wish_for_more_of_a_span_that_is_on_its_way_is_met_after_it() -> None:
    arrived, go_on = trio.Event(), trio.Event()

    async def slow(answer: bytes) -> bytes:
        arrived.set()
        await go_on.wait()
        return answer

    async with rig("gzip", slow) as it:
        _span, one, other = far_apart(it, stored("gzip").spans)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.read, *it.blocks(one))
            await arrived.wait()
            for _ in range(20):
                nursery.start_soon(it.read, *it.blocks(other))
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
        assert len(it.source.ranges) == 2 and no_byte_twice(it.source.ranges)


async def test_wishes_for_a_span_that_is_not_on_its_way_yet_go_together() -> None:
    async with rig("gzip") as it:
        _span, one, other = far_apart(it, stored("gzip").spans)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.read, *it.blocks(one))
            nursery.start_soon(it.read, *it.blocks(other))
        assert len(it.source.ranges) == 1


async def test_another_image_of_the_same_blob_goes_on_where_the_first_was() -> None:
    async with rig("gzip") as it:
        span, one, other = far_apart(it, stored("gzip").spans)
        await it.read(*it.blocks(one))
        second = FakeSource(stored("gzip"))
        it.add(second)
        await it.read(*it.blocks(other))
        assert len(it.source.ranges) == 1
        assert second.ranges[0][0] == it.source.ranges[0][1] > span.blob_start


async def test_a_span_on_its_way_from_one_image_s_source_is_not_asked_of_another() -> None:
    arrived, go_on = trio.Event(), trio.Event()

    async def slow(answer: bytes) -> bytes:
        arrived.set()
        await go_on.wait()
        return answer

    async with rig("gzip", slow) as it:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.read, *it.blocks(4))
            await arrived.wait()
            second = FakeSource(stored("gzip"))
            it.add(second)
            nursery.start_soon(it.read, *it.blocks(4))
            await trio.testing.wait_all_tasks_blocked()
            go_on.set()
        assert len(it.source.ranges) == 1 and not second.ranges


async def test_a_source_with_other_spans_does_not_go_on_with_a_foreign_cursor() -> None:
    async with rig("gzip") as it:
        _, one, other = far_apart(it, stored("gzip").spans)
        await it.read(*it.blocks(one))
        frames = FakeSource(stored("frames"))
        it.add(frames, "frames")
        await it.read(*it.blocks(other))
        assert frames.ranges and len(it.source.ranges) == 1
        await it.remove(1)
        await it.read()
        assert no_byte_twice(it.source.ranges)
        assert not it.source.counters.retries
