"""What a start touches: the first touch of each block of an image, from which its profile is made.

A trace begins when an image's root is made, and its clock with the first read. It ends when nothing new was touched
for a while, after the longest time that a start may take, or when somebody says so. One root has one trace, however
many containers use it. A layer that several images have is one device, and the kernel does not say for which of them
it reads: a touch counts for each image that has the layer and is being traced.

What is seen is what the kernel asks for. That includes its read-ahead. It leaves out what the page cache has of a
layer, because another image or an earlier root read it, and layers that the kernel reads by itself.

Readers, in any thread, only append to `DataDevice.reads`. All else belongs to the trio thread; a worker thread makes
the profile. Memory: 180 bytes for each block touched, at most 16 MB an image; and 2.5 MB a layer at most for reads that
were not looked at yet.
"""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Iterator, Sequence

import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.profiles import keep_profile, load_profile
from lazyfs.core.erofs.metadata import Metadata
from lazyfs.core.layer.blocks import BlockTable
from lazyfs.core.oci.digests import ContentRoot, Digest
from lazyfs.core.starts.matching import Block
from lazyfs.core.starts.profile import MAX_TOUCHES, Profile
from lazyfs.core.starts.recording import FileData, files, record
from lazyfs.errors import ImageError, LazyfsError
from lazyfs.serving.device import DataDevice
from lazyfs.serving.learning import PUSH_AT_END_S, Improver
from lazyfs.sources.access import Access

log = logging.getLogger("lazyfs.serving")

QUIET_S = 10.0
LONGEST_S = 120.0
_TICK_S = 0.5
_MAX_READS = 1 << 14  # of one layer, in a tick; of more the newest count
_BLOCK_BITS = 32  # of a key of `Trace.first`
# While files are named, a thread holds the interpreter for 1 ms and then lets readers go on.
_FILES_A_STEP = 128
_PAUSE_S = 0.001


class Trace:
    """The touches of one start of one image."""

    def __init__(
        self,
        image: Digest,
        reference: str,
        namespace_path: str,
        layers: Sequence[DataDevice],
        direct: frozenset[ContentRoot],
        recorded: bool = False,
        pushes: Access | None = None,
    ) -> None:
        self.image = image
        self.reference = reference
        self.namespace_path = namespace_path
        self.layers = tuple(layers)  # in the order of the namespace's device table
        # Those that are read through this process -> their bits in a key of `first`.
        self.seen = {
            device: layer << _BLOCK_BITS for layer, device in enumerate(layers) if device.content_root not in direct
        }
        self.partial = bool(direct)  # not all that the start touches is seen
        self.recorded = recorded  # somebody will say when it is over; if nobody does, it does not count
        self.pushes = pushes  # how the image is reached, if its startup pack is to be improved
        self.first: dict[int, float] = {}  # layer << 32 | block -> when it was touched first, monotonic
        self.begun_at: float | None = None  # trio time of the first touch
        self.grew_at = 0.0  # trio time of the last one
        self.kept = trio.Event()  # it is over, and its profile in the cache, if it could be

    def is_over(self, now: float) -> bool:
        """Whether the start seems to be over."""
        if self.begun_at is None or self.recorded:
            return False
        if any(device.waiting for device in self.seen):
            self.grew_at = now  # it is not quiet, it waits
        return (
            now - self.grew_at >= QUIET_S or now - self.begun_at >= LONGEST_S or len(self.first) >= MAX_TOUCHES
        )


