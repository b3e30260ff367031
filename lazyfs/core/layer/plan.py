"""Which spans a read needs, and in which requests they are fetched. Decides; does nothing."""

from __future__ import annotations

from collections.abc import Callable, Set

from lazyfs.core.layer.blocks import BLOCK_BYTES, BlockTable
from lazyfs.core.layer.spans import SpanTable

# The largest single range request: throughput stops rising at 1 MiB (loopback), and a larger one only delays the
# first block and loses more when it breaks.
REQUEST_BYTES = 4 << 20
# A request that nobody waits for brings what takes about so long, if that is known.
PLANNED_S = 0.4
# What is guessed around a block that was missing: as much as takes half as long as a request, and once longer with each
# further 8 MiB that were missing when they were read, since who has read much reads on; but never longer than that.
_FIRST_TIMES, MAX_TIMES = 0.5, 3
_TIMES_BYTES = 8 << 20
# A file of up to so many bytes is fetched as a whole when some of it is read, if that takes no more than so many times
# as long as a request.
WHOLE_FILE_BYTES = 8 << 20
_WHOLE_FILE_TIMES = 8


class Cost:
    """What a request to one source costs: some time whatever it brings, and some for each byte, on the wire or for
    decoding, which goes on meanwhile. Estimated from what requests took."""

    # What is worth fetching along while nothing was seen, and the least and most: a delay that was measured under load
    # must not lead to fetching whole layers.
    _UNKNOWN_BYTES, _MIN_BYTES, _MAX_BYTES = 256 << 10, 16 << 10, 1 << 20
    _LARGE_BYTES = 64 << 10  # smaller requests tell nothing about throughput

    def __init__(self) -> None:
        self.request_s = 0.0  # of a request that brings little; 0: nothing was seen yet
        self.bytes_per_s = 0.0  # 0: nothing large was seen yet

    def saw(self, size_bytes: int, took_s: float) -> None:
        """A request brought so much, and took so long. Others share the wire: the quickest ones count, the last ones
        more than earlier ones."""
        self.request_s = min(self.request_s * 1.01 or took_s, took_s)
        if size_bytes >= self._LARGE_BYTES:
            rate = size_bytes / max(took_s - self.request_s, took_s / 4, 1e-4)
            self.bytes_per_s = max(rate, self.bytes_per_s * 0.95)

    @property
    def worth_bytes(self) -> int:
        """So many bytes, as they are stored, take about as long as the request that brings them."""
        if not self.bytes_per_s:
            return self._UNKNOWN_BYTES
        return min(self._MAX_BYTES, max(self._MIN_BYTES, int(self.request_s * self.bytes_per_s)))

    def bytes_in(self, seconds: float) -> int:
        """How large a request may be that nobody waits for, if it shall bring its bytes in so long: REQUEST_BYTES at
        most, and while nothing was seen."""
        if not self.bytes_per_s:
            return REQUEST_BYTES
        return min(REQUEST_BYTES, max(self._UNKNOWN_BYTES, int(seconds * self.bytes_per_s)))


def nearby(table: BlockTable, blocks: range, worth_bytes: int, demanded_bytes: int) -> range:
    """Which plain bytes of a layer are worth fetching when `blocks` are missing: the rest of a small file, and what
    follows. `worth_bytes`: so many plain bytes take as long as a request. `demanded_bytes`: how much of the layer was
    missing when it was read so far.
    """
    start, end = _extent(table, blocks)
    times = min(MAX_TIMES, _FIRST_TIMES + demanded_bytes / _TIMES_BYTES)
    upto = end + int(worth_bytes * times)
    for block in {blocks[0], blocks[-1]}:
        file_start, file_end = _extent(table, file_of(table, block))
        if file_end - file_start <= min(WHOLE_FILE_BYTES, _WHOLE_FILE_TIMES * worth_bytes):
            start, upto = min(start, file_start), max(upto, file_end)
    return range(start, min(upto, table.tar_bytes))


def _extent(table: BlockTable, blocks: range) -> tuple[int, int]:
    """Where blocks lie in the plain layer."""
    return table.tar_offsets[blocks[0]], table.tar_offsets[blocks[-1]] + table.lengths[blocks[-1]]


def file_of(table: BlockTable, block: int) -> range:
    """The blocks of the file, or of the stretch of a sparse one, that has block number `block`, as far as the table
    tells: all blocks of a file but the last are full, and lie one behind the other. Of a file larger than
    WHOLE_FILE_BYTES a part that is larger than that, too."""
    first, last, most = block, block, WHOLE_FILE_BYTES // BLOCK_BYTES
    while first and block - first <= most and _joined(table, first - 1):
        first -= 1
    while last + 1 < table.count and last - block <= most and _joined(table, last):
        last += 1
    return range(first, last + 1)


def _joined(table: BlockTable, block: int) -> bool:
    """Whether the next block may go on with the same file."""
    end = table.addresses[block] + BLOCK_BYTES
    return table.lengths[block] == BLOCK_BYTES and end == table.addresses[block + 1]


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


def longer_run(run: range, behind: Set[int], spans: SpanTable, begun: Set[int], most_bytes: int) -> range:
    """The run with those spans of `behind` that follow it, `most_bytes` of the blob at most."""
    end, high = spans[run[-1]].blob_end + most_bytes, run.stop
    while high in behind and high not in begun and spans[high].blob_end <= end:
        high += 1
    return range(run.start, high)


def planned_run(
    wanted: Set[int], free: Callable[[int], bool], spans: SpanTable, first: int, begun: Set[int], cost: Cost
) -> range:
    """As next_run(), when nobody waits: across gaps, too, that take less time than the request they save, and no larger
    than what comes in PLANNED_S, lest a reader who comes later shares the link with it for long.

    Of spans in a gap each must be `free`, that is not in flight. The run begins and ends with a wanted one.
    """
    most_bytes, gap_bytes = cost.bytes_in(PLANNED_S), cost.worth_bytes
    low, high = first, first + 1
    at = high  # the next span to look at
    while at < len(spans) and (at in wanted or free(at)) and at not in begun:
        span = spans[at]
        if span.blob_end - spans[low].blob_start > most_bytes or span.blob_start - spans[high - 1].blob_end > gap_bytes:
            break
        at += 1
        if at - 1 in wanted:
            high = at
    at = low - 1
    while at >= 0 and low not in begun and (at in wanted or (at not in begun and free(at))):
        span = spans[at]
        if spans[high - 1].blob_end - span.blob_start > most_bytes or spans[low].blob_start - span.blob_end > gap_bytes:
            break
        if at in wanted:
            low = at
        at -= 1
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

