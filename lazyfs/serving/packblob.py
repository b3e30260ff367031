"""A startup pack where it is stored. Its beginning is asked for before the image is open, and kept in memory."""

from __future__ import annotations

import trio

from lazyfs.core.layer.plan import REQUEST_BYTES
from lazyfs.core.starts.pack import PREFIX_BYTES, PackHead, head_size
from lazyfs.errors import LazyfsError, RemoteError
from lazyfs.images.packs import FoundPack, open_head
from lazyfs.sources.transfer import Take

# So much is asked for before the image is open, and kept in memory till then: what a link of 200 Mbit/s brings by then.
# If some of the image's layers are here already, it is not known what of that is needed: then less.
# Over a slow link no more comes than in that time: it shares the link with the index, for which the mount waits.
BEGINNING_BYTES = 8 << 20
BEGINNING_S = 0.3
SHORT_BEGINNING_BYTES = 1 << 20
# What takes longer than a request for spans at most does goes beside these.
BULK_BYTES = REQUEST_BYTES
# A server that is silent for so long is given up. Nobody waits for it: a reader has less patience (packsource.py).
FIRST_BYTE_S = 5.0
SILENCE_S = 2.0
# However steadily it trickles, one request ends within that; what is still missing is asked for anew.
REQUEST_S = 60.0
_PIECE_BYTES = 256 << 10


class Pace:
    """How quick a server is: how long its answers take to begin, and then to come."""

    _MIN_BYTES, _MIN_S = 128 << 10, 0.005  # less tells nothing about throughput

    def __init__(self) -> None:
        self.answer_s = 0.0  # the quickest; 0: unknown
        self.bytes_per_s = 0.0  # of the last answer; 0: unknown

    def answered(self, after_s: float) -> None:
        self.answer_s = min(self.answer_s or after_s, after_s)

    def brought(self, size_bytes: int, within_s: float) -> None:
        """An answer has brought so much since its first piece came."""
        if size_bytes >= self._MIN_BYTES and within_s >= self._MIN_S:
            self.bytes_per_s = size_bytes / within_s


class Advances:
    """The memory that beginnings may take, of all images that are being opened."""

    def __init__(self, most_bytes: int = 4 * BEGINNING_BYTES) -> None:
        self.left_bytes = most_bytes


class PackBlob:
    """The bytes of a pack. Nothing of them is verified. Owned by the trio thread."""

    def __init__(self, found: FoundPack, advances: Advances) -> None:
        """`advances`: what it takes of these is given back by close()."""
        self.size_bytes = found.size_bytes
        self.pace = Pace()
        self._found = found
        self._beginning = bytearray()
        self._beginning_ends = min(BEGINNING_BYTES, max(SHORT_BEGINNING_BYTES, advances.left_bytes), found.size_bytes)
        self._advances = advances
        self._taken_bytes = self._beginning_ends
        advances.left_bytes -= self._taken_bytes
        self._more = trio.Event()  # set, and replaced, when the beginning grew or ended
        self._ended = self._opened = self._closed = False

    @property
    def beginning_ends(self) -> int:
        """So far the pack is here already or on its way, unless that fails."""
        return len(self._beginning) if self._ended else self._beginning_ends

    async def begin(self) -> None:
        """Fetches the beginning. Never fails: what does not come is asked for by whoever wants it."""

        async def take(piece: bytes) -> None:
            self._beginning += piece
            self._grew()
            if not self._opened and trio.current_time() > until_s:
                self.shorten_beginning()
            if len(self._beginning) >= self._beginning_ends < asked_to:
                raise RemoteError("that is enough")

        asked_to, until_s = self._beginning_ends, trio.current_time() + BEGINNING_S
        try:
            await self._request(0, asked_to, take)
        except LazyfsError:
            pass
        finally:
            self._ended = True
            self._grew()

    def close(self) -> None:
        """No more of it is wanted. Idempotent."""
        self._closed = True
        self._advances.left_bytes += self._taken_bytes
        self._taken_bytes = 0
        self._beginning = bytearray()

    def opened(self) -> None:
        """The image is open: the mount waits for nothing any more."""
        self._opened = True

    def shorten_beginning(self) -> None:
        """Some of it may be here already: no more of the beginning comes than must."""
        self._beginning_ends = min(self._beginning_ends, max(SHORT_BEGINNING_BYTES, len(self._beginning)))

    def _grew(self) -> None:
        self._more.set()
        self._more = trio.Event()

    async def head(self) -> PackHead:
        """What the pack has. Raises LazyfsError."""
        prefix = await self._read(min(PREFIX_BYTES, self.size_bytes))
        data = await self._read(min(head_size(prefix), self.size_bytes))
        return await trio.to_thread.run_sync(open_head, self._found, data)

    async def _read(self, size_bytes: int) -> bytes:
        pieces: list[bytes] = []

        async def take(piece: bytes) -> None:
            pieces.append(piece)

        await self.range(0, size_bytes, take)
        return b"".join(pieces)

    async def range(self, start: int, end: int, take: Take) -> None:
        """Gives the bytes [start, end) to `take` as they come: from the beginning what lies there, the rest by one
        request. Raises LazyfsError; RemoteError also for silence."""
        while start < end and start < self.beginning_ends:
            more = self._more
            if start < len(self._beginning):
                stop = min(end, len(self._beginning), start + _PIECE_BYTES)
                await take(bytes(memoryview(self._beginning)[start:stop]))
                start = stop
            else:
                await more.wait()
        if self._closed:
            raise RemoteError("the startup pack is played no more")
        if start < end:
            await self._request(start, end, take)

    async def _request(self, start: int, end: int, take: Take) -> None:
        begun_s = trio.current_time()
        answered_s: float | None = None
        came_bytes = 0
        with trio.CancelScope(deadline=begun_s + FIRST_BYTE_S) as silence:

            async def heard(piece: bytes) -> None:
                nonlocal answered_s, came_bytes
                silence.deadline = float("inf")  # what is done with it is not the server's fault
                now_s = trio.current_time()
                if answered_s is None:
                    answered_s = now_s
                    self.pace.answered(now_s - begun_s)
                else:
                    came_bytes += len(piece)
                    self.pace.brought(came_bytes, now_s - answered_s)
                await take(piece)
                silence.deadline = min(trio.current_time() + SILENCE_S, begun_s + REQUEST_S)

            bulk = end - start > BULK_BYTES
            await self._found.source.blob_range(self._found.digest, start, end, heard, bulk=bulk)
            return
        raise RemoteError("the startup pack comes too slowly", "see how its registry is doing")
