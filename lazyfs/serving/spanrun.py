"""One act of fetching spans: a run of neighbouring ones, by one request, decoded and published."""

from __future__ import annotations

import collections
from collections.abc import Callable, Set
from dataclasses import dataclass

import trio

from lazyfs.core.layer.plan import REQUEST_BYTES
from lazyfs.core.layer.spans import Compression, Span, SpanTable
from lazyfs.decoding.span import SpanDecoder
from lazyfs.errors import ImageError
from lazyfs.serving.assemble import Assembler, Fragments
from lazyfs.serving.blob import BlobReader
from lazyfs.serving.sources import Batch

# Decoders of spans that were fetched in part, kept by layer: 0.1 MB each; a zstd one has the window of its frame, 8 MB
# and more.
MAX_CURSORS = 16
MAX_FRAME_CURSORS = 2
# So much of an answer is decoded at once, in a thread: first little, since somebody may wait for just that, then more.
MIN_PIECE_BYTES = 32 << 10
MAX_PIECE_BYTES = 256 << 10


@dataclass(slots=True)
class Cursor:
    """A span that is decoded up to somewhere: its decoder, and where in the blob and the plain layer it stands."""

    span: Span
    decoder: SpanDecoder
    blob_at: int
    tar_at: int


class Cursors:
    """Spans that were fetched in part, to go on with; the most recently used `limit` of a layer's blob.

    A cursor is here, or belongs to the run that goes on with it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: collections.OrderedDict[int, Cursor] = collections.OrderedDict()

    @classmethod
    def of(cls, spans: SpanTable) -> Cursors:
        """As many as a layer of this compression may have."""
        return cls(MAX_FRAME_CURSORS if spans.compression is Compression.ZSTD else MAX_CURSORS)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def numbers(self) -> Set[int]:
        """The spans whose beginning is here."""
        return self._kept.keys()

    def take(self, number: int, tar_at: int) -> Cursor | None:
        """The cursor of a span, if it does not stand beyond `tar_at`: then the beginning is wanted once more."""
        cursor = self._kept.pop(number, None)
        return cursor if cursor is not None and cursor.tar_at <= tar_at else None

    def keep(self, cursor: Cursor) -> None:
        """Takes a cursor back, unless nothing was decoded with it."""
        if cursor.blob_at == cursor.span.blob_start:
            return
        self._kept[cursor.span.number] = cursor
        self._kept.move_to_end(cursor.span.number)
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)


@dataclass(slots=True)
class RunContext:
    """What a run works with: all of one layer's blob at one source."""

    reader: BlobReader
    spans: SpanTable
    cursors: Cursors
    fragments: Fragments
    decoders: trio.CapacityLimiter


class SpanRun:
    """Brings one batch of spans. Use it once: `open`, then `fetch`.

    The last span is fetched only as far as it is wanted. The first one goes on where it was left, unless something
    before that is wanted once more (it was damaged).
    """

    def __init__(self, context: RunContext, current: Cursor, following: list[Cursor], target: int) -> None:
        self._context = context
        self._current = current  # what the next byte of the blob belongs to; changed by a decoding thread
        self._following = collections.deque(following)
        self._last = following[-1].span if following else current.span
        self._target = target  # the plain byte up to which the last span is wanted
        self._stop = context.spans.blob_end_for(self._last, target)  # where the blob should have led there
        self._assembler = Assembler(context.fragments, current.tar_at)
        self._sound = True  # no decoder failed

    @classmethod
    async def open(cls, context: RunContext, batch: Batch) -> SpanRun:
        """Has all decoders ready. May fetch windows."""
        first, *others = (context.spans[number] for number in batch.pieces)
        following = [await _entered(context, span) for span in others]
        current = context.cursors.take(first.number, batch.extent.start) or await _entered(context, first)
        return cls(context, current, following, batch.extent.end)

    async def fetch(self, published: Callable[[], None]) -> int:
        """Fetches and publishes; returns how many blocks did not verify. Calls `published` whenever some were."""
        while not self._arrived():
            await self._request(published)
        if self._assembler.at >= self._last.tar_end or self._current.blob_at >= self._last.blob_end:
            self._current.decoder.finish()
        else:
            self._keep()
        return self._assembler.bad

    def _arrived(self) -> bool:
        return self._assembler.at >= self._target or self._current.blob_at >= self._last.blob_end

    async def _request(self, published: Callable[[], None]) -> None:
        """One request: for all of it, but for a span that is larger than that (a layer of a single zstd frame)."""
        start = self._current.blob_at
        if start >= self._stop:  # the index said that the target lies before that
            self._stop = self._last.blob_end
        stop = min(self._stop, start + REQUEST_BYTES)
        pieces: list[bytes] = []
        step = MIN_PIECE_BYTES

        async def take(piece: bytes | None) -> None:
            nonlocal step
            if piece is not None:
                pieces.append(piece)
            if pieces and (piece is None or sum(map(len, pieces)) >= step):
                data = b"".join(pieces)
                pieces.clear()
                step = min(2 * step, MAX_PIECE_BYTES)
                before = self._assembler.published
                await trio.to_thread.run_sync(self._decode, data, limiter=self._context.decoders)
                if self._assembler.published > before:
                    published()

        try:
            await self._context.reader.range(start, stop, take)
            await take(None)
        except BaseException:
            self._keep()  # whoever tries again goes on
            raise
        if self._current.blob_at < stop:
            raise ImageError("a range of the layer is shorter than its index says", "try again")

    def _decode(self, data: bytes) -> None:
        """The next bytes of the blob -> whole blocks, published. In a worker thread."""
        start, self._sound = self._current.blob_at, False
        end = start + len(data)
        while True:
            span, decoder = self._current.span, self._current.decoder
            piece = data[max(0, span.blob_start - start) : max(0, span.blob_end - start)]
            if piece and not decoder.done:
                for raw in decoder.feed(piece):
                    self._assembler.add(raw)
            self._current.blob_at, self._current.tar_at = min(end, span.blob_end), self._assembler.at
            if end < span.blob_end or not self._following:
                break
            decoder.finish()
            self._current = self._following.popleft()  # a decoder has 0.1 MB, and a run may have a dozen
        self._sound = True

    def _keep(self) -> None:
        if self._sound and not self._assembler.bad:
            self._context.cursors.keep(self._current)


async def _entered(context: RunContext, span: Span) -> Cursor:
    """A decoder at the beginning of a span."""
    window = await context.reader.window(span)
    return Cursor(span, SpanDecoder(context.spans.compression, span, window), span.blob_start, span.tar_start)
