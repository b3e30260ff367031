"""Which spans a read needs, and in which requests they are fetched. Decides; does nothing."""

from __future__ import annotations

from collections.abc import Set

from lazyfs.core.blocks import BlockTable
from lazyfs.core.spans import SpanTable

# The largest single range request. Measured with httpx on loopback: throughput stops rising at 1 MiB, and a
# larger request only delays the first block and loses more when it breaks.
REQUEST_BYTES = 4 << 20
# How far beyond what is wanted a span is fetched at least, in plain bytes. Simulated with the reads of a python
# start on a 110 MB image: whole spans 45 requests and 10.5 % of the image, 256 KiB 57 and 9.3 %, 64 KiB 65 and
# 8.3 %, none 76 and 7.7 %.
SLACK_BYTES = 4 * 1024


def spans_for_block(table: BlockTable, spans: SpanTable, block: int) -> range:
    """Numbers of the spans that hold block number `block`: one, or two neighbours (rarely more)."""
    start = table.tar_offsets[block]
    return spans.covering(start, start + table.lengths[block])


def next_run(wanted: Set[int], spans: SpanTable, first: int, begun: Set[int]) -> range:
    """The run of neighbouring wanted spans around `first` that one request shall bring.

    `wanted` holds the numbers of spans that are wanted and not in flight, among them `first`. A run is
    extended forwards, then backwards, while its blob bytes stay within REQUEST_BYTES. Of the spans in `begun`,
    whose beginning is here already, only a run's first may be one.
    """
    low = first
    high = first + 1
    start, end = spans[first].blob_start, spans[first].blob_end
    while high in wanted and high not in begun and spans[high].blob_end - start <= REQUEST_BYTES:
        end = spans[high].blob_end
        high += 1
    while low not in begun and low - 1 in wanted and end - spans[low - 1].blob_start <= REQUEST_BYTES:
        low -= 1
        start = spans[low].blob_start
    return range(low, high)


# Spans fetched ahead at most: 16 MiB of plain data, what four requests in flight bring.
_MAX_AHEAD = 16
# ... and only once this many spans were wanted in a row: a program's start is not a stream.
_MIN_STREAK = 4


class Readahead:
    """Recognises demand that goes through a layer in order, and says how far to fetch ahead of it.

    The distance grows with the length of the streak, so that what is fetched in vain never exceeds what was
    wanted before.
    """

    def __init__(self) -> None:
        self._end = -1  # of the demand before
        self._ahead_end = -1  # of what was fetched ahead of it
        self._streak = 0

    def after(self, first: int, end: int) -> range:
        """Spans [first, end) are demanded now; returns the spans to fetch with them."""
        if self._end - 1 <= first <= self._ahead_end:
            self._streak += max(0, end - self._end)
        else:
            self._streak = 0
        self._end = end
        self._ahead_end = end + (min(_MAX_AHEAD, self._streak // 2) if self._streak >= _MIN_STREAK else 0)
        return range(end, self._ahead_end)
