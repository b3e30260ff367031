"""Brings missing blocks into the cache: spans are fetched by ranged requests, decoded, verified, published.

One flight per span: whoever needs a span that is under way waits for that flight. A flight outlives the
reader that started it, so a reader's deadline never wastes what is already on the wire. Which spans go into
one request is decided when a slot is free: all that is wanted by then and neighbouring goes together.
"""

from __future__ import annotations

import collections
import logging
import os
import weakref
from dataclasses import dataclass, field

import trio

from lazyfs.cache.layer import CachedLayer
from lazyfs.core.layer.plan import REQUEST_BYTES, Readahead, next_run, slack_bytes, spans_for_block
from lazyfs.core.layer.spans import Compression, Span, SpanTable
from lazyfs.decoding.span import SpanDecoder
from lazyfs.errors import HostError, ImageError, LazyfsError, RemoteError
from lazyfs.serving.assemble import Assembler, Fragments
from lazyfs.serving.windows import Windows
from lazyfs.sources.source import Source

log = logging.getLogger("lazyfs.fetch")

# Data that arrives whole but does not verify is fetched again this often: a flipped bit on the wire is
# repaired, a wrong index or a lying server ends in an error.
_DAMAGE_RETRIES = 2
# How often a block may still be absent though a span of it came: it may lie in a few spans, each fetched
# again.
_MAX_ROUNDS = 12
# Decoders of spans that were fetched in part, kept by layer (measured: 0.1 MB each; a zstd one has the window
# of its frame, 8 MB and more).
_MAX_CURSORS = 16
_MAX_FRAME_CURSORS = 2


@dataclass
class FetchLimits:
    """Shared by all layers of a process: requests at once, decoding threads, deadline of one request in
    seconds.
    """

    timeout_s: float = 30.0
    # Measured on loopback with 2 cores: 4 requests keep the decoder busy; more only take memory.
    requests: int = 6
    decoders: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(os.cpu_count() or 1))
    _slots: weakref.WeakKeyDictionary[Source, trio.Semaphore] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def slots(self, source: Source | None) -> trio.Semaphore:
        """For requests to one source: each has its own, so that a silent registry holds up nobody else's."""
        if source is None:
            return trio.Semaphore(1)
        return self._slots.setdefault(source, trio.Semaphore(self.requests))


@dataclass
class Origin:
    """One place a layer can be fetched from."""

    source: Source
    blob_digest: str
    spans: SpanTable
    windows: Windows
    fetching: set[trio.CancelScope] = field(default_factory=set)  # what is under way from here
    changed: trio.Event = field(default_factory=trio.Event)  # set, and replaced, when something of it ended

    async def stop(self) -> None:
        """Cancels what is under way, and waits for its end: the source may be closed then."""
        for scope in self.fetching:
            scope.cancel()
        while self.fetching:
            await self.changed.wait()


class _OriginGone(RemoteError):
    """The image that a flight was started for has been closed; another one may have the layer, too."""


class _Flight:
    """A span on its way: those of its plain bytes from `begin` to `target` that are not here, at least (more with a
    neighbour in the same request). `changed` is set, and replaced, whenever blocks of it were published.
    """

    def __init__(self, sequence: int, span: Span, begin: int) -> None:
        self.sequence = sequence
        self.span = span
        self.begin = begin
        self.target = span.tar_start
        self.changed = trio.Event()
        self.error: LazyfsError | None = None
        self.done = False

    def aim(self, begin: int, target: int) -> None:
        """Has it bring these plain bytes, too."""
        self.begin = min(self.begin, begin)
        self.target = max(self.target, min(target, self.span.tar_end))

    def tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


@dataclass
class _Cursor:
    """A span that was decoded in part: its decoder, and where in the blob and the plain layer it stands."""

    decoder: SpanDecoder
    blob_at: int
    tar_at: int


