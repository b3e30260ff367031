"""Which spans go into one request, and how far is fetched ahead."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.layer.blocks import BlockTable, BlockTableBuilder
from lazyfs.core.layer.plan import (
    MAX_AHEAD_BYTES,
    MAX_SLACK_BYTES,
    MIN_SLACK_BYTES,
    MIN_STREAK_BYTES,
    REQUEST_BYTES,
    Readahead,
    next_run,
    slack_bytes,
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


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.floats(0, 100), st.floats(0, 100))
def test_slack_grows_with_the_demand_and_the_distance_within_bounds(
    one_bytes: int, other_bytes: int, one_s: float, other_s: float
) -> None:
    (little, much), (near_s, far_s) = sorted((one_bytes, other_bytes)), sorted((one_s, other_s))
    slack = slack_bytes(little, near_s)
    assert MIN_SLACK_BYTES <= slack <= MAX_SLACK_BYTES
    assert slack <= slack_bytes(much, near_s) and slack <= slack_bytes(little, far_s)


def test_a_small_start_near_its_registry_gets_no_more_than_needed() -> None:
    assert slack_bytes(12 << 20, 0.009) == MIN_SLACK_BYTES
    assert slack_bytes(24 << 20, 0.004) == slack_bytes(0, 0.04) == MAX_SLACK_BYTES


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
