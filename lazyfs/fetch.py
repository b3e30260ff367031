"""Brings missing blocks into the cache: spans are fetched by ranged requests, decoded, verified, published.

One flight per span: whoever needs a span that is under way waits for that flight. A flight outlives the
reader that started it, so a reader's deadline never wastes what is already on the wire. Which spans go into
one request is decided when a slot is free: all that is wanted by then and neighbouring goes together.
"""

from __future__ import annotations

import collections
import logging
import os
import threading
import weakref
from dataclasses import dataclass, field

import trio

from lazyfs.cache import CachedLayer
from lazyfs.core.deflate import WINDOW_BYTES
from lazyfs.core.index import unpack_windows
from lazyfs.core.plan import REQUEST_BYTES, Readahead, next_run, spans_for_block
from lazyfs.core.spans import WINDOWS_PER_GROUP, Span, SpanTable
from lazyfs.errors import HostError, ImageError, LazyfsError, RemoteError
from lazyfs.inflate import SpanDecoder
from lazyfs.source import Source

log = logging.getLogger("lazyfs.fetch")

# Data that arrives whole but does not verify is fetched again this often: a flipped bit on the wire is
# repaired, a wrong index or a lying server ends in an error.
_DAMAGE_RETRIES = 2
# How often a block may still be absent though a span of it came: it may lie in a few spans, each fetched
# again.
_MAX_ROUNDS = 12
# Pieces of blocks whose other part lies in a span not fetched yet, kept in memory by layer.
_MAX_FRAGMENTS = 32
_GROUPS_IN_MEMORY = 4


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


class Windows:
    """The windows of one layer, by group, from a file in the cache or by range from the index artifact."""

    def __init__(
        self,
        groups: tuple[tuple[int, int], ...],
        directory: str,
        remote: tuple[Source, str] | None,
    ) -> None:
        self._groups = groups
        self._directory = directory  # holds one file a group, named by the group's offset in the windows blob
        self._remote = remote  # source and digest of the windows blob
        self._recent: collections.OrderedDict[int, bytes] = collections.OrderedDict()
        self._lock = trio.Lock()

    async def get(self, number: int) -> bytes:
        """Window number `number` of the layer, 32 KiB. Raises LazyfsError."""
        group, place = divmod(number, WINDOWS_PER_GROUP)
        async with self._lock:  # single flight; held across one small request that has its own deadline
            raw = self._recent.get(group)
            if raw is None:
                raw = await self._load(group)
                self._recent[group] = raw
                if len(self._recent) > _GROUPS_IN_MEMORY:
                    self._recent.popitem(last=False)
        window = raw[place * WINDOW_BYTES : (place + 1) * WINDOW_BYTES]
        if len(window) != WINDOW_BYTES:
            raise ImageError("the index lacks a window that a span needs", "index the image again")
        return window

    async def _load(self, group: int) -> bytes:
        if group >= len(self._groups):
            raise ImageError("the index lacks a window that a span needs", "index the image again")
        offset, length = self._groups[group]
        path = os.path.join(self._directory, str(offset))
        try:
            return unpack_windows(_read_at_most(path, length + 1))
        except (OSError, ImageError):  # not fetched yet, or rotten
            pass
        if self._remote is None:
            raise ImageError("the windows of a local index are missing", "index the image again")
        source, digest = self._remote
        stored = await source.blob_range(digest, offset, offset + length)
        raw = unpack_windows(stored)
        try:
            _write(path, stored)
        except OSError as error:
            log.warning("cannot keep windows in the cache: %s", error)
        return raw


def _read_at_most(path: str, size_bytes: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size_bytes)


