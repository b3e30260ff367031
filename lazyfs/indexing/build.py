"""Reads the layers of an image once, in parallel, and makes its index. On demand it also fills the block cache.

Each layer is a pipeline of three tasks: download, inflate, and parse + hash. The last two run in worker threads (libz
and hashlib release the GIL), so that one layer alone keeps two cores busy. No layer is kept on disk.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.fill import LayerFill
from lazyfs.cache.scans import MadeLayer, keep_made, load_made
from lazyfs.core.index.layerscan import LayerScan, encode_layer
from lazyfs.core.index.record import LayerRecord
from lazyfs.core.layer.blocks import BlockTable
from lazyfs.core.layer.spans import Compression, detect_compression, encode_points
from lazyfs.core.oci.digests import ContentRoot, DiffId, Digest
from lazyfs.core.oci.documents import Descriptor, ImageConfig
from lazyfs.core.oci.layertypes import HEAD_BYTES, check_readable
from lazyfs.core.tar.tree import LayerEntry
from lazyfs.decoding.layers import layer_inflater
from lazyfs.errors import ImageError
from lazyfs.images.resolve import Resolved
from lazyfs.indexing.assemble import BuiltIndex, assemble, layer_blobs
from lazyfs.indexing.scanner import LayerScanner
from lazyfs.tasks import together

_LAYERS_AT_ONCE = 3
_CHUNK_BYTES = 1 << 20
# Plain bytes that are handed from thread to thread at once. Each time costs a millisecond, because all threads want the
# interpreter's lock.
_BATCH_BYTES = 4 << 20

# Is given the indexes of an image's distinct layers, by digest, the lowest first.
OnLayers = Callable[[Mapping[Digest, bytes]], None]


@dataclass(slots=True)
class LayerProgress:
    """How much of a layer was read, in bytes of its blob. `tar_bytes` were decoded from them."""

    digest: Digest
    blob_bytes: int
    done_bytes: int = 0
    tar_bytes: int = 0


async def build_index(
    resolved: Resolved,
    config: ImageConfig,
    cache: CacheDirectory | None,
    on_progress: Callable[[LayerProgress], None] = lambda progress: None,
    index_cache: CacheDirectory | None = None,
    on_layers: OnLayers | None = None,
) -> BuiltIndex:
    """Streams the layers of an image and returns its index. With `cache`, fills that with their blocks.

    A layer that occurs twice is read once. `index_cache`: the cache directory that keeps layer indexes. With it, a
    layer that was read for another image is not read again (so its blocks do not get into `cache`), and new indexes are
    kept. `on_layers`: is given the indexes of all layers, before that of the image is made.

    Raises ImageError (also if a layer does not have the DiffID of the config) and RemoteError. Then only whole layers
    and layer indexes stay in the cache.
    """
    layers = resolved.manifest.layers
    if len(config.diff_ids) != len(layers):
        raise ImageError("the image config names another number of layers than the manifest")
    expected: dict[Digest, DiffId] = {}
    for layer, diff_id in zip(layers, config.diff_ids, strict=True):
        if expected.setdefault(layer.digest, diff_id) != diff_id:
            raise ImageError(f"the image config gives two DiffIDs for layer {layer.digest}")
    made: dict[Digest, MadeLayer] = {}
    entries: dict[Digest, list[LayerEntry]] = {}

    async def scan(layer: Descriptor) -> None:
        diff_id = expected[layer.digest]
        known = None
        if index_cache is not None:
            known = await trio.to_thread.run_sync(load_made, index_cache, layer, diff_id)
        if known is None:
            found = await _scan_layer(resolved, layer, diff_id, cache, on_progress)
            entries[layer.digest] = found.entries
            known = await trio.to_thread.run_sync(_encode, found, index_cache)
        else:
            tar_bytes = known.part.record.tar_bytes
            on_progress(LayerProgress(layer.digest, layer.size_bytes, layer.size_bytes, tar_bytes))
        made[layer.digest] = known

    distinct = {layer.digest: layer for layer in layers}.values()
    await together(*(functools.partial(scan, layer) for layer in distinct), at_most=_LAYERS_AT_ONCE)
    ordered = [made[layer.digest] for layer in layers]
    if on_layers is not None:
        on_layers(layer_blobs(ordered))
    return await trio.to_thread.run_sync(assemble, resolved, ordered, entries, index_cache)


def _encode(scan: LayerScan, index_cache: CacheDirectory | None) -> MadeLayer:
    made = MadeLayer(encode_layer(scan))
    if index_cache is not None:
        keep_made(index_cache, made)
    return made


async def _scan_layer(
    resolved: Resolved,
    layer: Descriptor,
    diff_id: DiffId,
    cache: CacheDirectory | None,
    on_progress: Callable[[LayerProgress], None],
) -> LayerScan:
    fill = await trio.to_thread.run_sync(LayerFill, cache) if cache is not None else None
    try:
        scanner = LayerScanner(fill)
        progress = LayerProgress(layer.digest, layer.size_bytes)
        plain_in, plain_out = trio.open_memory_channel[list[bytes]](1)
        blob_in, blob_out = trio.open_memory_channel[bytes](2)
        pieces: list[_Inflated] = []

        async def download() -> None:
            with blob_in:
                async with resolved.source.blob_stream(layer.digest, layer.size_bytes) as chunks:
                    buffer = bytearray()
                    async for chunk in chunks:
                        progress.done_bytes += len(chunk)
                        on_progress(progress)
                        buffer += chunk
                        while len(buffer) >= _CHUNK_BYTES:  # of equal size: the index depends on the blob alone
                            await blob_in.send(bytes(buffer[:_CHUNK_BYTES]))
                            del buffer[:_CHUNK_BYTES]
                if buffer:
                    await blob_in.send(bytes(buffer))

        async def inflate() -> None:
            # Not `async with`: a checkpoint there would let followers fail first.
            with contextlib.ExitStack() as stack, plain_in, blob_out:
                inflater = None
                async for chunk in blob_out:
                    if inflater is None:
                        check_readable(layer, chunk[:HEAD_BYTES])
                        compression = detect_compression(chunk[:4])
                        inflater = layer_inflater(compression)
                        stack.callback(inflater.close)
                    decoded = inflater.feed(chunk)
                    while plains := await trio.to_thread.run_sync(_some, decoded):
                        await plain_in.send(plains)
                if inflater is None:  # a blob of no bytes: no files either
                    compression = Compression.PLAIN
                    inflater = layer_inflater(compression)
                await trio.to_thread.run_sync(list, inflater.finish())
                pieces.append(_Inflated(compression, encode_points(inflater.points), inflater.window_groups))

        async def parse() -> None:
            with plain_out:
                async for plains in plain_out:
                    await trio.to_thread.run_sync(scanner.feed_all, plains)
                    progress.tar_bytes += sum(map(len, plains))
                    on_progress(progress)

        await together(download, inflate, parse)
        return await trio.to_thread.run_sync(_finish_layer, scanner, fill, layer, diff_id, pieces[0])
    finally:
        if fill is not None:
            fill.discard()


def _some(plains: Iterator[bytes]) -> list[bytes]:
    """The next pieces, _BATCH_BYTES or a little more; none at the end."""
    batch: list[bytes] = []
    size_bytes = 0
    for plain in plains:
        batch.append(plain)
        size_bytes += len(plain)
        if size_bytes >= _BATCH_BYTES:
            break
    return batch


@dataclass(frozen=True, slots=True)
class _Inflated:
    compression: Compression
    span_records: bytes
    window_groups: list[bytes]


def _finish_layer(
    scanner: LayerScanner, fill: LayerFill | None, layer: Descriptor, diff_id: DiffId, inflated: _Inflated
) -> LayerScan:
    table, tar_bytes, found = scanner.finish()
    if found != diff_id:
        raise ImageError(
            f"layer {layer.digest} decodes to {found}, but the image config says {diff_id}",
            "the image is broken: build or push it again",
        )
    content_root = ContentRoot(hashlib.sha256(table).hexdigest())
    if fill is not None:
        fill.publish(content_root, table)
    record = LayerRecord(
        layer.digest,
        layer.size_bytes,
        diff_id,
        inflated.compression,
        tar_bytes,
        content_root,
        BlockTable(table).device_bytes,
    )
    return LayerScan(record, scanner.entries, table, inflated.span_records, inflated.window_groups)
