"""A layer in an empty cache, and sources of it in memory that do to their answers what a test says."""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import trio
import trio.lowlevel
from backports import zstd

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.images import WindowGroups
from lazyfs.core.index.windows import WindowGroup
from lazyfs.core.layer.blocks import BLOCK_BYTES, BlockTable
from lazyfs.core.layer.plan import Cost
from lazyfs.core.layer.spans import Compression, Point, SpanTable, encode_points
from lazyfs.core.oci.digests import Digest
from lazyfs.decoding.layers import layer_inflater
from lazyfs.errors import RemoteError
from lazyfs.serving.blob import Blob
from lazyfs.serving.device import DataDevice
from lazyfs.serving.dispatch import Dispatcher
from lazyfs.serving.fetcher import LayerFetcher
from lazyfs.serving.spansource import SpanSource
from lazyfs.serving.windows import Windows
from lazyfs.sources.source import Source
from lazyfs.sources.transfer import Take, TransferCounters
from tests.cache.cachelayers import make_layer

SIZES = [
    3 * BLOCK_BYTES,
    100,
    70_000,
    5 * BLOCK_BYTES + 17,
    4096,
    900_000,
    1,
    2 * BLOCK_BYTES,
    300_000,
] * 2 + [1_000_000]
LAYER = make_layer(SIZES)
Fault = Callable[[bytes], Awaitable[bytes]]


@functools.cache
def tar() -> bytes:
    table = BlockTable(LAYER.table)
    data = bytearray(table.tar_bytes)
    for block in range(table.count):
        start = table.tar_offsets[block]
        data[start : start + table.lengths[block]] = LAYER.content(block)
    return bytes(data)


@dataclass
class Stored:
    """The layer as a blob with its spans and windows."""

    blob: bytes
    spans: SpanTable
    points: list[Point] = field(default_factory=list)
    groups: tuple[WindowGroup, ...] = ()
    windows: bytes = b""


@functools.cache
def stored(kind: str) -> Stored:
    if kind == "plain":
        return Stored(tar(), SpanTable(Compression.PLAIN, len(tar()), len(tar())))
    pieces = [tar()[at : at + 500_000] for at in range(0, len(tar()), 500_000)]
    blob = {
        "gzip": lambda: gzip.compress(tar(), 6),
        "members": lambda: b"".join(gzip.compress(piece, 1) for piece in pieces),
        "zstd": lambda: zstd.compress(tar()),
        "frames": lambda: b"".join(zstd.compress(piece) for piece in pieces),
    }[kind]()
    compression = Compression.GZIP if kind in ("gzip", "members") else Compression.ZSTD
    inflater = layer_inflater(compression)
    assert b"".join([*inflater.feed(blob), *inflater.finish()]) == tar()
    spans = SpanTable(compression, len(blob), len(tar()), encode_points(inflater.points))
    groups, at = [], 0
    for group in inflater.window_groups:
        groups.append(WindowGroup(at, len(group), hashlib.sha256(group).hexdigest()))
        at += len(group)
    return Stored(blob, spans, inflater.points, tuple(groups), b"".join(inflater.window_groups))