def _write(path: str, data: bytes) -> None:
    """A small file (tens of kilobytes, not synced: well below what a thread would cost)."""
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(data)
    os.replace(temporary, path)


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
    """A span on its way. `changed` is set, and replaced, whenever blocks of it were published."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self.changed = trio.Event()
        self.error: LazyfsError | None = None
        self.done = False

    def tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


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
        self._fragments = _Fragments(layer)
        self._readahead = Readahead()

    async def ensure(self, blocks: range) -> None:
        """Returns when all `blocks` are present; raises LazyfsError if one cannot be had.

        No deadline of its own: the caller sets one. Cancelled or not, flights go on.
        """
        launched_before = self._launched
        first, rounds = -1, 0
        while missing := self.layer.missing(blocks):
            if missing[0] != first:
                first, rounds = missing[0], 0
            if not self.origins:
                raise RemoteError("this layer has no source at present", "mount its image again while online")
            flight = self._start(missing)
            if flight is None:
                # Every span of it came, and still it is not there: a part was damaged. Once more from the
                # start.
                self._fragments.forget(missing)
                await trio.lowlevel.checkpoint()
            else:
                await flight.changed.wait()
                if flight.error is not None:
                    if flight.sequence <= launched_before or isinstance(flight.error, _OriginGone):
                        continue  # another reader's failure, of a time before this one: try for ourselves
                    raise flight.error
                if not flight.done or self.layer.has(first):
                    continue
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
        return gone

    def _start(self, missing: list[int]) -> _Flight | None:
        """Sees to it that all spans of the missing blocks are under way. No checkpoint.

        Returns the flight that the first block waits for next; None if all of it came already.
        """
        spans = self.origins[0].spans
        first_flight: _Flight | None = None
        for block in missing:
            for number in spans_for_block(self.layer.table, spans, block):
                if (spans, number) not in self._flights:
                    if self._fragments.holds(block, spans[number]):
                        continue  # it came with a neighbour, and waits for the block's other part
                    self._launch(spans, number)
                if first_flight is None:
                    first_flight = self._flights[spans, number]
            if first_flight is None:
                return None
        first, last = (spans_for_block(self.layer.table, spans, block) for block in (missing[0], missing[-1]))
        for number in self._readahead.after(first.start, last.stop):
            if number < len(spans) and (spans, number) not in self._flights and self._lacks(spans[number]):
                self._launch(spans, number)
        return first_flight

    def _lacks(self, span: Span) -> bool:
        """Whether a block of the span is absent; one that lies wholly in it stands for all."""
        blocks = self.layer.table.from_tar(span.tar_start, span.tar_end)
        return bool(self.layer.missing(blocks[1:-1] or blocks))

    def _launch(self, spans: SpanTable, number: int) -> None:
        self._launched += 1
        self._flights[spans, number] = _Flight(self._launched)
        self._wanted[spans].add(number)
        self._nursery.start_soon(self._fly, spans, number)

    async def _fly(self, spans: SpanTable, number: int) -> None:
        run = range(number, number + 1)
        error: LazyfsError | None = HostError("the daemon is ending")  # unless something else becomes of it
        try:
            async with self._limits.slots(self._source_of(spans)):
                wanted = self._wanted[spans]
                if number not in wanted:
                    run = range(0)
                    return  # another task took it along
                run = next_run(wanted, spans, number)
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
        """Fetches and publishes one run; returns how many blocks did not verify."""
        assembler = _Assembler(self.layer, self._fragments, run[0].tar_start)
        if len(run) == 1 and run[0].blob_end - run[0].blob_start > 2 * REQUEST_BYTES:
            await self._stream(origin, run[0], assembler)
            return assembler.bad
        windows = [await self._window(origin, span) for span in run]
        base = run[0].blob_start
        data = await self._range(origin, base, run[-1].blob_end)

        def decode() -> None:
            for span, window in zip(run, windows, strict=True):
                decoder = SpanDecoder(origin.spans.compression, span, window)
                for raw in decoder.feed(data[span.blob_start - base : span.blob_end - base]):
                    assembler.add(raw)
                decoder.finish()

        await trio.to_thread.run_sync(decode, limiter=self._limits.decoders)
        return assembler.bad

    async def _stream(self, origin: Origin, span: Span, assembler: _Assembler) -> None:
        """A span too large for one request (a layer of a single zstd frame): request by request, in order."""
        window = await self._window(origin, span)
        decoder = SpanDecoder(origin.spans.compression, span, window)

        def decode(data: bytes) -> None:
            for raw in decoder.feed(data):
                assembler.add(raw)

        for start in range(span.blob_start, span.blob_end, REQUEST_BYTES):
            data = await self._range(origin, start, min(start + REQUEST_BYTES, span.blob_end))
            await trio.to_thread.run_sync(decode, data, limiter=self._limits.decoders)
            self._flights[origin.spans, span.number].tell()
        decoder.finish()

    async def _window(self, origin: Origin, span: Span) -> bytes:
        if span.window is None:
            return b""
        try:
            with trio.fail_after(self._request_s()):
                return await origin.windows.get(span.window)
        except trio.TooSlowError:
            raise self._too_slow() from None

    def _request_s(self) -> float:
        """How long one request may take. A reader with a short deadline need not get what it asked for by its
        first read, but its next one must not wait long for a request that was made when the server was down.
        """
        return max(self.timeout_s, min(2 * self.timeout_s, self._limits.timeout_s))

    def _too_slow(self) -> RemoteError:
        return RemoteError(
            f"the registry did not deliver within {self._request_s():g} s",
            "try again, or raise timeout=",
        )

    async def _range(self, origin: Origin, start: int, end: int) -> bytes:
        try:
            with trio.fail_after(self._request_s()):
                return await origin.source.blob_range(origin.blob_digest, start, end)
        except trio.TooSlowError:
            raise self._too_slow() from None


class _Fragments:
    """Parts of blocks that straddle two spans, until the other part comes. Shared by decoding threads."""

    def __init__(self, layer: CachedLayer) -> None:
        self._layer = layer
        self._lock = threading.Lock()
        self._parts: collections.OrderedDict[int, dict[int, bytes]] = collections.OrderedDict()

    def holds(self, block: int, span: Span) -> bool:
        """Whether the part of the block that lies in this span is kept here."""
        offset = max(0, span.tar_start - self._layer.table.tar_offsets[block])
        with self._lock:
            return offset in self._parts.get(block, ())

    def forget(self, blocks: list[int]) -> None:
        """Drops all parts of these blocks."""
        with self._lock:
            for block in blocks:
                self._parts.pop(block, None)

    def add(self, block: int, offset: int, part: bytes) -> bytes | None:
        """Keeps a part; returns the whole block if this was what was missing. Forget it once it is published:
        until then nobody must think that its parts have to be fetched again.
        """
        with self._lock:
            parts = self._parts.setdefault(block, {})
            parts[offset] = part
            self._parts.move_to_end(block)
            pieces = []
            end = 0
            for start in sorted(parts):
                if start > end:
                    break
                pieces.append(parts[start][end - start :])
                end = max(end, start + len(parts[start]))
            if end == self._layer.table.lengths[block]:
                return b"".join(pieces)
            if len(self._parts) > _MAX_FRAGMENTS:
                self._parts.popitem(last=False)
            return None


class _Assembler:
    """Consecutive plain bytes of a layer -> whole blocks, published. Used by one thread at a time."""

    def __init__(self, layer: CachedLayer, fragments: _Fragments, tar_start: int) -> None:
        self._layer = layer
        self._fragments = fragments
        self._at = tar_start
        self.bad = 0

    def add(self, raw: bytes) -> None:
        start, end = self._at, self._at + len(raw)
        self._at = end
        table = self._layer.table
        view = memoryview(raw)
        for block in table.from_tar(start, end):
            if self._layer.has(block):
                continue
            first = table.tar_offsets[block]
            last = first + table.lengths[block]
            low, high = max(first, start), min(last, end)
            part = view[low - start : high - start]
            if low == first and high == last:
                self._publish(block, part)
            elif (whole := self._fragments.add(block, low - first, bytes(part))) is not None:
                try:
                    self._publish(block, whole)
                finally:
                    self._fragments.forget([block])

    def _publish(self, block: int, content: bytes | memoryview) -> None:
        if not self._layer.publish(block, content):
            self.bad += 1


class LayerHandle:
    """One layer of an open image: its data device, readable at any address."""

    def __init__(self, layer: CachedLayer, fetcher: LayerFetcher) -> None:
        self.layer = layer
        self.fetcher = fetcher
        self.content_root = layer.content_root
        self.size_bytes = layer.size_bytes
        # Reads answered from the cache, and reads that had to fetch. Counted without a lock by several
        # threads: a lost count is cheaper than a lock on the hot path.
        self.hits = self.misses = 0

    @property
    def timeout_s(self) -> float:
        """Within this a read ends."""
        return self.fetcher.timeout_s

    @timeout_s.setter
    def timeout_s(self, value_s: float) -> None:
        self.fetcher.timeout_s = value_s

    def read_cached(self, address: int, size_bytes: int) -> bytes | None:
        """Exactly the bytes asked for (cut at the end of the device) if all are here, else None. Any
        thread.
        """
        data = self.layer.read(address, size_bytes)
        if data is None:
            self.misses += 1
        else:
            self.hits += 1
        return data

    async def read(self, address: int, size_bytes: int) -> bytes:
        """The bytes, fetched if need be, within `timeout_s`; raises LazyfsError. Never short, never zeros for
        data.
        """
        blocks = self.layer.table.overlapping(address, size_bytes)
        try:
            with trio.fail_after(self.timeout_s):
                while True:
                    await self.fetcher.ensure(blocks)
                    data = self.layer.read(address, size_bytes)
                    if data is not None:
                        return data
        except trio.TooSlowError:
            raise RemoteError(
                f"data did not arrive within {self.timeout_s:g} s",
                "see the registry's state; the next read tries again",
            ) from None
