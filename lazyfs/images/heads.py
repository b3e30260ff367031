"""The heads of layer indexes, the part that a mount reads: from the image's index, the cache or the registry."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.scans import KeptLayerIndex
from lazyfs.core.erofs.metadata import Metadata
from lazyfs.core.index.imageindex import MAX_HEADS_BYTES, ImageIndex, LayerPart
from lazyfs.core.index.layerindex import LayerHead
from lazyfs.core.index.v1 import LayerV1
from lazyfs.core.layer.blocks import BlockTable
from lazyfs.core.layer.spans import WINDOWS_PER_GROUP, SpanTable
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.errors import ImageError
from lazyfs.sources.source import Source
from lazyfs.tasks import together

_AT_ONCE = 8


class Heads:
    """The heads that one image's index names. `source`: where missing ones are fetched; None: nowhere."""

    def __init__(self, cache: CacheDirectory, index: ImageIndex, source: Source | None) -> None:
        self._cache = cache
        self._index = index
        self._source = source
        self._found: dict[int, tuple[LayerHead, KeptLayerIndex]] = {}

    async def get(self, numbers: Iterable[int]) -> dict[int, tuple[LayerHead, KeptLayerIndex]]:
        """The heads of these layers, each with what the cache keeps of its layer's index. Missing ones are fetched,
        several at once.

        Raises ImageError if one is damaged, or not here and there is no source; RemoteError, NotFound: it cannot be
        fetched; HostError: disk.
        """
        wanted = list(numbers)
        if sum(self._index.parts[number].head_bytes for number in wanted) > MAX_HEADS_BYTES:
            raise ImageError(f"the tables of its layers are larger than {MAX_HEADS_BYTES >> 20} MiB")
        lacking = [number for number in wanted if not self._take_local(number)]
        await together(*(functools.partial(self._fetch, number) for number in lacking), at_most=_AT_ONCE)
        return {number: self._found[number] for number in wanted}

    def _take_local(self, number: int) -> bool:
        part = self._index.parts[number]
        kept = KeptLayerIndex(self._cache, part.record.blob_digest, part.index_digest)
        blob = kept.head(part.head_bytes, part.head_sha256)
        try:
            if blob is None:
                blob = self._index.inlined_head(part)
                check = True
            else:
                # If the layer itself is in the cache, its table is not read from the head.
                check = not self._cache.has_layer(part.record.content_root)
            if blob is None:
                return False
            self._found[number] = opened_head(part, blob, check=check), kept
        except ImageError:
            return False
        return True

    async def _fetch(self, number: int) -> None:
        part = self._index.parts[number]
        if self._source is None:
            raise ImageError("tables of its layers are not in the cache")
        blob = await self._source.blob_range(part.index_digest, 0, part.head_bytes)
        kept = KeptLayerIndex(self._cache, part.record.blob_digest, part.index_digest)
        self._found[number] = opened_head(part, blob), kept
        kept.keep_head(blob, part.head_sha256)


def opened_head(part: LayerPart, blob: bytes, *, check: bool = True) -> LayerHead:
    """The head; ImageError unless it is the one that the image's index names. `check`: compares its sha256, too."""
    if len(blob) != part.head_bytes or (check and hashlib.sha256(blob).hexdigest() != part.head_sha256):
        raise ImageError("the tables of a layer do not have the digest the index gives")
    head = LayerHead(blob)
    if head.record != part.record or head.head_bytes != part.head_bytes or head.whole_bytes != part.index_bytes:
        raise ImageError("the tables of a layer are of another layer than the index says")
    head.spans()  # raises if they are damaged: without `check` they are all that is read of the head
    return head


def span_table(head: LayerHead | LayerV1, tar_bytes: int) -> SpanTable:
    """The spans of a layer whose block table needs so many bytes of tar. ImageError if that does not fit together."""
    record = head.record
    spans = SpanTable(record.compression, record.blob_bytes, record.tar_bytes, head.spans())
    if spans.tar_bytes < tar_bytes:
        raise ImageError("the index's tables disagree about a layer's length")
    if spans.windows > WINDOWS_PER_GROUP * len(head.windows):
        raise ImageError("the index lacks windows that its spans need")
    return spans


def check_fits(namespace: Metadata, heads: Iterable[LayerHead]) -> None:
    """ImageError if opening an image by this namespace and these heads would fail. Blocks; decodes all tables."""
    by_root = {head.record.content_root: head for head in heads}
    for device in namespace.devices:
        head = by_root[ContentRoot(device.tag.decode())]
        table = BlockTable(head.table())
        span_table(head, table.tar_bytes)
        if table.device_bytes != device.size_bytes:
            raise ImageError("the namespace in the index does not fit its block tables")
