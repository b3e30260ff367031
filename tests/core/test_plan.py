"""Which spans go into one request, and how far is fetched ahead."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.blocks import BlockTable, BlockTableBuilder
from lazyfs.core.plan import REQUEST_BYTES, Readahead, next_run, spans_for_block
from lazyfs.core.spans import PLAIN_SPAN_BYTES, Compression, Point, PointKind, SpanTable, encode_points


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


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 4)), max_size=60))
def test_readahead_follows_the_demand_and_never_exceeds_it(demands: list[tuple[int, int]]) -> None:
    readahead = Readahead()
    demanded = 0
    for first, length in demands:
        ahead = readahead.after(first, first + length)
        demanded += length
        assert ahead.start == first + length
        assert len(ahead) <= demanded


def test_readahead_grows_with_a_streak_and_ends_with_it() -> None:
    readahead = Readahead()
    lengths = [len(readahead.after(at, at + 1)) for at in range(100)]
    assert lengths[0] == 0 and lengths == sorted(lengths) and lengths[-1] > 0
    assert len(readahead.after(5000, 5001)) == 0
