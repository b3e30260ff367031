"""What one pass over a layer finds out, to the layer's index and back. For who indexes: serving needs the head only."""

from __future__ import annotations

from dataclasses import dataclass

from lazyfs.core.index.entries import decode_entries, encode_entries
from lazyfs.core.index.layerindex import LayerHead, encode_parts
from lazyfs.core.index.record import LayerRecord
from lazyfs.core.layer.blocks import BlockTable
from lazyfs.core.tar.tree import LayerEntry


@dataclass(slots=True)
class LayerScan:
    """What one pass over a layer finds out."""

    record: LayerRecord
    entries: list[LayerEntry]
    table: bytes
    span_records: bytes
    window_groups: list[bytes]


def encode_layer(scan: LayerScan) -> bytes:
    """The blob of the layer's index."""
    entries = encode_entries(scan.entries, BlockTable(scan.table))
    return encode_parts(scan.record, scan.table, scan.span_records, scan.window_groups, entries)


def entries_of(head: LayerHead) -> list[LayerEntry]:
    """The entries of the layer's tar. `head` must have the whole blob. Raises ImageError."""
    return decode_entries(head.entries(), BlockTable(head.table()))
