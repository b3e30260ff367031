"""A layer and an image with their indexes, small and written by hand; and blobs with another header."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

from backports import zstd

from lazyfs.core.index.imageindex import LayerPart
from lazyfs.core.index.layerindex import LayerHead
from lazyfs.core.index.layerscan import LayerScan, encode_layer
from lazyfs.core.index.record import LayerRecord
from lazyfs.core.index.windows import pack_windows
from lazyfs.core.layer.blocks import BLOCK_BYTES, BlockTableBuilder
from lazyfs.core.layer.spans import Compression, Point, PointKind, encode_points
from lazyfs.core.oci.digests import ContentRoot, DiffId, Digest, sha256_digest
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.reader import TarEntry
from lazyfs.core.tar.tree import LayerEntry

DIGEST, DIFF_ID = Digest("sha256:" + "ab" * 32), DiffId("sha256:" + "cd" * 32)
TAR_BYTES = 1 << 40


def file_entry(path: bytes, size: int) -> TarEntry:
    return TarEntry(path, Kind.FILE, 0o644, 1, 2, size, 3, 4)


def make_scan(entries: Sequence[TarEntry], windows: int = 10) -> LayerScan:
    """The scan of a layer with these entries; the blocks' content is not said."""
    builder = BlockTableBuilder()
    items = []
    tar_offset = 512
    for entry in entries:
        address = 0
        if entry.kind is Kind.FILE and entry.size:
            address = builder.place(entry.size)
            for at in range(0, min(entry.size, 3 * BLOCK_BYTES), BLOCK_BYTES):
                length = min(BLOCK_BYTES, entry.size - at)
                builder.add(address + at, tar_offset, length, hashlib.sha256(b"%d" % tar_offset).digest())
                tar_offset += length + 512
        items.append(LayerEntry(entry, address))
    table = builder.finish(TAR_BYTES)
    content_root = ContentRoot(hashlib.sha256(table).hexdigest())
    device_bytes = struct.unpack_from("<Q", table, 16)[0]
    record = LayerRecord(DIGEST, 1000, DIFF_ID, Compression.GZIP, TAR_BYTES, content_root, device_bytes)
    spans = encode_points([Point(10, 0, 0, PointKind.ENTRY)])
    groups = pack_windows([bytes([n]) * 100 for n in range(windows)])
    return LayerScan(record, items, table, spans, groups)


DIRECTORY = TarEntry(b"d", Kind.DIR, 0o755, 0, 0, 0, 5, 6)
SCAN = make_scan([DIRECTORY, file_entry(b"d/a", 5000), file_entry(b"d/b", 262_145)])
LAYER = encode_layer(SCAN)


def part_of(blob: bytes) -> LayerPart:
    head = LayerHead(blob)
    stored = blob[: head.head_bytes]
    return LayerPart(
        head.record, sha256_digest(blob), len(blob), head.head_bytes, hashlib.sha256(stored).hexdigest()
    )


def with_header(blob: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A blob with its header changed (in place, or to what `change` returns unless that is None)."""
    (length,) = struct.unpack_from("<Q", blob, 8)
    header = json.loads(zstd.decompress(blob[16 : 16 + length]))
    result = change(header)
    return with_header_text(blob, json.dumps(header if result is None else result).encode())


def with_header_text(blob: bytes, text: bytes) -> bytes:
    (length,) = struct.unpack_from("<Q", blob, 8)
    stored = zstd.compress(text)
    return blob[:8] + struct.pack("<Q", len(stored)) + stored + blob[16 + length :]


NO_JSON = [b"[" * 100_000, b'{"version": 2' + b"0" * 10_000 + b"}", b"\xff", b"NaN", b""]
