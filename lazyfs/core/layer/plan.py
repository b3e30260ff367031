"""Which spans a read needs, and in which requests they are fetched. Decides; does nothing."""

from __future__ import annotations

from collections.abc import Set

from lazyfs.core.layer.blocks import BlockTable
from lazyfs.core.layer.spans import SpanTable

# The largest single range request: throughput stops rising at 1 MiB (loopback), and a larger one only delays the
# first block and loses more when it breaks.
REQUEST_BYTES = 4 << 20
# How far beyond what is wanted a span is fetched, in plain bytes: at first, and at most. What is near is read soon: 4
# KiB save a seventh of a python start's requests for a hundredth more of the image.
MIN_SLACK_BYTES = 4 << 10
MAX_SLACK_BYTES = 1 << 20
# It grows once so much of a layer was demanded, by this share of what was demanded beyond that: heavy readers keep
# reading. A golang start needs a sixth fewer requests so, and smaller starts fetch no byte more.
_SMALL_START_BYTES = 12 << 20
_SLACK_SHARE = 8
# Where a request takes long whatever it brings, more is fetched from the beginning. A registry near by answers within
# the first, on a slow machine, too; behind that, so much for each second: over WAN, starts are 15 to 19 % shorter.
_NEAR_S = 0.010
_FAR_BYTES_PER_S = 64 << 20


def slack_bytes(demanded_bytes: int, request_s: float) -> int:
    """How far beyond what is wanted to fetch a span, when so much of its layer was missing when it was read, and its
    quickest request took `request_s`: who has read much reads on, nearby too, and waits for each request; of who reads
    little each byte counts.
    """
    much = (demanded_bytes - _SMALL_START_BYTES) // _SLACK_SHARE
    far = int((request_s - _NEAR_S) * _FAR_BYTES_PER_S)
    return min(MAX_SLACK_BYTES, max(MIN_SLACK_BYTES, much, far))


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


# Fetched ahead at most, in plain bytes: what four requests in flight bring.
MAX_AHEAD_BYTES = 16 << 20
# ... and only once so much was wanted in a row: a program's start is not a stream.
MIN_STREAK_BYTES = 1 << 20
# Demand in a row is not quite in order: several readers of one file overtake each other, one asks again after waiting,
# and what lies between is here already or belongs to another image.
_JITTER_BYTES = 1 << 20


class Readahead:
    """Recognises demand that goes through a layer in order, and says how far to fetch ahead of it. All positions
    are those of plain bytes in the layer's tar.

    The distance grows with the length of the streak, so that what is fetched in vain never exceeds half of what was
    wanted before. It is filled up when half of it is used up, by few large requests instead of many small ones.
    """

    def __init__(self) -> None:
        self._end = 0  # of the demand so far
        self._ahead_end = 0  # of what was fetched ahead of it
        self._streak_bytes = 0

    def after(self, start: int, end: int) -> int:
        """[start, end) is demanded now; returns the position up to which to fetch, at least `end`."""
        if self._end - _JITTER_BYTES <= start <= max(self._end, self._ahead_end) + _JITTER_BYTES:
            self._streak_bytes += max(0, end - max(start, self._end))
            self._end = max(self._end, end)
        else:
            self._streak_bytes = end - start
            self._end = self._ahead_end = end
        if self._streak_bytes < MIN_STREAK_BYTES:
            return end
        distance = min(MAX_AHEAD_BYTES, self._streak_bytes // 2)
        if self._ahead_end - self._end < distance // 2:
            self._ahead_end = self._end + distance
            return self._ahead_end
        return end
