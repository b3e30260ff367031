"""Version 1 of the index, which older versions of lazyfs attached and cached. It is only read.

One blob of sections for the whole image, magic "LZFSIDX1": the namespace, then for each layer its packed block table
and its span records. The windows are in a second blob (docs/FORMATS.md, "Version 1").
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from lazyfs.core.index.record import MAX_BLOB_BYTES, MAX_LAYERS, LayerRecord
from lazyfs.core.index.sections import MAX_STORED_BYTES, Sections, number, sha256_hex, text
from lazyfs.core.index.windows import MAX_GROUP_BYTES, WindowGroup
from lazyfs.core.layer.blocks import MAX_TAR_BYTES, unpack_table
from lazyfs.core.layer.spans import Compression
from lazyfs.core.oci.digests import ContentRoot, DiffId, Digest
from lazyfs.errors import ImageError

ARTIFACT_TYPE = "application/vnd.lazyfs.index.v1"
INDEX_MEDIA_TYPE = "application/vnd.lazyfs.index.v1.tables"
WINDOWS_MEDIA_TYPE = "application/vnd.lazyfs.index.v1.windows"
MAX_INDEX_BYTES = MAX_STORED_BYTES

_MAGIC = b"LZFSIDX1"
_HINT = "update lazyfs, or index the image again"


@dataclass(frozen=True, slots=True)
class LayerV1:
    """One layer of an index of version 1; the counterpart of LayerHead (core/index/layerindex.py)."""

    record: LayerRecord
    windows: tuple[WindowGroup, ...]  # in the windows blob
    _index: IndexV1
    _number: int

    def table(self) -> bytes:
        """The block table, which has the layer's content root. ImageError."""
        return self._index.table(self._number)

    def spans(self) -> bytes:
        """The span records. ImageError."""
        return self._index.spans(self._number)


class IndexV1:
    """An index blob, opened: the header is parsed and checked, sections are decoded on demand.

    Every method raises ImageError for damaged or unknown content. The blob is not copied.
    """

    def __init__(self, blob: bytes) -> None:
        self._sections = Sections(blob, _MAGIC, 1, "the index", _HINT)
        header = self._sections.header
        try:
            self.manifest_digest = text(header["manifest"])
            self.namespace_sha256 = text(header["namespace_sha256"])
            layers = header["layers"]
            if len(layers) > MAX_LAYERS or len(self._sections) != 1 + 2 * len(layers):
                raise ImageError("the index has the wrong number of sections")
            self.layers = tuple(map(_record, layers))
            self._windows = tuple(map(_groups, layers))
        except (ValueError, KeyError, TypeError) as error:
            raise ImageError(f"the header of the index is damaged ({type(error).__name__})") from None

    def layer(self, layer: int) -> LayerV1:
        """What it has of layer number `layer`."""
        return LayerV1(self.layers[layer], self._windows[layer], self, layer)

    def namespace(self) -> bytes:
        """The EROFS metadata, checked against its digest in the header."""
        namespace = self._sections.section(0)
        if hashlib.sha256(namespace).hexdigest() != self.namespace_sha256:
            raise ImageError("the namespace in the index does not have the digest the index gives")
        return namespace

    def table(self, layer: int) -> bytes:
        """The block table of layer number `layer`, which has that layer's content root."""
        # Packed then were the gaps behind the block before, not behind the next page.
        table = unpack_table(self._sections.section(1 + 2 * layer), page_bytes=1, tar_block_bytes=1)
        if hashlib.sha256(table).hexdigest() != self.layers[layer].content_root:
            raise ImageError("a block table in the index does not have the content root the index gives")
        return table

    def spans(self, layer: int) -> bytes:
        """The span records of layer number `layer`."""
        return self._sections.section(2 + 2 * layer)


def _record(fields: dict[str, Any]) -> LayerRecord:
    return LayerRecord(
        blob_digest=Digest(text(fields["digest"])),
        blob_bytes=number(fields["size"], MAX_BLOB_BYTES),
        diff_id=DiffId(text(fields["diff_id"])),
        compression=Compression(fields["compression"]),
        tar_bytes=number(fields["tar_bytes"], MAX_TAR_BYTES),
        content_root=ContentRoot(sha256_hex(fields["content_root"])),
    )


def _groups(fields: dict[str, Any]) -> tuple[WindowGroup, ...]:
    return tuple(WindowGroup(number(a, 1 << 50), number(b, MAX_GROUP_BYTES)) for a, b in fields["window_groups"])
