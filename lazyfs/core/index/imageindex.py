"""The index of an image: its namespace, and for each layer what is needed to find the index of that layer.

Layout (docs/FORMATS.md, "Image index"; version 2): a blob of sections (core/index/sections.py), magic "LZFSIMG2". The
sections are the namespace (EROFS), then those heads of layer indexes that are too small to be worth a request each.
The same image gives the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lazyfs.core.index.layerindex import MAX_LAYER_INDEX_BYTES
from lazyfs.core.index.record import MAX_LAYERS, LayerRecord, digest, read_record, record_fields
from lazyfs.core.index.sections import MAX_STORED_BYTES, Sections, encode_sections, number, sha256_hex, text
from lazyfs.core.oci.digests import Digest
from lazyfs.errors import ImageError

ARTIFACT_TYPE = "application/vnd.lazyfs.index.v2"
IMAGE_MEDIA_TYPE = "application/vnd.lazyfs.index.v2.image"
MAX_IMAGE_INDEX_BYTES = MAX_STORED_BYTES
# Bounds what a mount fetches and holds in memory.
MAX_HEADS_BYTES = MAX_STORED_BYTES
# Heads up to this come with the image's index: a request costs registry and client more than 4 KiB.
INLINE_BYTES = 4096

_MAGIC = b"LZFSIMG2"
_VERSION = 2
_HINT = "update lazyfs, or index the image again"


@dataclass(frozen=True, slots=True)
class LayerPart:
    """A layer, and the blob that is its index."""

    record: LayerRecord
    index_digest: Digest
    index_bytes: int
    head_bytes: int
    head_sha256: str  # 64 hex digits


def encode_image(
    manifest_digest: str, namespace: bytes, layers: Sequence[LayerPart], heads: Mapping[Digest, bytes]
) -> bytes:
    """The blob. `heads`: by index digest, at least those of up to INLINE_BYTES."""
    inlined = [part.index_digest for part in layers if part.head_bytes <= INLINE_BYTES]
    header = {
        "version": _VERSION,
        "manifest": manifest_digest,
        "namespace_sha256": hashlib.sha256(namespace).hexdigest(),
        "layers": [_fields(part) for part in layers],
    }
    sections = [namespace, *(heads[index_digest] for index_digest in dict.fromkeys(inlined))]
    return encode_sections(_MAGIC, header, sections)


class ImageIndex:
    """An image's index, opened: the header is parsed and checked, sections are decoded when asked for.

    Every method raises ImageError for damaged or unknown content. The blob is not copied.
    """

    def __init__(self, blob: bytes) -> None:
        self._sections = Sections(blob, _MAGIC, _VERSION, "the index", _HINT)
        header = self._sections.header
        try:
            self.manifest_digest = text(header["manifest"])
            self.namespace_sha256 = sha256_hex(header["namespace_sha256"])
            if len(header["layers"]) > MAX_LAYERS:
                raise ImageError("the index has too many layers")
            self.parts = tuple(map(_part, header["layers"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ImageError(f"the header of the index is damaged ({type(error).__name__})") from None
        inlined = (part.index_digest for part in self.parts if part.head_bytes <= INLINE_BYTES)
        self._inlined = {index_digest: place for place, index_digest in enumerate(dict.fromkeys(inlined), 1)}
        if len(self._sections) != 1 + len(self._inlined):
            raise ImageError("the index has the wrong number of sections")

    @property
    def layers(self) -> tuple[LayerRecord, ...]:
        """The layers, the lowest first."""
        return tuple(part.record for part in self.parts)

    def namespace(self) -> bytes:
        """The EROFS metadata, checked against its digest in the header."""
        namespace = self._sections.section(0)
        if hashlib.sha256(namespace).hexdigest() != self.namespace_sha256:
            raise ImageError("the namespace in the index does not have the digest the index gives")
        return namespace

    def inlined_head(self, part: LayerPart) -> bytes | None:
        """The head of a layer's index, not verified; None if it is not in the image's index."""
        place = self._inlined.get(part.index_digest)
        return None if place is None else self._sections.section(place, INLINE_BYTES)


def _fields(part: LayerPart) -> dict[str, Any]:
    index = {
        "digest": part.index_digest,
        "size": part.index_bytes,
        "head": [part.head_bytes, part.head_sha256],
    }
    return {**record_fields(part.record), "index": index}


def _part(fields: dict[str, Any]) -> LayerPart:
    index = fields["index"]
    head_bytes, head_sha256 = index["head"]
    index_bytes = number(index["size"], MAX_LAYER_INDEX_BYTES)
    return LayerPart(
        record=read_record(fields),
        index_digest=digest(index["digest"]),
        index_bytes=index_bytes,
        head_bytes=number(head_bytes, index_bytes),
        head_sha256=sha256_hex(head_sha256),
    )
