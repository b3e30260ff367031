"""The index of one layer: all that follows from the layer alone, in one blob. It is made once for all images.

Layout (docs/FORMATS.md, "Layer index"; version 2): magic "LZFSLYR2" and header, as a blob of sections has them
(core/index/sections.py); then

    head      the header, the packed block table, the span records: what a mount reads, by one request
    windows   groups of windows (core/index/windows.py), back to back; read by range when a span needs one
    entries   of the tar (core/index/entries.py); read to flatten an image

The index of each image that has the layer holds the head's sha256, and the head holds the digests of what follows. So
every part can be verified alone. The same layer gives the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from lazyfs.core.index.entries import decode_entries, encode_entries
from lazyfs.core.index.record import LayerRecord, read_record, record_fields
from lazyfs.core.index.sections import (
    MAX_STORED_BYTES,
    compress,
    decompress,
    number,
    read_header,
    section_lengths,
    sha256_hex,
    write_header,
)
from lazyfs.core.index.windows import MAX_GROUP_BYTES
from lazyfs.core.layer.blocks import BlockTable, pack_table, unpack_table
from lazyfs.core.tar.tree import LayerEntry
from lazyfs.errors import ImageError

LAYER_MEDIA_TYPE = "application/vnd.lazyfs.index.v2.layer"
MAX_LAYER_INDEX_BYTES = MAX_STORED_BYTES

_MAGIC = b"LZFSLYR2"
_VERSION = 2
_WHAT = "the index of a layer"
_HINT = "update lazyfs, or index the image again"


@dataclass(slots=True)
class LayerScan:
    """What one pass over a layer finds out."""

    record: LayerRecord
    entries: list[LayerEntry]
    table: bytes
    span_records: bytes
    window_groups: list[bytes]


def encode_layer(scan: LayerScan) -> bytes:
    """The blob."""
    table, spans, entries = map(compress, (packed := (
        pack_table(scan.table), scan.span_records, encode_entries(scan.entries)
    )))  # fmt: skip
    windows = b"".join(scan.window_groups)
    header = {
        "version": _VERSION,
        "layer": record_fields(scan.record),
        "table": [len(table), len(packed[0])],
        "spans": [len(spans), len(packed[1])],
        "windows": list(map(len, scan.window_groups)),
        "windows_sha256": hashlib.sha256(windows).hexdigest(),
        "entries": [len(entries), len(packed[2])],
        "entries_sha256": hashlib.sha256(entries).hexdigest(),
    }
    return b"".join((write_header(_MAGIC, header), table, spans, windows, entries))


class LayerHead:
    """The head of a layer's index, opened: its header is parsed and checked, the rest is decoded on demand.

    `blob`: the head, or more of the blob; not copied. Every method raises ImageError for damaged content.
    """

    def __init__(self, blob: bytes | memoryview) -> None:
        self._blob = memoryview(blob)
        header, at = read_header(self._blob, _MAGIC, _VERSION, _WHAT, _HINT)
        try:
            self.record: LayerRecord = read_record(header["layer"])
            self._table = section_lengths(header["table"])
            self._spans = section_lengths(header["spans"])
            groups = [number(length, MAX_GROUP_BYTES) for length in header["windows"]]
            self._entries = section_lengths(header["entries"])
            self.windows_sha256 = sha256_hex(header["windows_sha256"])
            self._entries_sha256 = sha256_hex(header["entries_sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise ImageError(f"the header of {_WHAT} is damaged ({type(error).__name__})") from None
        self._table_at = at
        self.head_bytes = at + self._table[0] + self._spans[0]
        ends = list(accumulate(groups, initial=self.head_bytes))
        self.windows: tuple[tuple[int, int], ...] = tuple(zip(ends, groups, strict=False))  # (offset, length) of groups
        self._entries_at = ends[-1]
        self.whole_bytes = ends[-1] + self._entries[0]
        if not self.head_bytes <= len(self._blob) <= self.whole_bytes:
            raise ImageError(f"{_WHAT} has another length than its header says")

    def table(self) -> bytes:
        """The block table, verified against the layer's content root."""
        table = unpack_table(self._section(self._table_at, self._table))
        if hashlib.sha256(table).hexdigest() != self.record.content_root:
            raise ImageError("a block table in the index does not have the content root the index gives")
        if BlockTable(table).device_bytes != self.record.device_bytes:
            raise ImageError("a block table in the index is of another size than the index gives")
        return table

    def spans(self) -> bytes:
        """The span records."""
        return self._section(self._table_at + self._table[0], self._spans)

    def entries(self) -> list[LayerEntry]:
        """The entries of the tar. Needs the whole blob."""
        stored = self._blob[self._entries_at : self.whole_bytes]
        if hashlib.sha256(stored).hexdigest() != self._entries_sha256:
            raise ImageError(f"the entries in {_WHAT} do not have the digest it gives")
        return decode_entries(self._section(self._entries_at, self._entries), self.record.device_bytes)

    def _section(self, at: int, lengths: Sequence[int]) -> bytes:
        stored, plain = lengths
        raw = decompress(self._blob[at : at + stored], plain, _WHAT)
        if len(raw) != plain:
            raise ImageError(f"a section of {_WHAT} has the wrong length")
        return raw
