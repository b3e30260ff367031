"""Makes the index of an image from the indexes of its layers.

If the tree of the lower layers is in the cache, it is read from there, and grown by the new layers. The cache keeps the
trees of whole images, and of the layers that were known when an image was indexed, because the next image probably has
those, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.scans import MadeLayer, keep_chain, load_chain
from lazyfs.core.erofs.reader import ErofsReader
from lazyfs.core.index.imageindex import INLINE_BYTES, encode_image
from lazyfs.core.index.layerscan import entries_of
from lazyfs.core.index.namespace import LayerDevice, read_tree, write_namespace
from lazyfs.core.oci.digests import Digest
from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.tar.tree import LayerEntry, Node, extend, flatten
from lazyfs.errors import ImageError
from lazyfs.images.resolve import Resolved


@dataclass(frozen=True, slots=True)
class BuiltIndex:
    """An index: that of the image, and those of its distinct layers by digest, the lowest first."""

    index: bytes
    layers: Mapping[Digest, bytes]
    tar_bytes: int

    @property
    def size_bytes(self) -> int:
        """Of all blobs."""
        return len(self.index) + sum(map(len, self.layers.values()))


def layer_blobs(made: Sequence[MadeLayer]) -> dict[Digest, bytes]:
    """The indexes of distinct layers, by digest."""
    return {one.part.index_digest: one.blob for one in made}


def assemble(
    resolved: Resolved,
    made: Sequence[MadeLayer],
    entries: Mapping[Digest, list[LayerEntry]],
    index_cache: CacheDirectory | None,
) -> BuiltIndex:
    """The index of an image whose layers have the indexes `made`. `entries`: of the layers that were read just now, by
    digest of the blob. `index_cache`: where trees are kept. Raises ImageError.
    """
    layers = resolved.manifest.layers
    parts = [one.part for one in made]
    devices = [LayerDevice(part.record.content_root, part.record.device_bytes) for part in parts]
    small = [one for one in made if one.part.head_bytes <= INLINE_BYTES]
    heads = {one.part.index_digest: one.head_blob for one in small}
    known = _known(layers, entries)

    def grown(base: Node, start: int, end: int) -> Node:
        missing = [entries.get(layers[n].digest) or entries_of(made[n].head) for n in range(start, end)]
        return extend(base, missing, start)

    tree, height = _kept_tree(index_cache, layers, made)
    if index_cache is not None and height < known:
        tree, height = grown(tree, height, known), known
        try:
            namespace = write_namespace(tree, devices[:known])
            keep_chain(index_cache, layers[:known], encode_image("", namespace, parts[:known], heads))
        except ImageError:
            pass  # these layers alone cannot be represented; later layers may replace what is wrong
    tree = grown(tree, height, len(layers))
    namespace = write_namespace(tree, devices)
    index = encode_image(resolved.manifest_digest, namespace, parts, heads)
    if index_cache is not None and layers:
        keep_chain(index_cache, layers, index)
    return BuiltIndex(index, layer_blobs(made), sum(part.record.tar_bytes for part in parts))


def _known(layers: Sequence[Descriptor], entries: Mapping[Digest, list[LayerEntry]]) -> int:
    """How many of the lowest layers will probably stay when the image changes again: those that were not read just now;
    of an image that is new as a whole, all but the last."""
    known = next((n for n, layer in enumerate(layers) if layer.digest in entries), len(layers))
    return known or max(0, len(layers) - 1)


def _kept_tree(
    index_cache: CacheDirectory | None, layers: Sequence[Descriptor], made: Sequence[MadeLayer]
) -> tuple[Node, int]:
    """The tree of the largest number of lowest layers of which one is kept, and that number."""
    parts = [one.part for one in made]
    for height in range(len(layers), 0, -1) if index_cache is not None else ():
        assert index_cache is not None
        kept = load_chain(index_cache, layers[:height])
        # Only a tree of exactly these indexes: what another version made must not be mixed with them.
        if kept is not None and list(kept.parts) == parts[:height]:
            try:
                content_roots = [part.record.content_root for part in kept.parts]
                return read_tree(ErofsReader(kept.namespace()), content_roots), height
            except ImageError:
                continue
    return flatten([]), 0
