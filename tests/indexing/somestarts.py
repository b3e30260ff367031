"""Starts of an image that never ran: profiles of chosen blocks, and packs of them."""

from __future__ import annotations

from collections.abc import Iterable

from lazyfs.cache.directory import CacheDirectory
from lazyfs.core.layer.blocks import BlockTable
from lazyfs.core.oci.digests import ContentRoot, Digest
from lazyfs.core.starts.pack import PACK_ARTIFACT_TYPE, FrameDecoder, parse_head
from lazyfs.core.starts.profile import DIGEST_BYTES, Profile, Touch
from lazyfs.images.resolve import Resolved
from lazyfs.indexing.assemble import BuiltIndex
from lazyfs.indexing.packs import attach_pack
from lazyfs.indexing.publish import place_to_push
from tests.indexing.localimages import layer_heads


def tables(built: BuiltIndex) -> dict[ContentRoot, BlockTable]:
    """The block tables of an image's layers in which data lies, the lowest first."""
    heads = {head.record.content_root: head for head in layer_heads(built)}
    found = {root: BlockTable(head.table()) for root, head in heads.items()}
    return {root: table for root, table in found.items() if table.count}


def some_starts(built: BuiltIndex, blocks: Iterable[int] = range(64), starts: int = 1) -> Profile:
    """A profile of starts that touch these blocks of each layer, so far as it has them."""
    opened = tables(built)
    touches = [
        Touch(layer, block, 10 * block, starts, table.digest(block)[:DIGEST_BYTES], b"a/file", 0, table.lengths[block])
        for block in blocks
        for layer, table in enumerate(opened.values())
        if block < table.count
    ]
    return Profile(tuple(opened), starts, tuple(touches))


async def push_pack(it: Resolved, pack: bytes, repository: str = "") -> Digest:
    """Attaches a pack in the place of those that are there."""
    async with place_to_push(it, repository) as (source, place):
        former = [one.digest for one in await source.referrers(it.manifest_digest, PACK_ARTIFACT_TYPE)]
        return await attach_pack(source, place, it, pack, former)


def pack_blocks(pack: bytes) -> dict[tuple[ContentRoot, int], bytes]:
    """What a pack has."""
    head = parse_head(pack, len(pack))
    found = {}
    for number, frame in enumerate(head.frames):
        decoder = FrameDecoder(head, number)
        for root, block, content in decoder.feed(pack[frame.offset : frame.offset + frame.stored_bytes]):
            found[root, block] = bytes(content)
        decoder.finish()
    return found


def cached_blocks(cache: CacheDirectory, built: BuiltIndex) -> dict[tuple[ContentRoot, int], bytes]:
    """What the cache has of an image."""
    found = {}
    for root, table in tables(built).items():
        layer = cache.open_layer(root)
        if layer is None:
            continue
        for block in range(table.count):
            data = layer.read(table.addresses[block], table.lengths[block])
            if data is not None:
                found[root, block] = bytes(data)
        layer.close()
    return found
