"""Startup packs of the rig's layer, and a source of one in memory that answers as a test says."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.core.oci.digests import ContentRoot, Digest, sha256_digest
from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.starts.pack import PACK_MEDIA_TYPE, Content, build_pack
from lazyfs.images.packs import FoundPack
from lazyfs.serving.image import Image
from lazyfs.serving.packblob import Advances
from lazyfs.serving.play import Player
from lazyfs.serving.trace import Traces
from lazyfs.sources.source import Source
from lazyfs.sources.transfer import Take, TransferCounters
from tests.serving.rig import LAYER, Rig

MANIFEST = Digest("sha256:" + "7" * 64)
BLOCKS = range(LAYER.blocks.count)
PIECE_BYTES = 16 << 10


def content(root: ContentRoot, block: int) -> bytes | None:
    return LAYER.content(block) if root == LAYER.content_root and block in BLOCKS else None


def pack_of(blocks: Iterable[int], content: Content = content, layer: ContentRoot = LAYER.content_root) -> bytes:
    return build_pack(MANIFEST, [layer], [(0, block) for block in blocks], content, b"")


# Given the bytes of an answer, and what takes them.
Answer = Callable[[bytes, Take], Awaitable[None]]


async def stream(answer: bytes, take: Take) -> None:
    """All of it, in small pieces, each of which takes a turn of the loop."""
    for at in range(0, len(answer), PIECE_BYTES):
        await trio.lowlevel.checkpoint()
        await take(answer[at : at + PIECE_BYTES])


@dataclass(eq=False)
class PackServer:
    """Has one pack. `answers`: how the first requests are answered, in turn; None: as the others, by `stream`."""

    pack: bytes
    answers: list[Answer | None] = field(default_factory=list)
    ranges: list[tuple[int, int]] = field(default_factory=list)
    counters: TransferCounters = field(default_factory=TransferCounters)
    sent: int = 0

    async def blob_range(self, digest: str, start: int, end: int, take: Take, *, bulk: bool) -> bytes:
        assert bulk == (end - start > 4 << 20)
        assert digest == sha256_digest(self.pack) and 0 <= start < end <= len(self.pack)
        self.ranges.append((start, end))
        answer = (self.answers.pop(0) if self.answers else None) or stream


        async def count(piece: bytes) -> None:
            self.sent += len(piece)
            await take(piece)

        await answer(self.pack[start:end], count)
        return b""

    @property
    def found(self) -> FoundPack:
        artifact = Descriptor(PACK_MEDIA_TYPE, MANIFEST, 100)
        digest = sha256_digest(self.pack)
        return FoundPack(cast(Source, self), "", MANIFEST, digest, len(self.pack), 1, 1, artifact)

    @property
    def fetched(self) -> int:
        return sum(end - start for start, end in self.ranges)


def image_of(it: Rig) -> Image:
    """The rig's device as an open image."""
    source = cast(Source, it.source)
    return Image(
        reference="the image",
        manifest_digest=MANIFEST,
        config=b"",
        namespace_path="",
        layers=(it.device,),
        source=source,
        index_source=source,
        index_place=None,
        dispatcher=it.dispatchers[0],
        lock_fd=-1,
        kept=(),
        traces=Traces(cache_of(it), it.nursery),
    )


def cache_of(it: Rig) -> CacheDirectory:
    return CacheDirectory(os.path.dirname(os.path.dirname(it.device.layer.path)))


@asynccontextmanager
async def playing(it: Rig, server: PackServer, image: Image | None = None) -> AsyncIterator[Player]:
    """The pack of `server` is played for the rig's image."""


    async def find() -> list[FoundPack]:
        return [server.found]

    player = Player(it.nursery, trio.CapacityLimiter(2), Advances(), cache_of(it), MANIFEST, find)
    player.image_opened(image or image_of(it))
    try:
        yield player
    finally:
        await player.aclose()


async def played(it: Rig, server: PackServer) -> None:
    """All of it."""
    async with playing(it, server) as player:
        with trio.fail_after(20):
            await player.ended()
