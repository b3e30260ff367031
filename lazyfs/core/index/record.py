"""What an index says of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lazyfs.core.index.sections import number, sha256_hex, text
from lazyfs.core.layer.blocks import MAX_DEVICE_BYTES, MAX_TAR_BYTES, PAGE_BYTES
from lazyfs.core.layer.spans import Compression
from lazyfs.core.oci.digests import ContentRoot, DiffId, Digest, is_digest

MAX_LAYERS = 1024
MAX_BLOB_BYTES = 1 << 50


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A layer: as its image gives it, and what it is unpacked. Index versions 1 and 2."""

    blob_digest: Digest
    blob_bytes: int
    diff_id: DiffId
    compression: Compression
    tar_bytes: int
    content_root: ContentRoot
    device_bytes: int = -1  # -1: not said (version 1)


def record_fields(layer: LayerRecord) -> dict[str, Any]:
    """The record in a header."""
    return {
        "digest": layer.blob_digest,
        "size": layer.blob_bytes,
        "diff_id": layer.diff_id,
        "compression": str(layer.compression),
        "tar_bytes": layer.tar_bytes,
        "content_root": layer.content_root,
        "device_bytes": layer.device_bytes,
    }


def read_record(fields: dict[str, Any]) -> LayerRecord:
    """Inverse of record_fields; ValueError, KeyError or TypeError if damaged."""
    device_bytes = number(fields["device_bytes"], MAX_DEVICE_BYTES)
    if device_bytes % PAGE_BYTES:
        raise ValueError("not a size of a device")
    return LayerRecord(
        blob_digest=digest(fields["digest"]),
        blob_bytes=number(fields["size"], MAX_BLOB_BYTES),
        diff_id=DiffId(text(fields["diff_id"])),
        compression=Compression(fields["compression"]),
        tar_bytes=number(fields["tar_bytes"], MAX_TAR_BYTES),
        content_root=ContentRoot(sha256_hex(fields["content_root"])),
        device_bytes=device_bytes,
    )


def digest(value: object) -> Digest:
    """A digest of a header; else ValueError."""
    found = text(value)
    if not is_digest(found):
        raise ValueError("not a digest")
    return Digest(found)
