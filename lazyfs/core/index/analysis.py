"""Where an image's data lies, and how much of it others have already: arithmetic over index and tables."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

from lazyfs.core.erofs.metadata import Inode, Metadata
from lazyfs.core.index.record import LayerRecord
from lazyfs.core.layer.blocks import BlockTable
from lazyfs.core.oci.digests import ContentRoot, Digest
from lazyfs.core.tar.kinds import Kind


@dataclass(frozen=True, slots=True)
class LayerAnalysis:
    """One layer. `depth`: 1 is the bottom. All sizes in bytes; of data, they are uncompressed."""

    depth: int
    blob_digest: Digest
    blob_bytes: int
    data_bytes: int  # of regular files in the layer
    visible_files: int  # of the flattened root whose data lies in this layer; hard links count once
    visible_bytes: int
    cached_bytes: int  # what the cache has of this layer
    cached_elsewhere_bytes: int  # what it does not have of it, but has as equal blocks of other layers


@dataclass(frozen=True, slots=True)
class ImageAnalysis:
    """An image, its layers from the bottom up."""

    inodes: int
    layers: tuple[LayerAnalysis, ...]


Present = Callable[[ContentRoot, BlockTable], Sequence[int]]
"""Content root and table of a layer -> for each block, whether the cache has it."""


def analyse(
    reader: Metadata,
    layers: Sequence[tuple[LayerRecord, BlockTable]],
    present: Present,
    elsewhere: Container[bytes],
) -> ImageAnalysis:
    """`reader`: of the image's namespace.

    `elsewhere`: sha256 of the blocks that the cache has of layers of other images. A layer that occurs twice counts at
    its first place only. Raises ImageError.
    """
    visible = _visible(reader)
    found = []
    seen: set[ContentRoot] = set()
    for number, (record, table) in enumerate(layers):
        here = elsewhere_bytes = data_bytes = files = shown = 0
        if record.content_root not in seen:
            seen.add(record.content_root)
            files, shown = visible.get(record.content_root, (0, 0))
            for block, is_here in enumerate(present(record.content_root, table)):
                length = table.lengths[block]
                data_bytes += length
                if is_here:
                    here += length
                elif table.digest(block) in elsewhere:
                    elsewhere_bytes += length
        found.append(
            LayerAnalysis(
                number + 1, record.blob_digest, record.blob_bytes, data_bytes, files, shown, here, elsewhere_bytes
            )
        )
    return ImageAnalysis(reader.inode_count, tuple(found))


def _visible(reader: Metadata) -> dict[ContentRoot, tuple[int, int]]:
    """Content root -> how many files of the root have their data there, and how many bytes."""
    counts: dict[ContentRoot, tuple[int, int]] = {}
    for inode in _inodes(reader):
        if inode.kind is Kind.FILE and inode.device >= 0:
            name = ContentRoot(reader.devices[inode.device].tag.decode("ascii", "replace"))
            files, size_bytes = counts.get(name, (0, 0))
            counts[name] = (files + 1, size_bytes + inode.size)
    return counts


def _inodes(reader: Metadata) -> Iterator[Inode]:
    """Each inode once."""
    known = {reader.root_nid}
    directories = [reader.root_nid]
    while directories:
        for name, nid, _ in reader.entries(directories.pop()):
            if name in (b".", b"..") or nid in known:
                continue
            known.add(nid)
            inode = reader.inode(nid)
            if inode.kind is Kind.DIR:
                directories.append(nid)
            yield inode
