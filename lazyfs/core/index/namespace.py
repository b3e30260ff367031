"""The tree of an image and its namespace: an EROFS image whose devices are named by the content roots of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lazyfs.core.erofs.reader import ErofsReader
from lazyfs.core.erofs.writer import Device, write_erofs
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.core.tar.tree import Node, UnreadChildren, read_nodes
from lazyfs.errors import ImageError


class LayerDevice(NamedTuple):
    """A layer as a place of file data."""

    content_root: ContentRoot
    device_bytes: int


def write_namespace(root: Node, layers: Sequence[LayerDevice]) -> bytes:
    """The namespace of a tree; `Node.layer` indexes `layers`. The device table holds the layers that have file data, in
    their order; equal layers share the place of the first. Raises ImageError as write_erofs().
    """
    used = {layers[number].content_root for number in _layers_of(root) if number >= 0}
    sizes = {layer.content_root: layer.device_bytes for layer in layers if layer.content_root in used}
    table = [Device(content_root.encode(), size_bytes) for content_root, size_bytes in sizes.items()]
    places = {content_root: number for number, content_root in enumerate(sizes)}
    return write_erofs(root, table, numbers=[places.get(layer.content_root, -1) for layer in layers])


def read_tree(reader: ErofsReader, content_roots: Sequence[ContentRoot]) -> Node:
    """The tree of a namespace that this host made of layers with these content roots (ErofsReader.tree); `Node.layer`
    indexes them. Raises ImageError."""
    try:
        numbers = [content_roots.index(ContentRoot(device.tag.decode("ascii", "replace"))) for device in reader.devices]
    except ValueError:
        raise ImageError("the namespace in the index names a layer the image does not have") from None
    return reader.tree(numbers)


def _layers_of(root: Node) -> set[int]:
    """Numbers of the layers in which data of the tree lies."""
    used: set[int] = set()
    pending = [root]
    while pending:
        children = pending.pop().children or {}
        if isinstance(children, UnreadChildren):
            used |= children.layers()
        for node in read_nodes(children):
            if node.children is not None:
                pending.append(node)
            elif node.size:
                used.add(node.layer)
    return used
