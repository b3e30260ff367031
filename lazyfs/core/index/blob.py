"""The index of an image: namespace, block tables and span tables in one blob, windows in a second one.

Layout (docs/FORMATS.md, "Index blob"; version 1): a blob of sections (core/index/sections.py), magic "LZFSIDX1". The
sections are the namespace (EROFS), then for each layer its packed block table (core/layer/blocks.py) and its span
records (core/layer/spans.py).

The windows blob is a sequence of zstd frames, each holding up to WINDOWS_PER_GROUP windows of exactly
32 KiB; the header gives their stored lengths. Both blobs are layers of the index artifact, whose manifest's
`subject` is the image manifest. The index is deterministic: the same image gives the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lazyfs.core.index.sections import (
    MAX_STORED_BYTES,
    Sections,
    encode_sections,
    number,
    sha256_hex,
    text,
)
from lazyfs.core.index.windows import MAX_GROUP_BYTES
from lazyfs.core.layer.blocks import unpack_table
from lazyfs.core.layer.spans import Compression
from lazyfs.errors import ImageError

ARTIFACT_TYPE = "application/vnd.lazyfs.index.v1"
INDEX_MEDIA_TYPE = "application/vnd.lazyfs.index.v1.tables"
WINDOWS_MEDIA_TYPE = "application/vnd.lazyfs.index.v1.windows"
MAX_INDEX_BYTES = MAX_STORED_BYTES  # an image of 64 million files; larger is an attack or a different design
MAX_LAYERS = 1024

_MAGIC = b"LZFSIDX1"
_HINT = "update lazyfs, or index the image again"


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What the header says of one layer. Section numbers count the namespace as 0."""

    blob_digest: str
    blob_bytes: int
    diff_id: str
    compression: Compression
    tar_bytes: int
    content_root: str
    window_groups: tuple[tuple[int, int], ...]  # (offset, length) of each group in the windows blob


def encode_index(
    manifest_digest: str,
    namespace: bytes,
    layers: Sequence[LayerRecord],
    packed_tables: Sequence[bytes],
    span_records: Sequence[bytes],
) -> bytes:
    """The index blob; tables and spans in layer order."""
    raw = [namespace]
    for table, spans in zip(packed_tables, span_records, strict=True):
        raw += [table, spans]
    header = {
        "version": 1,
        "manifest": manifest_digest,
        "namespace_sha256": hashlib.sha256(namespace).hexdigest(),
        "layers": [record_fields(layer) for layer in layers],
    }
    return encode_sections(_MAGIC, header, raw)


def record_fields(layer: LayerRecord) -> dict[str, Any]:
    """A layer's part of the header."""
    return {
        "digest": layer.blob_digest,
        "size": layer.blob_bytes,
        "diff_id": layer.diff_id,
        "compression": str(layer.compression),
        "tar_bytes": layer.tar_bytes,
        "content_root": layer.content_root,
        "window_groups": [list(group) for group in layer.window_groups],
    }


def read_record(fields: dict[str, Any]) -> LayerRecord:
    """Inverse of record_fields; ValueError, KeyError or TypeError if damaged."""
    return LayerRecord(
        blob_digest=text(fields["digest"]),
        blob_bytes=number(fields["size"], 1 << 50),
        diff_id=text(fields["diff_id"]),
        compression=Compression(fields["compression"]),
        tar_bytes=number(fields["tar_bytes"], 1 << 50),
        content_root=sha256_hex(fields["content_root"]),
        window_groups=tuple(
            (number(a, 1 << 50), number(b, MAX_GROUP_BYTES)) for a, b in fields["window_groups"]
        ),
    )


class Index:
    """An index blob, opened: the header is parsed and checked, sections are decoded when asked for.

    Every method raises ImageError for damaged or unknown content. The blob is not copied.
    """

    def __init__(self, blob: bytes) -> None:
        self._sections = Sections(blob, _MAGIC, "the index", _HINT)
        self._namespace = b""
        header = self._sections.header
        try:
            self.manifest_digest = text(header["manifest"])
            self.namespace_sha256 = text(header["namespace_sha256"])
            layers = header["layers"]
            if len(layers) > MAX_LAYERS or len(self._sections) != 1 + 2 * len(layers):
                raise ImageError("the index has the wrong number of sections")
            self.layers = tuple(read_record(layer) for layer in layers)
        except (ValueError, KeyError, TypeError) as error:
            raise ImageError(f"the header of the index is damaged ({type(error).__name__})") from None

    def namespace(self) -> bytes:
        """The EROFS metadata, checked against its digest in the header."""
        if self._namespace:
            return self._namespace
        namespace = self._sections.section(0)
        if hashlib.sha256(namespace).hexdigest() != self.namespace_sha256:
            raise ImageError("the namespace in the index does not have the digest the index gives")
        self._namespace = namespace
        return namespace

    def table(self, layer: int) -> bytes:
        """The block table of layer number `layer`, which has that layer's content root."""
        table = unpack_table(self._sections.section(1 + 2 * layer))
        if hashlib.sha256(table).hexdigest() != self.layers[layer].content_root:
            raise ImageError("a block table in the index does not have the content root the index gives")
        return table

    def spans(self, layer: int) -> bytes:
        """The span records of layer number `layer`."""
        return self._sections.section(2 + 2 * layer)