class LayerFetcher:
    """Fetches blocks of one layer. Lives in `nursery`; owned by the trio thread."""

    def __init__(self, layer: CachedLayer, limits: FetchLimits, nursery: trio.Nursery) -> None:
        self.layer = layer
        self.origins: list[Origin] = []
        self.timeout_s = limits.timeout_s  # of a read of this layer
        self._limits = limits
        self._nursery = nursery
        # By span table: images may share a layer's content and yet have it in differently compressed blobs.
        self._wanted: collections.defaultdict[SpanTable, set[int]] = collections.defaultdict(set)
        self._flights: dict[tuple[SpanTable, int], _Flight] = {}
        self._launched = 0  # flights so far
        self._demanded_bytes = 0  # of blocks that were missing when they were read
        self._quickest_s = 0.0  # of the requests so far
        # Owned by the flight of its span while there is one. The most recently used are kept.
        self._cursors: collections.OrderedDict[tuple[SpanTable, int], _Cursor] = collections.OrderedDict()
        self._fragments = Fragments(layer)
        self._readahead = Readahead()

    async def ensure(self, blocks: range) -> None:
        """Returns when all `blocks` are present; raises LazyfsError if one cannot be had.

        No deadline of its own: the caller sets one. Cancelled or not, flights go on.
        """
        launched_before = self._launched
        first, rounds = -1, 0
        self._demanded_bytes += sum(self.layer.table.lengths[block] for block in self.layer.missing(blocks))
        while missing := self.layer.missing(blocks):
            if missing[0] != first:
                first, rounds = missing[0], 0
            if not self.origins:
                raise RemoteError("this layer has no source at present", "mount its image again while online")
            flight = self._start(missing)
            if flight is None:
                # Every span of it came, and still it is not there: a part was damaged. Once more from the
                # start.
                self._fragments.forget(first)
                await trio.lowlevel.checkpoint()
            else:
                await flight.changed.wait()
                if flight.error is not None:
                    if flight.sequence <= launched_before or isinstance(flight.error, _OriginGone):
                        continue  # another reader's failure, of a time before this one: try for ourselves
                    raise flight.error
                if not flight.done or self.layer.has(first):
                    continue
                if flight.target < min(self._end_of(first), flight.span.tar_end):
                    continue  # it was on its way already, to a place before this block
            rounds += 1
            if rounds > _MAX_ROUNDS:
                raise RemoteError(
                    "blocks of the layer do not match their index",
                    "the registry serves damaged data, or the index is not of this image",
                    temporary=False,
                )

    def add_origin(self, origin: Origin) -> None:
        """A place to fetch from, asked before those known so far."""
        for known in self.origins:
            if known.blob_digest == origin.blob_digest and known.spans.same_as(origin.spans):
                origin.spans = known.spans  # one flight serves both images
        self.origins.insert(0, origin)

    def remove_origins(self, source: Source) -> list[Origin]:
        """Forgets the places that belong to `source`, which is about to be closed; stop() them
        before that.
        """
        gone = [origin for origin in self.origins if origin.source is source]
        self.origins = [origin for origin in self.origins if origin.source is not source]
        for key in [key for key in self._cursors if self._source_of(key[0]) is None]:
            del self._cursors[key]
        return gone

    def _start(self, missing: list[int]) -> _Flight | None:
        """Sees to it that all spans of the missing blocks are under way. No checkpoint.

        Returns the flight that the first block waits for next; None if all of it came already.
        """
        spans = self.origins[0].spans
        first_flight: _Flight | None = None
        spare: _Flight | None = None  # perhaps just publishing it
        for block in missing:
            target = self._end_of(block) + slack_bytes(self._demanded_bytes, self._quickest_s)
            for number in spans_for_block(self.layer.table, spans, block):
                flight = self._flights.get((spans, number))
                begin = self._fragments.lacks_from(block, spans[number])
                if begin is None:  # it came with a neighbour, and waits for the block's other part
                    spare = spare or flight
                    continue
                if flight is None:
                    flight = self._launch(spans, number, begin, target)
                else:
                    self._aim(spans, number, begin, target)
                first_flight = first_flight or flight
            if first_flight is None:
                if spare is None:
                    return None
                first_flight = spare
        start, end = self.layer.table.tar_offsets[missing[0]], self._end_of(missing[-1])
        self._fetch_ahead(spans, start, end, self._readahead.after(start, end))
        return first_flight

    def _fetch_ahead(self, spans: SpanTable, start: int, end: int, upto: int) -> None:
        """After a demand of [start, end), whose spans are under way: what lies behind it, up to `upto`."""
        if upto <= end:
            return
        for number in spans.covering(start, min(upto, spans.tar_bytes)):
            span = spans[number]
            target = min(upto, span.tar_end)
            if (spans, number) in self._flights:
                self._aim(spans, number, target, target)
            elif self._lacks(max(end, span.tar_start), target):
                self._launch(spans, number, target, target)

    def _end_of(self, block: int) -> int:
        """Where a block ends in the plain layer."""
        return self.layer.table.tar_offsets[block] + self.layer.table.lengths[block]

    def _aim(self, spans: SpanTable, number: int, begin: int, target: int) -> None:
        """Has a span that is wanted, but not under way yet, bring these plain bytes, too."""
        if number in self._wanted.get(spans, ()):
            self._flights[spans, number].aim(begin, target)

    def _lacks(self, start: int, end: int) -> bool:
        """Whether a block of these plain bytes is absent; those that lie wholly in them stand for all."""
        blocks = self.layer.table.from_tar(start, end)
        return bool(self.layer.missing(blocks[1:-1] or blocks))

    def _launch(self, spans: SpanTable, number: int, begin: int, target: int) -> _Flight:
        self._launched += 1
        flight = self._flights[spans, number] = _Flight(self._launched, spans[number], begin)
        flight.aim(begin, target)
        self._wanted[spans].add(number)
        self._nursery.start_soon(self._fly, spans, number)
        return flight

    async def _fly(self, spans: SpanTable, number: int) -> None:
        run = range(number, number + 1)
        error: LazyfsError | None = HostError("the daemon is ending")  # unless something else becomes of it
        try:
            async with self._limits.slots(self._source_of(spans)):
                wanted = self._wanted[spans]
                if number not in wanted:
                    run = range(0)
                    return  # another task took it along
                begun = {one for table, one in self._cursors if table is spans}
                run = next_run(wanted, spans, number, begun)
                wanted.difference_update(run)
                await self._fetch_from_any(spans, [spans[one] for one in run])
                error = None
        except LazyfsError as failure:
            error = failure
        except Exception as failure:
            log.exception("fetching failed in an unforeseen way")
            error = HostError(f"fetching failed: {type(failure).__name__}: {failure}", "report this as a bug")
        finally:
            for one in run:
                self._wanted[spans].discard(one)
                flight = self._flights.pop((spans, one), None)
                if flight is not None:
                    flight.error = error
                    flight.done = True
                    flight.tell()
            if not self._wanted[spans]:
                del self._wanted[spans]

    def _source_of(self, spans: SpanTable) -> Source | None:
        return next((origin.source for origin in self.origins if origin.spans is spans), None)

    async def _fetch_from_any(self, spans: SpanTable, run: list[Span]) -> None:
        """Tries each origin with these spans, the newest first."""
        failure: LazyfsError | None = None
        for origin in list(self.origins):
            if origin.spans is not spans:
                continue
            with trio.CancelScope() as scope:
                origin.fetching.add(scope)
                try:
                    await self._fetch(origin, run)
                    return
                except LazyfsError as error:
                    failure = failure or error
                finally:
                    origin.fetching.discard(scope)
                    origin.changed.set()
                    origin.changed = trio.Event()
        raise failure or _OriginGone("this layer has no source at present", "the next read tries again")

    async def _fetch(self, origin: Origin, run: list[Span]) -> None:
        for attempt in range(_DAMAGE_RETRIES + 1):
            try:
                bad = await self._fetch_once(origin, run)
            except ImageError as error:
                if attempt == _DAMAGE_RETRIES:
                    raise
                log.warning("%s; trying again", error)
            else:
                if not bad:
                    return
                log.warning("%d blocks of %s did not verify; trying again", bad, origin.blob_digest)
            origin.source.counters.retries += 1
        raise RemoteError(
            f"data of layer {origin.blob_digest} does not match its index",
            "the registry serves damaged data, or the index is not of this image",
            temporary=False,
        )

    async def _fetch_once(self, origin: Origin, run: list[Span]) -> int:
        """Fetches and publishes one run; returns how many blocks did not verify.

        Its last span is fetched only as far as it is wanted. Its first one goes on where it was left, unless
        something before that is wanted once more (it was damaged).
        """
        spans = origin.spans
        last = run[-1]
        flight = self._flights[spans, last.number]
        begin = self._flights[spans, run[0].number].begin
        decoders = collections.deque([(span, await self._decoder(origin, span)) for span in run[1:]])
        cursor = self._cursors.get((spans, run[0].number))
        if cursor is None or cursor.tar_at > begin:
            cursor = _Cursor(await self._decoder(origin, run[0]), run[0].blob_start, run[0].tar_start)
        self._cursors.pop((spans, run[0].number), None)
        decoders.appendleft((run[0], cursor.decoder))
        final = decoders[-1][1]
        assembler = Assembler(self.layer, self._fragments, cursor.tar_at)
        end = spans.blob_end_for(last, flight.target)
        kept = (run[0].number, cursor)  # as far as the last request led
        blob_at = cursor.blob_at

        def decode(data: bytes, start: int) -> None:
            while True:
                span, decoder = decoders[0]
                piece = data[max(0, span.blob_start - start) : max(0, span.blob_end - start)]
                if piece and not decoder.done:
                    for raw in decoder.feed(piece):
                        assembler.add(raw)
                if span is last:
                    return
                decoder.finish()
                decoders.popleft()  # 0.1 MB each, and a run may have a dozen

        # One request, but for a span that is larger than that (a layer of a single zstd frame).
        while assembler.at < flight.target and blob_at < last.blob_end:
            if blob_at >= end:  # it was to lead there, and did not
                end = last.blob_end
            stop = min(end, blob_at + REQUEST_BYTES)
            try:
                data = await self._range(origin, blob_at, stop)
            except BaseException:
                if not assembler.bad:
                    self._keep(spans, *kept)  # whoever tries again goes on
                raise
            await trio.to_thread.run_sync(decode, data, blob_at, limiter=self._limits.decoders)
            blob_at = stop
            kept = (last.number, _Cursor(final, blob_at, assembler.at))
            flight.tell()
        if assembler.at >= last.tar_end or blob_at >= last.blob_end:
            final.finish()
        elif not assembler.bad:
            self._keep(spans, *kept)
        return assembler.bad

    def _keep(self, spans: SpanTable, number: int, cursor: _Cursor) -> None:
        if cursor.blob_at == spans[number].blob_start or self._source_of(spans) is None:
            return
        self._cursors[spans, number] = cursor
        limit = _MAX_FRAME_CURSORS if spans.compression is Compression.ZSTD else _MAX_CURSORS
        while len(self._cursors) > limit:
            self._cursors.popitem(last=False)

    async def _decoder(self, origin: Origin, span: Span) -> SpanDecoder:
        return SpanDecoder(origin.spans.compression, span, await self._window(origin, span))

    async def _window(self, origin: Origin, span: Span) -> bytes:
        if span.window is None:
            return b""
        try:
            with trio.fail_after(self.timeout_s):
                return await origin.windows.get(span.window)
        except trio.TooSlowError:
            raise self._too_slow() from None

    def _too_slow(self) -> RemoteError:
        return RemoteError(
            f"the registry did not deliver within {self.timeout_s:g} s",
            "try again, or raise timeout=",
        )

    async def _range(self, origin: Origin, start: int, end: int) -> bytes:
        try:
            with trio.fail_after(self.timeout_s):
                begun_s = trio.current_time()
                data = await origin.source.blob_range(origin.blob_digest, start, end)
        except trio.TooSlowError:
            raise self._too_slow() from None
        took_s = trio.current_time() - begun_s
        self._quickest_s = min(self._quickest_s or took_s, took_s)
        return data
