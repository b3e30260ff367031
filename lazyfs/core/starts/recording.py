"""From the reads of one start to its profile."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lazyfs.core.erofs.metadata import Metadata
from lazyfs.core.layer.blocks import BlockTable
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.core.starts.profile import DIGEST_BYTES, MAX_AT_MS, MAX_PATH_BYTES, Profile, Touch
from lazyfs.core.tar.kinds import Kind
from lazyfs.errors import ImageError

_Name = tuple[bytes, int]  # path, and number of the block in the file


class FileData(NamedTuple):
    """Where a file's data lies."""

    path: bytes  # without a leading "/"
    device: int  # position in the namespace's device table
    address: int
    size_bytes: int


def files(reader: Metadata) -> Iterator[FileData]:
    """All files of an image that have data, each by its first name. Ends early if the tree is not one: it is hostile
    then. ImageError: the metadata is damaged."""
    known = {reader.root_nid}
    directories = [(b"", reader.root_nid)]
    left_bytes = reader.length  # directories that share blocks could make this walk arbitrarily long
    while directories:
        prefix, directory = directories.pop()
        left_bytes -= reader.inode(directory).size
        if left_bytes < 0 or len(known) > reader.inode_count:
            return
        for name, nid, file_type in reader.entries(directory):
            if name in (b".", b"..") or file_type not in (Kind.FILE, Kind.DIR) or nid in known:
                continue
            known.add(nid)
            inode = reader.inode(nid)
            path = prefix + name
            if len(path) > MAX_PATH_BYTES:
                continue
            if inode.kind is Kind.DIR:
                directories.append((path + b"/", nid))
            elif inode.device >= 0:
                yield FileData(path, inode.device, inode.address, inode.size)


def record(
    layers: Sequence[tuple[ContentRoot, BlockTable]],
    first_ms: Mapping[tuple[int, int], int],
    named: Iterable[FileData] = (),
    known: Profile | None = None,
) -> Profile:
    """The profile of one start.

    `layers`: of the image's device table. `first_ms`: (position in it, block) -> when it was touched first, in the
    order of touches. `named`: the image's files, looked at only as far as needed; if they turn out to be damaged, what
    was found before counts. `known`: a profile of the image, whose names are taken.
    """
    names = _known_names(layers, known)
    missing = [block for block in first_ms if (layers[block[0]][0], block[1]) not in names]
    if missing:
        names.update(_names(layers, missing, named))
    used: dict[ContentRoot, int] = {}
    touches = []
    for (layer, block), at_ms in first_ms.items():
        root, table = layers[layer]
        path, part = names.get((root, block), (b"", 0))
        number = used.setdefault(root, len(used))
        digest = table.digest(block)[:DIGEST_BYTES]
        touches.append(Touch(number, block, min(at_ms, MAX_AT_MS), 1, digest, path, part, table.lengths[block]))
    return Profile(tuple(used), 1, tuple(touches))


def _known_names(
    layers: Sequence[tuple[ContentRoot, BlockTable]], known: Profile | None
) -> dict[tuple[ContentRoot, int], _Name]:
    if known is None:
        return {}
    return {
        (known.layers[touch.layer], touch.block): (touch.path, touch.part) for touch in known.touches if touch.path
    }


def _names(
    layers: Sequence[tuple[ContentRoot, BlockTable]], blocks: Iterable[tuple[int, int]], named: Iterable[FileData]
) -> dict[tuple[ContentRoot, int], _Name]:
    """Which file has each of `blocks`, as far as there is one."""
    wanted: dict[int, list[int]] = {}
    for layer, block in blocks:
        wanted.setdefault(layer, []).append(block)
    addresses = {}
    for layer, numbers in wanted.items():
        numbers.sort()
        addresses[layer] = [layers[layer][1].addresses[block] for block in numbers]
    left = sum(map(len, wanted.values()))
    found: dict[tuple[ContentRoot, int], _Name] = {}
    try:
        for path, device, address, size_bytes in named:
            if device not in wanted:
                continue
            numbers, root = wanted[device], layers[device][0]
            at = bisect_left(addresses[device], address)
            first = -1
            while at < len(numbers) and addresses[device][at] < address + size_bytes:
                if first < 0:
                    first = bisect_left(layers[device][1].addresses, address)
                if (root, numbers[at]) not in found:
                    found[root, numbers[at]] = path, numbers[at] - first
                    left -= 1
                at += 1
            if not left:
                break
    except ImageError:
        pass  # a profile without names is of use, too
    return found
