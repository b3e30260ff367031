"""An open image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lazyfs.cache.images import WindowGroups
from lazyfs.cache.scans import KeptLayerIndex
from lazyfs.core.oci.digests import ContentRoot, Digest
from lazyfs.images.attached import Attached
from lazyfs.serving.device import DataDevice
from lazyfs.serving.dispatch import Dispatcher
from lazyfs.serving.trace import Traces
from lazyfs.sources.access import Access
from lazyfs.sources.source import Source
from lazyfs.sources.transfer import TransferCounters
from lazyfs.system.process import resident_bytes

_LOCAL = Access()


@dataclass(slots=True)
class Image:
    """An opened image. Close it through the ImageStore that opened it."""

    reference: str
    manifest_digest: Digest
    config: bytes
    namespace_path: str
    layers: tuple[DataDevice, ...]  # in the order of the namespace's device table
    source: Source
    index_source: Source  # of windows: `source`, or an index repository
    index_place: str | None  # the index repository; "" if it is the image's own, None if the index was made here
    dispatcher: Dispatcher  # of the source
    lock_fd: int
    kept: tuple[KeptLayerIndex | WindowGroups, ...]  # of the indexes of its layers, held in the cache
    traces: Traces  # of the process
    stale: str = ""  # as Resolved.stale, when it was opened
    users: int = 1
    attached: Attached | None = None  # where its startup pack comes from, if that is played
    counters: list[TransferCounters] = field(default_factory=list)  # of the pack's source

    def promise(self, timeout_s: float) -> None:
        """A mount of it was promised that reads end within `timeout_s`; holds until the image is closed."""
        for device in self.layers:
            device.promise(self.manifest_digest, timeout_s)

    def begin_trace(
        self, direct: frozenset[ContentRoot] = frozenset(), *, access: Access = _LOCAL, recorded: bool = False
    ) -> None:
        """A root of it is made: what is read now is a start, from which is learned what `access` says. `direct`: layers
        that the kernel reads by itself. `recorded`: it is over when `end_trace` says so, and else does not count."""
        if not access.learns:
            return
        pushes = access if access.learn == "push" and not access.offline and not recorded else None
        self.traces.begin(
            self.manifest_digest,
            self.reference,
            self.namespace_path,
            self.layers,
            direct,
            recorded=recorded,
            pushes=pushes,
        )

    async def end_trace(self) -> int:
        """The start is over; returns when what it touched is in the image's profile, and how many blocks that was."""
        return await self.traces.end(self.manifest_digest)

    def statistics(self) -> dict[str, Any]:
        """What `lazyfs stats` shows: transfers of all its sources, blocks and reads of its layers, and the memory of
        the whole process."""
        sources = (self.source.counters, self.index_source.counters, *self.counters)
        counters = list({id(one): one for one in sources}.values())
        foreseen = [device.fetcher.foreseen() for device in self.layers]
        return {
            "bytes_fetched": sum(one.bytes_fetched for one in counters),
            "requests": sum(one.requests for one in counters),
            "retries": sum(one.retries for one in counters),
            "blocks_present": sum(device.layer.present_blocks() for device in self.layers),
            "blocks_total": sum(device.layer.table.count for device in self.layers),
            "blocks_foreseen": sum(count for count, _ in foreseen),
            "blocks_awaited": sum(absent for _, absent in foreseen),
            "cache_hits": sum(device.hits for device in self.layers),
            "cache_misses": sum(device.misses for device in self.layers),
            "bytes_read": sum(device.bytes_read for device in self.layers),
            "memory_bytes": resident_bytes(),
        }
