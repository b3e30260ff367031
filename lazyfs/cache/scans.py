"""The scans of layers that the cache keeps: what an index needs of a layer, without reading the layer again.

An image that was changed has most of its layers in common with the one before; indexing it reads only the new ones.

    <cache>/scans/<digest of the layer's blob, hex>/scan   see core/index/scan.py
"""

from __future__ import annotations

import contextlib
import os

from lazyfs.cache.directory import BlockCache
from lazyfs.core.index.scan import LayerScan, decode_scan, encode_scan
from lazyfs.core.oci.documents import Descriptor
from lazyfs.errors import HostError, ImageError


def load_scan(cache: BlockCache, layer: Descriptor, diff_id: str) -> LayerScan | None:
    """The scan of a layer if a whole one is kept, and notes the use; None else: read the layer.

    A scan was kept when the blob had the digest, and decoded to the DiffID, that its image gave. Here `layer` and
    `diff_id` are from the image that it is wanted for: all of it has to agree.
    """
    directory = _directory(cache, layer.digest)
    try:
        with open(os.path.join(directory, "scan"), "rb") as file:
            scan = decode_scan(file.read())
        os.utime(directory)
    except (OSError, ImageError):
        return None
    known = (scan.record.blob_digest, scan.record.blob_bytes, scan.record.diff_id)
    return scan if known == (layer.digest, layer.size_bytes, diff_id) else None


def scan_bytes(cache: BlockCache, blob_digest: str) -> int | None:
    """How large the scan of a layer is, or None if there is none."""
    try:
        return os.stat(os.path.join(_directory(cache, blob_digest), "scan")).st_size
    except OSError:
        return None


def keep_scan(cache: BlockCache, scan: LayerScan) -> None:
    """Keep a scan. It only saves time, so a disk that is full is no error."""
    directory = _directory(cache, scan.record.blob_digest)
    with contextlib.suppress(OSError, HostError):
        os.makedirs(directory, mode=0o700, exist_ok=True)
        cache.write_atomically(os.path.join(directory, "scan"), encode_scan(scan))


def _directory(cache: BlockCache, blob_digest: str) -> str:
    return cache.scan_path(blob_digest)
