"""Decodes a gzip layer once from start to end and notes where it can be entered later.

zlib says where deflate blocks begin (zstream.py). Every block boundary is a possible entry point, but costs a window
in the index. So each entry point is the boundary, between MIN_SPAN_BYTES and MAX_SPAN_BYTES behind the one before,
whose data refers least to what precedes it: more entry points with smaller windows than one each MiB. The start of a
member (RFC 1952) costs no window and becomes an entry point if the one before is FRAME_SPAN_BYTES behind.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from lazyfs.core.index.windows import pack_windows
from lazyfs.core.layer import deflate
from lazyfs.core.layer.deflate import WINDOW_BYTES
from lazyfs.core.layer.spans import (
    FRAME_SPAN_BYTES,
    MAX_SPAN_BYTES,
    MILESTONE_BYTES,
    MIN_SPAN_BYTES,
    WINDOWS_PER_GROUP,
    Point,
    PointKind,
)
from lazyfs.decoding.trimming import PROBE_BYTES, WindowTrimmer
from lazyfs.decoding.zstream import DeflateError, ZStream
from lazyfs.errors import ImageError

CHUNK_BYTES = 1 << 20
# To judge a boundary, so many plain bytes behind it are decoded, from so many compressed bytes at most.
_JUDGED_BYTES = 8192
_JUDGED_BLOB_BYTES = 12288
# Half of so many windows are packed at a time. A multiple of two groups, and large enough that packing need not wait.
_MAX_WAITING_WINDOWS = 32 * WINDOWS_PER_GROUP
# No better boundary is looked for once one has so few references.
_GOOD_REFERENCES = 64
# Boundaries nearer to each other than this do not differ enough to judge both.
_JUDGED_APART_BYTES = 64 * 1024


@dataclass(slots=True)
class _Candidate:
    """A block boundary that may become an entry point."""

    point: Point
    window: bytes
    behind: bytearray  # the blob from there on, up to PROBE_BYTES
    references: int  # how many of the next _JUDGED_BYTES depend on the window


class GzipInflater:
    """A gzip layer of one or many members. Its points depend on the blob alone if all chunks fed have one size."""

    def __init__(self) -> None:
        self.points: list[Point] = []  # complete after finish()
        self.window_groups: list[bytes] = []
        self._trimmer = WindowTrimmer()
        self._windows: list[Future[bytes]] = []  # waiting to be packed
        self._stream = ZStream(raw=False)
        self._judge = ZStream(raw=True)
        # The first 32 KiB repeat the output before, so that the window of a boundary always lies in the buffer.
        self._out = bytearray(WINDOW_BYTES + CHUNK_BYTES)
        self._out_address = ctypes.addressof(ctypes.c_char.from_buffer(self._out))
        self._end = self._given = WINDOW_BYTES  # bytes decoded into / handed out of the buffer
        self._tar_bytes = self._blob_bytes = 0
        self._member_tar_start = 0
        self._member_ended = True
        self._members = 0
        self._padding = False
        self._entries: list[Point] = []
        self._milestones: list[Point] = []
        self._judged_tar = 0  # the last boundary that was judged
        self._best: _Candidate | None = None  # since the last entry point
        self._chosen: _Candidate | None = None  # the last entry point, while its window is not trimmed

    def close(self) -> None:
        """Ends the trimmer's thread and process. May be called twice."""
        self._trimmer.close()

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Plain bytes that follow from the next bytes of the blob. Raises ImageError."""
        source = ctypes.c_char_p(chunk)
        base = ctypes.cast(source, ctypes.c_void_p).value or 0
        at = 0
        for candidate in (self._best, self._chosen):  # never the same one: see _choose
            if candidate is not None:
                candidate.behind += chunk[: max(0, PROBE_BYTES - len(candidate.behind))]
        while True:
            if self._member_ended:
                if at == len(chunk):
                    break
                if self._padding or (self._members and not chunk[at]):
                    self._pad(chunk[at:])
                    break
                self._stream.reset()
                self._member_ended = False
                self._member_tar_start = self._tar_bytes
            if self._end == len(self._out):
                yield self._take()
                self._slide()
            at, more = self._step(chunk, base, at)
            if not more:
                break
        self._blob_bytes += len(chunk)
        if self._end > self._given:
            yield self._take()

    def _pad(self, rest: bytes) -> None:
        """Accepts zeros behind the last member, as gzip(1) does, and nothing behind them."""
        self._padding = True
        if rest.strip(b"\0"):
            raise ImageError(f"the gzip layer has garbage behind its data, after {self._blob_bytes} bytes")

    def _step(self, chunk: bytes, base: int, at: int) -> tuple[int, bool]:
        """Calls inflate once, up to the next block boundary at most. Returns the new position, and whether to go on."""
        try:
            step = self._stream.step(
                base + at, len(chunk) - at, self._out_address + self._end, len(self._out) - self._end
            )
        except DeflateError as error:
            raise ImageError(f"the gzip layer is damaged after {self._blob_bytes + at} bytes: {error}") from None
        at += step.taken_bytes
        self._end += step.given_bytes
        self._tar_bytes += step.given_bytes
        if step.ended:
            self._member_ended = True
            self._members += 1
        elif step.boundary is not None:
            self._note_block(chunk, at, step.boundary)
        stuck = not (step.taken_bytes or step.given_bytes or step.ended)  # it needs more of the blob
        return at, not stuck and (at < len(chunk) or self._end == len(self._out) or self._member_ended)

    def _note_block(self, chunk: bytes, at: int, unused_bits: int) -> None:
        """Notes that a block begins `unused_bits` before byte `at` of the chunk."""
        first = at - 1 if unused_bits else at
        if first < 0:
            return  # the block begins in the chunk before: take the next boundary
        shift = (8 - unused_bits) % 8
        place = (self._blob_bytes + first, self._tar_bytes, shift)
        if not self._entries:
            self._entries.append(Point(*place, PointKind.ENTRY))
            return
        if self._tar_bytes - (self._milestones or self._entries)[-1].tar >= MILESTONE_BYTES:
            self._milestones.append(Point(*place, PointKind.MILESTONE))
        if self._tar_bytes == self._member_tar_start:
            if self._tar_bytes - self._entries[-1].tar >= FRAME_SPAN_BYTES:
                self._choose(_Candidate(Point(*place, PointKind.ENTRY), b"", bytearray(), 0))
            return
        if self._tar_bytes - self._entries[-1].tar < MIN_SPAN_BYTES:
            return
        if self._best is None or (
            self._best.references > _GOOD_REFERENCES and self._tar_bytes - self._judged_tar >= _JUDGED_APART_BYTES
        ):
            self._judged_tar = self._tar_bytes
            self._best = self._better(place, chunk, first)
        while self._tar_bytes - self._entries[-1].tar >= MAX_SPAN_BYTES:
            # A second time if the best one lies far back: between blocks of many megabytes.
            self._choose(self._best or self._better(place, chunk, first))

    def _better(self, place: tuple[int, int, int], chunk: bytes, first: int) -> _Candidate:
        """The best boundary since the last entry point, this one included; the earlier of two equal ones."""
        valid = min(WINDOW_BYTES, self._tar_bytes)
        window = bytes(self._out[self._end - valid : self._end])
        references = _references(self._judge, place[2], window, chunk[first : first + _JUDGED_BLOB_BYTES])
        if self._best is not None and self._best.references <= references:
            return self._best
        point = Point(*place, PointKind.ENTRY_WITH_WINDOW)
        return _Candidate(point, window, bytearray(chunk[first : first + PROBE_BYTES]), references)

    def _choose(self, candidate: _Candidate) -> None:
        """Makes a boundary the next entry point."""
        self._trim_chosen()
        self._entries.append(candidate.point)
        if candidate.point.kind is PointKind.ENTRY_WITH_WINDOW:
            self._chosen = candidate
        self._best = None

    def _trim_chosen(self) -> None:
        """Has the window of the last entry point trimmed. The blob behind it was fed long ago."""
        if self._chosen is None:
            return
        chosen = self._chosen
        self._windows.append(self._trimmer.submit(chosen.point.shift, chosen.window, bytes(chosen.behind)))
        self._chosen = None
        if len(self._windows) == _MAX_WAITING_WINDOWS:
            self._pack(_MAX_WAITING_WINDOWS // 2)

    def _pack(self, count: int) -> None:
        """Packs the first `count` waiting windows."""
        self.window_groups += pack_windows([job.result() for job in self._windows[:count]])
        del self._windows[:count]

    def _take(self) -> bytes:
        piece = bytes(memoryview(self._out)[self._given : self._end])
        self._given = self._end
        return piece

    def _slide(self) -> None:
        self._out[:WINDOW_BYTES] = self._out[self._end - WINDOW_BYTES : self._end]
        self._end = self._given = WINDOW_BYTES

    def finish(self) -> Iterator[bytes]:
        """Call once at the end of the blob; raises ImageError if it is cut short."""
        if not self._member_ended:
            raise ImageError("the gzip layer is cut short")
        if self._chosen is not None and self._chosen.point.tar == self._tar_bytes:
            self._chosen = None  # no data follows: neither the point nor its window is stored
        self._trim_chosen()
        self._pack(len(self._windows))
        self._trimmer.close()
        merged = {point.tar: point for point in (*self._milestones, *self._entries)}
        points = (point for point in merged.values() if point.tar < self._tar_bytes)
        self.points = sorted(points, key=lambda point: point.tar)
        yield from ()


def _references(stream: ZStream, shift: int, window: bytes, behind: bytes) -> int:
    """How many of the next _JUDGED_BYTES depend on the window; all of them if that is unknown."""
    if not behind:  # the chunk ends at the boundary
        return _JUDGED_BYTES
    entered = deflate.entered(shift, behind)
    try:
        plain, complete = stream.decode(entered, window, _JUDGED_BYTES)
        if not complete:
            return _JUDGED_BYTES
        probe, _ = stream.decode(entered, deflate.probes()[0], _JUDGED_BYTES)
    except DeflateError:
        return _JUDGED_BYTES
    differ = int.from_bytes(plain, "little") ^ int.from_bytes(probe, "little")
    return len(plain) - differ.to_bytes(len(plain), "little").count(0)