class Traces:
    """The traces of a process. Owned by the trio thread; its tasks run in `nursery`."""

    def __init__(self, cache: CacheDirectory, nursery: trio.Nursery) -> None:
        self._cache = cache
        self._nursery = nursery
        self._open: dict[Digest, Trace] = {}
        self._ending: set[Trace] = set()  # whose profiles are being made
        self._improver = Improver(cache)
        self._improving: dict[Trace, trio.Event] = {}  # whose packs are being improved
        self._threads = trio.CapacityLimiter(1)
        self._ticking = False

    def begin(
        self,
        image: Digest,
        reference: str,
        namespace_path: str,
        layers: Sequence[DataDevice],
        direct: frozenset[ContentRoot] = frozenset(),
        *,
        recorded: bool = False,
        pushes: Access | None = None,
    ) -> None:
        """A root of an image is made. `layers`: in the order of the namespace's device table. `direct`: those that the
        kernel reads by itself. `recorded`: nothing but `end` ends the trace so that it is kept. `pushes`: how the image
        is reached, if what is learned improves its startup pack."""
        self.leave(image)
        trace = Trace(image, reference, namespace_path, layers, direct, recorded, pushes)
        for device in trace.seen:
            self._look_at(device)  # what was read before counts for others only
            if device.reads is None:
                device.reads = collections.deque(maxlen=_MAX_READS)
        self._open[image] = trace
        if not self._ticking:
            self._ticking = True
            self._nursery.start_soon(self._tick)

    def touched(self, image: Digest) -> list[Block]:
        """What a start of an image that is being traced touched so far, in the order in which that was noticed."""
        trace = self._open.get(image)
        mask = (1 << _BLOCK_BITS) - 1
        return [(key >> _BLOCK_BITS, key & mask) for key in trace.first] if trace is not None else []

    async def end(self, image: Digest) -> int:
        """Ends the trace of an image, if it has one. Returns how many blocks were touched, once all of that is in the
        image's profile in the cache, if it can be written."""
        if image in self._open:
            self._open[image].recorded = False
        trace = self.leave(image)
        for one in [one for one in self._ending if one.image == image]:
            await one.kept.wait()
        return len(trace.first) if trace is not None else 0

    def leave(self, image: Digest) -> Trace | None:
        """Ends the trace of an image and returns it; its profile is made in the background."""
        trace = self._open.get(image)
        if trace is None:
            return None
        for device in trace.seen:
            self._look_at(device)
        del self._open[image]
        for device in trace.seen.keys() - {device for other in self._open.values() for device in other.seen}:
            device.reads = None
        if trace.first and not trace.recorded:
            self._ending.add(trace)
            self._nursery.start_soon(self._keep, trace)
        return trace

    async def finish(self, limit_s: float, *, partial: bool = False) -> None:
        """Ends all traces, within a time, because the process ends; and waits while packs are improved, unless somebody
        waits for the process. `partial`: the starts go on without it, in a successor."""
        for trace in list(self._open.values()):
            trace.partial |= partial
            self.leave(trace.image)
        with trio.move_on_after(limit_s):
            for trace in list(self._ending):
                await trace.kept.wait()
        if not partial:
            with trio.move_on_after(PUSH_AT_END_S):
                for improved in list(self._improving.values()):
                    await improved.wait()

    async def _tick(self) -> None:
        """Looks at what was read, until no trace is open."""
        while self._open:
            await trio.sleep(_TICK_S)
            for device in {device for trace in self._open.values() for device in trace.seen}:
                self._look_at(device)
                await trio.lowlevel.checkpoint()
            now = trio.current_time()
            for trace in list(self._open.values()):
                if trace.is_over(now):
                    self.leave(trace.image)
        self._ticking = False

    def _look_at(self, device: DataDevice) -> None:
        """Takes over what was read of a layer."""
        reads = device.reads
        if not reads:
            return
        now = trio.current_time()
        traces = [one for one in self._open.values() if device in one.seen and len(one.first) < MAX_TOUCHES]
        firsts = [(trace.first, trace.seen[device]) for trace in traces]
        before = [len(trace.first) for trace in traces]
        overlapping = device.layer.table.overlapping
        while reads:
            at_s, address, size_bytes = reads.popleft()
            for block in overlapping(address, size_bytes):
                for first, layer in firsts:
                    first.setdefault(layer | block, at_s)
        for trace, count in zip(traces, before, strict=True):
            if len(trace.first) > count:
                trace.grew_at = now
                trace.begun_at = now if trace.begun_at is None else trace.begun_at

    async def _keep(self, trace: Trace) -> None:
        """Makes the profile of a start, and adds it to the image's. A failure is only logged."""
        try:
            layers = [(device.content_root, device.layer.table) for device in trace.layers]
            start = await trio.to_thread.run_sync(
                _keep, self._cache, trace, layers, limiter=self._threads, abandon_on_cancel=True
            )
            if trace.pushes is not None and not trace.partial:
                self._improving[trace] = trio.Event()
                self._nursery.start_soon(self._improve, trace, trace.pushes, start)
        except LazyfsError as error:
            log.warning("what a start of %s touched is not kept: %s", trace.reference, error)
        except Exception as error:  # it only saves time, and must not end the process
            log.error("what a start of %s touched is not kept", trace.reference, exc_info=error)
        finally:
            self._ending.discard(trace)
            trace.kept.set()

    async def _improve(self, trace: Trace, access: Access, start: Profile) -> None:
        try:
            await self._improver.improve(trace.image, trace.reference, access, start)
        finally:
            self._improving.pop(trace).set()


def _keep(cache: CacheDirectory, trace: Trace, layers: Sequence[tuple[ContentRoot, BlockTable]]) -> Profile:
    """The profile of the start, which was added to the image's. In a worker thread. Raises HostError."""
    order = sorted(trace.first.items(), key=lambda item: item[1])[:MAX_TOUCHES]
    begun_s = order[0][1]
    mask = (1 << _BLOCK_BITS) - 1
    first_ms = {(key >> _BLOCK_BITS, key & mask): round(1000 * (at_s - begun_s)) for key, at_s in order}
    start = record(layers, first_ms, _files(trace.namespace_path), load_profile(cache, trace.image))
    keep_profile(cache, trace.image, trace.reference, start, partial=trace.partial)
    return start


def _files(namespace_path: str) -> Iterator[FileData]:
    """All files of an image, with pauses for readers. None if the image was evicted meanwhile. Raises ImageError."""
    try:
        with open(namespace_path, "rb") as file:
            namespace = file.read()  # not mapped: if somebody truncates the file, a map kills the process
    except OSError as error:
        raise ImageError(f"no namespace: {error.strerror}") from None
    for number, file_data in enumerate(files(Metadata(namespace))):
        if number % _FILES_A_STEP == 0:
            time.sleep(_PAUSE_S)
        yield file_data
