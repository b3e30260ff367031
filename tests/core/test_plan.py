"""Which spans go into one request, and how far is fetched ahead."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.layer.blocks import BLOCK_BYTES, BlockTable, BlockTableBuilder
from lazyfs.core.layer.plan import (
    MAX_AHEAD_BYTES,
    MIN_STREAK_BYTES,
    PLANNED_S,
    REQUEST_BYTES,
    WHOLE_FILE_BYTES,
    Cost,
    Readahead,
    file_of,
    longer_run,
    nearby,
    next_run,
    planned_run,
    spans_for_block,
)
from lazyfs.core.layer.spans import PLAIN_SPAN_BYTES, Compression, Point, PointKind, SpanTable, encode_points


@st.composite
def tables(draw: st.DrawFn) -> SpanTable:
    sizes = draw(st.lists(st.integers(100, REQUEST_BYTES * 3 // 2), min_size=1, max_size=20))
    starts = [Point(sum(sizes[:n]), sum(sizes[:n]) * 2, 0, PointKind.ENTRY) for n in range(len(sizes))]
    return SpanTable(Compression.GZIP, sum(sizes), 2 * sum(sizes), encode_points(starts))


@given(tables(), st.data())
def test_a_run_holds_the_wanted_span_its_wanted_neighbours_and_no_more_than_a_request(
    spans: SpanTable, data: st.DataObject
) -> None:
    wanted = data.draw(st.sets(st.integers(0, len(spans) - 1), min_size=1))
    begun = data.draw(st.sets(st.integers(0, len(spans) - 1)))
    first = data.draw(st.sampled_from(sorted(wanted)))
    run = next_run(wanted, spans, first, begun)
    assert first in run and set(run) <= wanted
    assert not begun.intersection(run[1:])  # a decoder goes on where it was left: at the start of the request
    size = spans[run[-1]].blob_end - spans[run[0]].blob_start
    assert len(run) == 1 or size <= REQUEST_BYTES
    if run.stop in wanted - begun:  # it stopped for its size only
        assert spans[run.stop].blob_end - spans[first].blob_start > REQUEST_BYTES
    # Whatever the order, in the end each wanted span was in exactly one run.
    left = set(wanted)
    runs: list[int] = []
    while left:
        one = next_run(left, spans, data.draw(st.sampled_from(sorted(left))), begun)
        left.difference_update(one)
        runs.extend(one)
    assert sorted(runs) == sorted(wanted)


def test_a_block_lies_in_one_span_or_straddles_two() -> None:
    builder = BlockTableBuilder()
    for start, length in ((512, 1000), (PLAIN_SPAN_BYTES - 10, 20)):
        builder.add(builder.place(length), start, length, bytes(32))
    table = BlockTable(builder.finish(1 << 20))
    spans = SpanTable(Compression.PLAIN, 1 << 20, 1 << 20)
    assert [spans_for_block(table, spans, block) for block in (0, 1)] == [range(0, 1), range(0, 2)]


@pytest.mark.parametrize(
    ("request_s", "bytes_per_s", "least", "most"),
    [
        (0.021, 24e6, 400e3, 650e3),  # WAN: as much as the link holds
        (0.002, 117e6, 150e3, 300e3),  # LAN
        (0.041, 6e6, 200e3, 320e3),  # home
        (0.0001, 1e9, 16 << 10, 120e3),  # next door
        (0.1, 20e3, 16 << 10, 16 << 10),  # never less, however slow a byte is
        (5.0, 100e6, 1 << 20, 1 << 20),  # never more, however slow a request is
    ],
)
def test_as_much_is_worth_fetching_as_takes_as_long_as_a_request(
    request_s: float, bytes_per_s: float, least: float, most: float
) -> None:
    cost = Cost()
    for size in (2_000, 300_000, 70_000, 1_000_000, 12_000, 500_000):
        cost.saw(size, request_s + size / bytes_per_s)
    assert least <= cost.worth_bytes <= most


def test_before_anything_was_seen_a_guess_is_small_and_slow_answers_under_load_are_outweighed() -> None:
    cost = Cost()
    assert 0 < cost.worth_bytes <= 256 << 10
    cost.saw(1000, 0.020)
    cost.saw(500_000, 0.040)
    before = cost.worth_bytes
    cost.saw(500_000, 0.400)  # others shared the wire
    assert before // 2 <= cost.worth_bytes <= 2 * before


def test_a_link_that_becomes_faster_or_slower_is_noticed() -> None:
    cost = Cost()
    for _ in range(100):
        cost.saw(500_000, 0.020 + 500_000 / 24e6)
    for _ in range(100):
        cost.saw(500_000, 0.002 + 500_000 / 117e6)
    assert cost.request_s < 0.010 and cost.bytes_per_s > 80e6
    for _ in range(200):
        cost.saw(500_000, 0.020 + 500_000 / 6e6)
    assert cost.request_s > 0.015 and cost.bytes_per_s < 40e6


def files(*sizes: int) -> BlockTable:
    """Files one behind the other, with a header each in the tar."""
    builder, at = BlockTableBuilder(), 0
    for size in sizes:
        address, at = builder.place(size), at + 512
        for start in range(0, size, BLOCK_BYTES):
            length = min(BLOCK_BYTES, size - start)
            builder.add(address + start, at + start, length, bytes(32))
        at += -(-size // 512) * 512
    return BlockTable(builder.finish(at + 1024))


def test_a_file_is_a_run_of_full_blocks_and_its_end() -> None:
    table = files(100, 3 * BLOCK_BYTES + 5, 4096, 40 << 20)
    assert [file_of(table, block) for block in (0, 1, 3, 4, 5)] == [
        range(0, 1), range(1, 5), range(1, 5), range(1, 5), range(5, 6)
    ]  # fmt: skip
    large = file_of(table, table.count - 1)
    assert (len(large) - 1) * BLOCK_BYTES >= WHOLE_FILE_BYTES and large.stop == table.count


def test_around_a_miss_lie_the_rest_of_a_small_file_and_what_a_request_s_time_brings() -> None:
    table = files(100, 3 * BLOCK_BYTES + 5, 40 << 20, 4096)
    whole_file = nearby(table, range(2, 3), 200_000, 0)
    assert whole_file == range(table.tar_offsets[1], table.tar_offsets[4] + 5)
    on_a_slow_link = nearby(table, range(2, 3), 1000, 0)
    assert on_a_slow_link == range(table.tar_offsets[2], table.tar_offsets[3] + 500)
    inside_large = nearby(table, range(20, 22), 1_000_000, 0)
    end = table.tar_offsets[21] + BLOCK_BYTES
    assert inside_large == range(table.tar_offsets[20], end + 500_000)
    demands = (0, 8 << 20, 16 << 20, 1 << 40)
    more = [nearby(table, range(20, 22), 1_000_000, demanded).stop - end for demanded in demands]
    assert more == [500_000, 1_500_000, 2_500_000, 3_000_000]
    last = table.count - 1
    assert nearby(table, range(last, last + 1), 500_000, 0).stop == table.tar_bytes


@given(tables(), st.data(), st.integers(0, 1 << 20), st.sampled_from([0.5e6, 2e6, 100e6]))
def test_a_planned_run_bridges_gaps_that_cost_less_than_a_request(
    spans: SpanTable, data: st.DataObject, gap_bytes: int, bytes_per_s: float
) -> None:
    class Known(Cost):
        worth_bytes = gap_bytes

    cost = Known()
    cost.saw(1 << 20, (1 << 20) / bytes_per_s)
    most_bytes = cost.bytes_in(PLANNED_S)
    assert 256 << 10 <= most_bytes <= REQUEST_BYTES
    wanted, begun, flying = (data.draw(st.sets(st.integers(0, len(spans) - 1))) for _ in range(3))
    first = data.draw(st.integers(0, len(spans) - 1))
    wanted |= {first}
    flying -= wanted
    run = planned_run(wanted, lambda number: number not in flying, spans, first, begun, cost)
    assert first in run and {run[0], run[-1]} <= wanted and not flying.intersection(run)
    assert not begun.intersection(run[1:])
    size = spans[run[-1]].blob_end - spans[run[0]].blob_start
    assert len(run) == 1 or size <= most_bytes
    inside = [number for number in run if number in wanted]
    gaps = [spans[two].blob_start - spans[one].blob_end for one, two in itertools.pairwise(inside)]
    assert all(gap <= gap_bytes for gap in gaps)
    after = next((number for number in range(run.stop, len(spans)) if number in wanted), None)
    if after is not None and not {*range(run.stop, after)} & flying and not {*range(run.stop, after + 1)} & begun:
        gap = spans[after].blob_start - spans[run[-1]].blob_end
        assert gap > gap_bytes or spans[after].blob_end - spans[first].blob_start > most_bytes


def test_all_that_is_wanted_comes_in_one_planned_run_or_another() -> None:
    sizes = [100_000] * 100
    starts = [Point(100_000 * number, 200_000 * number, 0, PointKind.ENTRY) for number in range(len(sizes))]
    spans = SpanTable(Compression.GZIP, sum(sizes), 2 * sum(sizes), encode_points(starts))
    left, runs = set(range(0, 100, 2)), []
    while left:
        run = planned_run(left, lambda _: True, spans, min(left), set(), Cost())
        left.difference_update(run)
        runs.append(run)
    assert len(runs) == 3 and runs[0] == range(0, 41)


@given(tables(), st.data())
def test_what_goes_along_lies_behind_and_fits(spans: SpanTable, data: st.DataObject) -> None:
    number = st.integers(0, len(spans) - 1)
    behind, begun = data.draw(st.sets(number)), data.draw(st.sets(number))
    first = data.draw(number)
    most_bytes = data.draw(st.integers(0, 2 * REQUEST_BYTES))
    run = longer_run(range(first, first + 1), behind, spans, begun, most_bytes)
    assert run[0] == first and set(run[1:]) <= behind - begun
    assert spans[run[-1]].blob_end - spans[first].blob_end <= most_bytes


def demand(readahead: Readahead, start: int, end: int) -> int:
    """How many bytes are fetched ahead."""
    upto = readahead.after(start, end)
    assert upto >= end
    return upto - end


@given(st.lists(st.tuples(st.integers(-(3 << 20), 3 << 20), st.integers(1, 3 << 20)), max_size=60))
def test_what_is_fetched_ahead_never_exceeds_half_of_what_was_wanted(steps: list[tuple[int, int]]) -> None:
    readahead, at, wanted = Readahead(), 1 << 30, 0
    for gap, size in steps:
        start = max(0, at + gap)
        ahead = demand(readahead, start, start + size)
        wanted += size
        assert ahead <= min(MAX_AHEAD_BYTES, max(0, wanted // 2 + (1 << 20)))
        at = start + size


def test_a_stream_is_fetched_ahead_of_in_few_large_steps() -> None:
    readahead = Readahead()
    step, size = 128 << 10, 64 << 20
    distances = [demand(readahead, at, at + step) for at in range(0, size, step)]
    assert not any(distances[: MIN_STREAK_BYTES // step - 1])
    requests = [distance for distance in distances if distance]
    assert len(requests) < 30  # of 512 demands
    assert requests == sorted(requests)
    assert requests[-1] == MAX_AHEAD_BYTES


def test_readers_that_overtake_each_other_are_one_stream() -> None:
    readahead = Readahead()
    step = 128 << 10
    order = [number ^ 1 for number in range(0, 64)]  # 1 0 3 2 5 4 ...
    assert any(demand(readahead, number * step, (number + 1) * step) for number in order)


def test_scattered_reads_are_no_stream() -> None:
    readahead = Readahead()
    assert not any(demand(readahead, at, at + 200_000) for at in range(0, 500 << 20, 5 << 20))


def test_a_stream_ends_with_a_jump() -> None:
    readahead = Readahead()
    assert demand(readahead, 0, 8 << 20)
    assert not demand(readahead, 100 << 20, (100 << 20) + 4096)
