"""The index of an image that comes without one: made from its layers, and kept in the cache.

Reading whole layers is the work of the command that wants the image, with a bar for each. What is left to do after a
change of an application, when all but a small layer was read before, is done at once by who opens the image.
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
from lazyfs.indexing.build import LayerProgress, build_index

# A daemon serves others meanwhile: so much is read, decoded and assembled in some tenths of a second (measured: 0.35 s
# for 33,000 files, whose scans have 3.6 MB).
_SMALL_BLOB_BYTES = 4 << 20
_SMALL_PLAIN_BYTES = 32 << 20
_SMALL_SCANS_BYTES = 4 << 20
# Over a link on which even that takes longer, the command does it: it waits as long as something comes, and shows it.
_SMALL_S = 5.0


async def make_index(
    cache: CacheDirectory,
    resolved: Resolved,
    config: ImageConfig,
    *,
    fill: bool,
    on_progress: Callable[[LayerProgress], None] = lambda progress: None,
) -> BuiltIndex:
    """Reads the layers that were not read before and keeps the index; with `fill`, their data, too. LazyfsError."""
    built = await build_index(resolved, config, cache if fill else None, on_progress, cache)
    keep_index(cache, resolved.manifest_digest, built.index, attached=False)
    return built


async def make_small_index(cache: CacheDirectory, resolved: Resolved, config: ImageConfig) -> bool:
    """As make_index, data and all, if that is soon done. False if not, or if small blobs turn out to hold much."""
    if not await trio.to_thread.run_sync(_is_small, cache, resolved):
        return False
    plain_bytes: dict[Digest, int] = {}

    def watch(layer: LayerProgress) -> None:
        # Layers begin with nothing, but for those that are known: they are there at once.
        if layer.tar_bytes == 0 or layer.digest in plain_bytes:
            plain_bytes[layer.digest] = layer.tar_bytes
            if sum(plain_bytes.values()) > _SMALL_PLAIN_BYTES:
                limit.cancel()

    with trio.move_on_after(_SMALL_S) as limit:
        await make_index(cache, resolved, config, fill=True, on_progress=watch)
    return not limit.cancelled_caught


def _is_small(cache: CacheDirectory, resolved: Resolved) -> bool:
    """Whether the layers that were not read before, and what is known of the others, are small."""
    unread_bytes = scans_bytes = 0
    for layer in resolved.manifest.layers:
        known_bytes = made_bytes(cache, layer.digest)
        if known_bytes is None:
            unread_bytes += layer.size_bytes
        else:
            scans_bytes += known_bytes
    return unread_bytes <= _SMALL_BLOB_BYTES and scans_bytes <= _SMALL_SCANS_BYTES
