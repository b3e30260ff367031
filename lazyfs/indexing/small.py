"""The index of an image that comes without one: made from its layers, and kept in the cache.

Usually the command that mounts the image reads its layers, with a progress bar for each. After a change of an
application, only a small layer was not read before: then the process that opens the image makes the index at once.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.images import keep_index
from lazyfs.cache.scans import made_bytes
from lazyfs.core.oci.digests import Digest
from lazyfs.core.oci.documents import ImageConfig
from lazyfs.images.resolve import Resolved
from lazyfs.indexing.assemble import BuiltIndex
from lazyfs.indexing.build import LayerProgress, OnLayers, build_index

# A daemon serves others meanwhile: this much is read, decoded and assembled in some tenths of a second.
_SMALL_BLOB_BYTES = 4 << 20
_SMALL_PLAIN_BYTES = 32 << 20
_SMALL_SCANS_BYTES = 4 << 20
# If a slow link makes even that take longer, the command does it: it shows progress and waits as long as data arrives.
_SMALL_S = 5.0


async def make_index(
    cache: CacheDirectory,
    resolved: Resolved,
    config: ImageConfig,
    *,
    fill: bool,
    on_progress: Callable[[LayerProgress], None] = lambda progress: None,
    on_layers: OnLayers | None = None,
) -> BuiltIndex:
    """Reads the layers that were not read before, and keeps the index; with `fill`, also their data. LazyfsError."""
    built = await build_index(resolved, config, cache if fill else None, on_progress, cache, on_layers)
    keep_index(cache, resolved.manifest_digest, built.index, None)
    return built


async def make_small_index(cache: CacheDirectory, resolved: Resolved, config: ImageConfig) -> bool:
    """As make_index, with data, if that is quickly done. False if it is not, or if small blobs turn out to decode to
    much."""
    if not await trio.to_thread.run_sync(_is_small, cache, resolved):
        return False
    plain_bytes: dict[Digest, int] = {}

    def watch(layer: LayerProgress) -> None:
        # A layer that is read starts at 0 bytes; one that is known comes with all its bytes at once, and is not
        # counted.
        if layer.tar_bytes == 0 or layer.digest in plain_bytes:
            plain_bytes[layer.digest] = layer.tar_bytes
            if sum(plain_bytes.values()) > _SMALL_PLAIN_BYTES:
                limit.cancel()

    with trio.move_on_after(_SMALL_S) as limit:
        await make_index(cache, resolved, config, fill=True, on_progress=watch)
    return not limit.cancelled_caught


def _is_small(cache: CacheDirectory, resolved: Resolved) -> bool:
    """Whether the layers that were not read before are small, and the indexes of the others, too."""
    unread_bytes = scans_bytes = 0
    for layer in resolved.manifest.layers:
        known_bytes = made_bytes(cache, layer.digest)
        if known_bytes is None:
            unread_bytes += layer.size_bytes
        else:
            scans_bytes += known_bytes
    return unread_bytes <= _SMALL_BLOB_BYTES and scans_bytes <= _SMALL_SCANS_BYTES
