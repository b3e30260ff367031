"""Blocks from a startup pack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import trio

from lazyfs.cache.layer import CachedLayer
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.core.starts.pack import PackHead
from lazyfs.errors import RemoteError
from lazyfs.serving.packblob import PackBlob
from lazyfs.serving.sources import Batch, Extent, Part
from lazyfs.serving.unpack import Unpacker

# A reader joins what comes within that, as far as the stream's pace tells. So the longest that the estimate may be, and
# the longest that he waits if it was wrong; then he goes elsewhere.
JOIN_S = 0.5
STALL_S = 1.0
# One request brings what takes about so long, so that a start needs few of them; at least and at most so much, or the
# little more that is the rest.
REQUEST_S = 1.0
MIN_REQUEST_BYTES, MAX_REQUEST_BYTES = 8 << 20, 32 << 20
# The next request goes out while so much of the last one is to come that the link stays busy until its answer.
BRIDGE_S = 0.05
_MIN_BRIDGE_BYTES, _MAX_BRIDGE_BYTES = 256 << 10, 8 << 20
# A gap of what is here already is fetched along rather than skipped if it takes no longer than a request, nor more.
_MAX_GAP_BYTES = 1 << 20
# A pack that was made of this image has no block that is refused. Of one that was not, little is fetched in vain.
_MIN_REFUSED = 16
_REFUSED_SHARE = 1 / 5
# So much of an answer is decoded at once, in a thread: first little, since somebody may wait for just that.
_MIN_PIECE_BYTES, _MAX_PIECE_BYTES = 32 << 10, 256 << 10


class _Flight:
    """One request that is under way."""

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.at = start  # so far it was received and decoded
        self.begun_s = trio.current_time()

    def comes_in_s(self, place: int, bytes_per_s: float) -> float:
        """When it is at a place in the blob, from now; `bytes_per_s` is the guess while nothing came; 0: unknown."""
        came = self.at - self.start
        if came:
            bytes_per_s = came / max(trio.current_time() - self.begun_s, 1e-4)
        return max(0, place - self.at) / bytes_per_s if bytes_per_s else 0.0


class PackSource:
    """A BlockSource whose pieces are the frames of a pack, for all layers of one image.

    A frame is asked for once. Those that are wanted ahead come in the order of need, in few large requests one after
    the other; one that a reader waits for does not wait for these.
    """

    worth_bytes = 0  # what is worth bringing is known

    def __init__(
        self,
        blob: PackBlob,
        head: PackHead,
        layers: Mapping[ContentRoot, CachedLayer],
        decoders: trio.CapacityLimiter,
    ) -> None:
        """May take a while for a large pack: call it in a thread."""
        self.blob = blob
        self.failed = False  # the last request; nothing is asked for until go_on()
        self.published = 0
        self.refused = 0
        self._closed = False
        self._head = head
        self._layers = layers
        self._decoders = decoders
        self._flights: dict[int, _Flight] = {}  # by frame
        self._over: set[int] = set()  # frames that came
        self._promises: dict[int, float] = {}  # until when a reader waits for a frame, the earliest first
        self._promised = trio.Event()
        self._late: set[int] = set()  # frames that did not come in time
        self._rested = trio.Event()
        self._frame_of: dict[ContentRoot, dict[int, int]] = {root: {} for root in layers}
        self._blocks: list[list[tuple[CachedLayer, int]]] = []  # of each frame, those that can be of use
        for number, frame in enumerate(head.frames):
            useful = []
            for root, block in head.blocks(frame):
                layer = layers.get(root)
                if layer is not None and block < layer.table.count:
                    useful.append((layer, block))
                    self._frame_of[root][block] = number
            self._blocks.append(useful)

    # -- for the fetchers and the schedule -------------------------------------------------------------------

    def parts(self, layer: ContentRoot, block: int) -> Sequence[Part] | None:
        """As BlockSource. Whoever asks is expected to wait, STALL_S at most: see late()."""
        frame = self._frame_of[layer].get(block)
        if frame is None or frame in self._over or frame in self._late or self.failed or self.is_over:
            return None
        flight = self._flights.get(frame)
        if frame not in self._promises:
            if flight is not None and flight.comes_in_s(self._end(frame), self.blob.pace.bytes_per_s) > JOIN_S:
                return None
            self._promises[frame] = trio.current_time() + STALL_S
            self._promised.set()
        return (self.part(frame),)

    def part(self, frame: int) -> Part:
        """All of a frame."""
        return Part(frame, Extent(0, self._head.frames[frame].plain_bytes))

    def ahead(self, layer: ContentRoot, start: int, end: int) -> Sequence[Part]:
        """As BlockSource: nothing but what is wanted anyway."""
        return ()

    def batch(
        self,
        first: int,
        wanted: Mapping[int, Extent],
        behind: Mapping[int, Extent],
        free: Callable[[int], bool] | None = None,
    ) -> Batch | None:
        """As BlockSource. What nobody waits for is held back while enough is on its way."""
        if self.is_over:
            return Batch(self, tuple(wanted), Extent(0, 0))  # as quickly forgotten as fetched
        ahead = not self.failed and self._left_bytes <= self._bridge_bytes
        if free is not None and not ahead:
            return None
        frames = self._head.frames
        run, start, end = [first], frames[first].offset, self._end(first)
        stop = self._request_ends(first)
        gap_bytes = min(_MAX_GAP_BYTES, int(self.blob.pace.answer_s * self.blob.pace.bytes_per_s))
        for number in range(first + 1, len(frames)):
            if self._end(number) > stop or frames[number].offset - end > gap_bytes:
                break
            if number in wanted or (ahead and number in behind):
                run.append(number)
                end = self._end(number)
            elif number not in self._over and (free is None or not free(number)):
                break
        self._flights.update(dict.fromkeys(run, _Flight(start, end)))  # now: more may be asked for before it begins
        return Batch(self, run, Extent(start, end))

    async def bring(self, batch: Batch, published: Callable[[], None]) -> None:
        """As BlockSource. A request that breaks is not repeated here: who wants it does."""
        try:
            frames = [frame for frame in batch.pieces if not self.is_over and self._lacks(frame)]
            self._ended(set(batch.pieces).difference(frames))
            if frames:
                flight = _Flight(self._head.frames[frames[0]].offset, self._end(frames[-1]))
                self._flights.update(dict.fromkeys(batch.pieces, flight))
                unpacker = Unpacker(self._head, self._layers, frames, flight.start)
                await self._stream(flight, unpacker, published)
        except Exception:
            self.failed = True
            raise
        finally:
            for frame in batch.pieces:
                self._flights.pop(frame, None)
            self._rested.set()

    async def _stream(self, flight: _Flight, unpacker: Unpacker, published: Callable[[], None]) -> None:
        pieces: list[bytes] = []
        step = _MIN_PIECE_BYTES

        async def take(piece: bytes) -> None:
            for at in range(0, len(piece), _MAX_PIECE_BYTES):  # a directory gives all at once
                await take_some(piece[at : at + _MAX_PIECE_BYTES])

        async def take_some(piece: bytes) -> None:
            nonlocal step
            pieces.append(piece)
            came = sum(map(len, pieces))
            if came < step and unpacker.at + came < flight.end:
                return
            data = b"".join(pieces)
            pieces.clear()
            step = min(2 * step, _MAX_PIECE_BYTES)
            await trio.to_thread.run_sync(unpacker.feed, data, limiter=self._decoders)
            flight.at = unpacker.at
            self._count(unpacker)
            published()
            if self.is_over:
                raise RemoteError("the startup pack is played no more")

        await self.blob.range(flight.start, flight.end, take)

    # -- for the player ------------------------------------------------------------------------------------

    @property
    def useless(self) -> bool:
        """Whether much of what came was refused."""
        all_blocks = self.refused + self.published
        return self.refused >= _MIN_REFUSED and self.refused > _REFUSED_SHARE * all_blocks

    @property
    def is_over(self) -> bool:
        """Whether it brings nothing any more."""
        return self._closed or self.useless

    def blocks(self) -> Iterator[tuple[ContentRoot, int]]:
        """All that can be of use."""
        for root, blocks in self._frame_of.items():
            for block in blocks:
                yield root, block

    def lacking(self) -> list[int]:
        """The frames that are worth asking for, in order of need. Any thread."""
        return [frame for frame in range(len(self._blocks)) if frame not in self._over and self._lacks(frame)]

    def awaits(self, frames: Sequence[int]) -> bool:
        """Whether one of these has yet to come, and will."""
        return not self.is_over and any(frame not in self._over for frame in frames)

    def close(self) -> list[int]:
        """Brings nothing any more. Returns frames for which somebody may wait."""
        self._closed = True
        self.blob.close()
        self._rested.set()
        return list(self._promises)

    def go_on(self) -> None:
        """Asks again after a failure."""
        self.failed = False
        self._late.clear()

    async def rested(self) -> None:
        """Returns when a request has ended since the last time."""
        await self._rested.wait()
        self._rested = trio.Event()

    async def late(self) -> list[int]:
        """Returns frames that did not come within STALL_S, and are not joined any more. Wake those who wait."""
        while not self._promises:
            self._promised = trio.Event()
            await self._promised.wait()
        now_s = trio.current_time()
        while self._promises and (due_s := next(iter(self._promises.values()))) > now_s:
            await trio.sleep_until(due_s)
            now_s = trio.current_time()
        late = [frame for frame, due_s in self._promises.items() if due_s <= now_s]
        for frame in late:
            del self._promises[frame]
        self._late.update(late)
        return late

    # ------------------------------------------------------------------------------------------------------

    def _end(self, frame: int) -> int:
        return self._head.frames[frame].offset + self._head.frames[frame].stored_bytes

    def _lacks(self, frame: int) -> bool:
        return any(not layer.has(block) for layer, block in self._blocks[frame])

    def _count(self, unpacker: Unpacker) -> None:
        """Takes over what it has done."""
        self.published += unpacker.published
        self.refused += unpacker.refused
        unpacker.published = unpacker.refused = 0
        self._ended(unpacker.over)
        unpacker.over.clear()

    def _ended(self, frames: Sequence[int] | set[int]) -> None:
        """These came, or are not needed any more."""
        self._over.update(frames)
        for frame in frames:
            self._promises.pop(frame, None)

    @property
    def _left_bytes(self) -> int:
        """So much is on its way."""
        return sum(flight.end - flight.at for flight in set(self._flights.values()))

    @property
    def _bridge_bytes(self) -> int:
        """So much comes while the next request is on its way."""
        pace = self.blob.pace
        bridge_bytes = int((pace.answer_s + BRIDGE_S) * pace.bytes_per_s)
        return min(_MAX_BRIDGE_BYTES, max(_MIN_BRIDGE_BYTES, bridge_bytes))

    def _request_ends(self, first: int) -> int:
        """The furthest that a request goes that begins with a frame."""
        if self._end(first) <= self.blob.beginning_ends:
            return self.blob.beginning_ends
        most_bytes = max(MIN_REQUEST_BYTES, int(REQUEST_S * self.blob.pace.bytes_per_s))
        end = self._head.frames[first].offset + min(MAX_REQUEST_BYTES, most_bytes)
        return end if self.blob.size_bytes - end > MIN_REQUEST_BYTES // 2 else self.blob.size_bytes