@dataclass(eq=False)
class FakeSource:
    """A source of one layer and its windows, in memory, that does to each answer what `faults` says,
    in turn.
    """

    stored: Stored
    faults: list[Fault] = field(default_factory=list)
    ranges: list[tuple[int, int]] = field(default_factory=list)
    counters: TransferCounters = field(default_factory=TransferCounters)

    async def blob_range(self, digest: str, start: int, end: int, take: Take | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        if digest == "windows":
            return self.stored.windows[start:end]
        self.ranges.append((start, end))
        answer = self.stored.blob[start:end]
        if self.faults:
            answer = await self.faults.pop(0)(answer)
        if take is None:
            return answer
        await take(answer)
        return b""


async def flip(answer: bytes) -> bytes:
    middle = len(answer) // 2
    return answer[:middle] + bytes([answer[middle] ^ 0x55]) + answer[middle + 1 :]


async def cut(answer: bytes) -> bytes:
    return answer[: len(answer) // 3]


async def refuse(answer: bytes) -> bytes:
    raise RemoteError("the test says no")


async def hang(answer: bytes) -> bytes:
    await trio.sleep_forever()
    raise AssertionError


async def fine(answer: bytes) -> bytes:
    return answer


class FixedCost(Cost):
    """Always says that so much is worth a request: nothing, so that a test can say what is fetched."""

    def __init__(self, worth_bytes: int = 0) -> None:
        super().__init__()
        self._worth_bytes = worth_bytes

    @property
    def worth_bytes(self) -> int:
        return self._worth_bytes


@dataclass
class Rig:
    """A data device, and the source it was given first."""

    device: DataDevice
    nursery: trio.Nursery
    cost: Cost
    dispatchers: list[Dispatcher] = field(default_factory=list)
    sources: list[SpanSource] = field(default_factory=list)

    @property
    def source(self) -> FakeSource:
        return cast(FakeSource, self.sources[0].blob.source)

    def add(
        self, source: FakeSource, digest: str = "layer", spans: SpanTable | None = None, timeout_s: float = 30.0
    ) -> SpanSource:
        """Another image that has the layer, too; asked first from now on."""
        kept, fetcher = source.stored, self.device.fetcher
        directory = os.path.join(self.device.layer.path, str(len(self.sources)))
        os.mkdir(directory)
        windows = Windows(kept.groups, WindowGroups(directory), (cast(Source, source), Digest("windows")))
        blob = Blob(cast(Source, source), Digest(digest), spans or kept.spans, windows, timeout_s, self.cost)
        self.sources.append(SpanSource(blob, fetcher.fragments, trio.CapacityLimiter(2), fetcher.sources))
        self.dispatchers.append(Dispatcher(self.nursery))
        fetcher.add(self.sources[-1], self.dispatchers[-1])
        return self.sources[-1]

    async def remove(self, number: int = 0) -> None:
        """Closes one of the images, by their order."""
        self.device.fetcher.remove(self.dispatchers[number])
        await self.dispatchers[number].aclose()

    async def read(self, address: int = 0, size_bytes: int = len(LAYER.device)) -> None:
        """Reads, and compares with the truth."""
        expected = LAYER.device[address : address + size_bytes]
        assert await self.device.read(address, size_bytes) == expected

    @property
    def fetched(self) -> int:
        """Bytes of the blob that came so far."""
        return sum(end - start for start, end in self.source.ranges)

    async def landed(self) -> None:
        """Waits until nothing is in flight."""
        with trio.fail_after(10):
            for dispatcher in self.dispatchers:
                await dispatcher.idle()

    def blocks(self, *numbers: int) -> tuple[int, int]:
        """Address and size of a run of blocks."""
        table = self.device.layer.table
        return table.addresses[numbers[0]], table.addresses[numbers[-1]] + table.lengths[
            numbers[-1]
        ] - table.addresses[numbers[0]]


@asynccontextmanager
async def rig(
    kind: str, *faults: Fault, timeout_s: float = 30.0, spans: SpanTable | None = None, cost: Cost | None = None
) -> AsyncIterator[Rig]:
    """A device of the layer in an empty cache, its source answering with `faults` first. `spans`: the source's, if not
    those it was stored with. `cost`: for tests of what is fetched ahead."""
    with tempfile.TemporaryDirectory(prefix="fetch-") as directory:
        layer = CacheDirectory(directory).create_layer(LAYER.content_root, LAYER.table)
        async with trio.open_nursery() as nursery:
            it = Rig(DataDevice(layer, LayerFetcher(layer)), nursery, cost or FixedCost())
            it.add(FakeSource(stored(kind), list(faults)), spans=spans, timeout_s=timeout_s)
            it.device.promise("image", timeout_s)
            yield it
            nursery.cancel_scope.cancel()
        layer.close()


KINDS = ["plain", "gzip", "members", "zstd", "frames"]
