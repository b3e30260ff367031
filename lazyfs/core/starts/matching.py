"""Which blocks of an image a profile names that was learned from this image, from another version of it, or from an
image that shares layers with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from lazyfs.core.erofs.metadata import Metadata
from lazyfs.core.layer.blocks import BlockTable
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.core.starts.profile import DIGEST_BYTES, Profile, Touch
from lazyfs.core.starts.recording import FileData
from lazyfs.core.tar.kinds import Kind

# A block that fewer than one in so many starts touched is not worth fetching for all of them.
RARE = 8

Block = tuple[int, int]  # position of a layer in the image's device table, number in that layer's block table


class Match(NamedTuple):
    """Blocks of an image in the order in which a start needs them, none twice; and how many of them were found how."""

    blocks: tuple[Block, ...]
    same: int  # in a layer that the image has, too
    moved: int  # by their content, in another layer
    changed: int  # by the file's name only


def match(
    profile: Profile,
    layers: Sequence[tuple[ContentRoot, BlockTable]],
    find: Callable[[bytes], FileData | None],
    most_bytes: int,
) -> Match:
    """What `profile` says of the image with these `layers`, the first `most_bytes` of it (plain).

    A block of a layer that the image has is that block. Any other one is what has the same content, wherever that is
    now: in the file of its name if that has it, else where nothing was found so far. Otherwise it is the block at
    the same place of the file of its name, which `find` looks up: such a file was changed, and is most likely read
    nevertheless. Nothing in the profile is trusted: what does not fit is passed over.
    """
    position = {root: number for number, (root, _) in enumerate(layers)}
    touches = [touch for touch in profile.touches if touch.starts * RARE >= profile.starts]
    elsewhere = {touch.digest for touch in touches if profile.layers[touch.layer] not in position}
    places = _places(layers, elsewhere) if elsewhere else {}
    found: dict[Block, None] = {}
    counts = [0, 0, 0]
    left_bytes = most_bytes
    for touch in touches:
        layer = position.get(profile.layers[touch.layer])
        if layer is not None:
            how, block = 0, _same(layers[layer][1], layer, touch)
        else:
            named = _named(layers, find, touch)
            same = places.get(touch.digest, ())
            how = 1 if same else 2
            block = _moved(same, named, found) if same else named
        if block is None or block in found:
            continue
        left_bytes -= layers[block[0]][1].lengths[block[1]]
        if left_bytes < 0:
            break
        found[block] = None
        counts[how] += 1
    return Match(tuple(found), *counts)


def _same(table: BlockTable, layer: int, touch: Touch) -> Block | None:
    fits = touch.block < table.count and table.digest(touch.block)[:DIGEST_BYTES] == touch.digest
    return (layer, touch.block) if fits else None


def _places(
    layers: Sequence[tuple[ContentRoot, BlockTable]], digests: Collection[bytes]
) -> dict[bytes, list[Block]]:
    """Where blocks with these digests are, as far as they are anywhere."""
    wanted = {int.from_bytes(digest, "little"): digest for digest in digests}
    places: dict[bytes, list[Block]] = {}
    for layer, (_, table) in enumerate(layers):
        for block, prefix in enumerate(table.digest_prefixes()):
            if prefix in wanted:
                places.setdefault(wanted[prefix], []).append((layer, block))
    return places


def _moved(places: Sequence[Block], named: Block | None, found: Collection[Block]) -> Block | None:
    if named in places:
        return named
    return next((place for place in places if place not in found), None)


def _named(
    layers: Sequence[tuple[ContentRoot, BlockTable]], find: Callable[[bytes], FileData | None], touch: Touch
) -> Block | None:
    """The block at the place in a file at which `touch` was one."""
    file = find(touch.path) if touch.path else None
    if file is None or file.device >= len(layers):
        return None
    table = layers[file.device][1]
    blocks = table.overlapping(file.address, file.size_bytes)
    return (file.device, blocks[touch.part]) if touch.part < len(blocks) else None


def find_file(namespace: Metadata, path: bytes) -> FileData | None:
    """The data of the file with this name, without a leading "/"; None: there is no such file, or it is empty.
    ImageError: the namespace is damaged."""
    nid = namespace.root_nid
    for name in path.split(b"/"):
        if namespace.inode(nid).kind is not Kind.DIR:
            return None
        child = namespace.lookup(nid, name)
        if child is None:
            return None
        nid = child
    inode = namespace.inode(nid)
    if inode.kind is not Kind.FILE or inode.device < 0:
        return None
    return FileData(path, inode.device, inode.address, inode.size)
