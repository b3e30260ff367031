"""The index of one layer: all that follows from the layer alone, in one blob. It is made once for all images.

Layout (docs/FORMATS.md, "Layer index"; version 3): magic "LZFSLYR3" and header, as a blob of sections has them
(core/index/sections.py); then

    head      the header, the packed block table, the span records: what a mount reads, by one request
    windows   groups of windows (core/index/windows.py), back to back; read by range when a span needs one
    entries   of the tar (core/index/layerscan.py); read to flatten an image

The index of each image that has the layer holds the head's sha256, and the head holds the digests of what follows. So
every part can be verified alone. The same layer gives the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate

from lazyfs.core.index.record import LayerRecord, read_record, record_fields
from lazyfs.core.index.sections import (
    MAX_STORED_BYTES,
    compress,
    compress_hashes,
    decompress,
    number,
    read_header,
    section_lengths,
    sha256_hex,
    write_header,
)
from lazyfs.core.index.windows import MAX_GROUP_BYTES, WindowGroup
from lazyfs.core.layer.blocks import BlockTable, pack_table, unpack_table
from lazyfs.errors import ImageError

LAYER_MEDIA_TYPE = "application/vnd.lazyfs.index.v2.layer"
MAX_LAYER_INDEX_BYTES = MAX_STORED_BYTES

_MAGIC = b"LZFSLYR3"
_VERSION = 3
_WHAT = "the index of a layer"
_HINT = "update lazyfs, or index the image again"


def encode_parts(
    record: LayerRecord, table: bytes, span_records: bytes, window_groups: Sequence[bytes], entries: bytes
) -> bytes:
    """The blob of these parts; all but the groups of windows are still to be compressed."""
    plain = (pack_table(table), span_records, entries)
    stored = (compress_hashes(plain[0]), compress(plain[1]), compress(plain[2]))
    header = {
        "version": _VERSION,
        "layer": record_fields(record),
        "table": [len(stored[0]), len(plain[0])],
        "spans": [len(stored[1]), len(plain[1])],
        "windows": [[len(group), hashlib.sha256(group).hexdigest()] for group in window_groups],
        "entries": [len(stored[2]), len(plain[2])],
        "entries_sha256": hashlib.sha256(stored[2]).hexdigest(),
    }
    return b"".join((write_header(_MAGIC, header), stored[0], stored[1], *window_groups, stored[2]))


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
            groups = [(number(length, MAX_GROUP_BYTES), sha256_hex(sha256)) for length, sha256 in header["windows"]]
            self._entries = section_lengths(header["entries"])
            self._entries_sha256 = sha256_hex(header["entries_sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise ImageError(f"the header of {_WHAT} is damaged ({type(error).__name__})") from None
        self._table_at = at
        self.head_bytes = at + self._table[0] + self._spans[0]
        ends = list(accumulate((length for length, _ in groups), initial=self.head_bytes))
        self.windows = tuple(WindowGroup(at, *group) for at, group in zip(ends, groups, strict=False))
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

    def entries(self) -> bytes:
        """The entries of the tar, as core/index/layerscan.py encodes them. Needs the whole blob."""
        stored = self._blob[self._entries_at : self.whole_bytes]
        if hashlib.sha256(stored).hexdigest() != self._entries_sha256:
            raise ImageError(f"the entries in {_WHAT} do not have the digest it gives")
        return self._section(self._entries_at, self._entries)

    def _section(self, at: int, lengths: Sequence[int]) -> bytes:
        stored, plain = lengths
        raw = decompress(self._blob[at : at + stored], plain, _WHAT)
        if len(raw) != plain:
            raise ImageError(f"a section of {_WHAT} has the wrong length")
        return raw
