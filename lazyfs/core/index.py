"""The index of an image: namespace, block tables and span tables in one blob, windows in a second one.

Layout (docs/FORMATS.md, "Index"; version 1). Little-endian:

    0   8s  magic "LZFSIDX1"
    8   Q   length of the header as stored
    16      header: zstd frame of a JSON object
            sections, back to back, one zstd frame each: the namespace (EROFS), then for each layer its
            packed block table (core/blocks.py) and its span records (core/spans.py)

The windows blob is a sequence of zstd frames, each holding up to WINDOWS_PER_GROUP windows of exactly
32 KiB; the header gives their stored lengths. Both blobs are layers of the index artifact, whose manifest's
`subject` is the image manifest. The index is deterministic: the same image gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from backports import zstd

from lazyfs.core.blocks import unpack_table
from lazyfs.core.deflate import WINDOW_BYTES
from lazyfs.core.spans import WINDOWS_PER_GROUP, Compression
from lazyfs.errors import ImageError

ARTIFACT_TYPE = "application/vnd.lazyfs.index.v1"
INDEX_MEDIA_TYPE = "application/vnd.lazyfs.index.v1.tables"
WINDOWS_MEDIA_TYPE = "application/vnd.lazyfs.index.v1.windows"
MAX_INDEX_BYTES = 1 << 30  # an image of 64 million files; larger is an attack or a different design
MAX_SECTION_BYTES = 1 << 32
MAX_LAYERS = 1024

_HEAD = struct.Struct("<8sQ")
_MAGIC = b"LZFSIDX1"
_MAX_HEADER_BYTES = 64 << 20
# A stored group of windows: 1 MiB before compression, and what zstd adds to noise.
_MAX_GROUP_BYTES = 2 * WINDOWS_PER_GROUP * WINDOW_BYTES
# Level 9 against 19: 1 % larger, ten times faster; the bulk (hashes) does not compress at all.
_LEVEL = 9


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


def pack_windows(windows: Sequence[bytes]) -> list[bytes]:
    """Windows in their order -> the stored groups of one layer. Short windows are filled with zeros
    in front.
    """
    groups = []
    for first in range(0, len(windows), WINDOWS_PER_GROUP):
        group = windows[first : first + WINDOWS_PER_GROUP]
        groups.append(_compress(b"".join(window.rjust(WINDOW_BYTES, b"\0") for window in group)))
    return groups


def unpack_windows(stored: bytes) -> bytes:
    """One stored group -> its windows back to back. ImageError if damaged (the frame carries a checksum)."""
    raw = _decompress(stored, WINDOWS_PER_GROUP * WINDOW_BYTES)
    if not raw or len(raw) % WINDOW_BYTES:
        raise ImageError("a group of windows in the index has the wrong length")
    return raw


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
    sections = [_compress(section) for section in raw]
    header = {
        "version": 1,
        "manifest": manifest_digest,
        "namespace_sha256": hashlib.sha256(namespace).hexdigest(),
        "sections": [[len(stored), len(plain)] for stored, plain in zip(sections, raw, strict=True)],
        "layers": [
            {
                "digest": layer.blob_digest,
                "size": layer.blob_bytes,
                "diff_id": layer.diff_id,
                "compression": str(layer.compression),
                "tar_bytes": layer.tar_bytes,
                "content_root": layer.content_root,
                "window_groups": [list(group) for group in layer.window_groups],
            }
            for layer in layers
        ],
    }
    stored_header = _compress(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    return b"".join((_HEAD.pack(_MAGIC, len(stored_header)), stored_header, *sections))


class Index:
    """An index blob, opened: the header is parsed and checked, sections are decoded when asked for.

    Every method raises ImageError for damaged or unknown content. The blob is not copied.
    """

    def __init__(self, blob: bytes) -> None:
        self._blob = memoryview(blob)
        self._namespace = b""
        if len(blob) < _HEAD.size:
            raise ImageError("the index is cut short")
        magic, header_bytes = _HEAD.unpack_from(blob)
        if magic != _MAGIC:
            raise ImageError(
                "not an index of a version this lazyfs knows", "update lazyfs, or index the image again"
            )
        if header_bytes > len(blob) - _HEAD.size:
            raise ImageError("the index is cut short")
        text = _decompress(self._blob[_HEAD.size : _HEAD.size + header_bytes], _MAX_HEADER_BYTES)
        try:
            header = json.loads(text)
            self._read_header(header)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ImageError(f"the header of the index is damaged ({type(error).__name__})") from None
        at = _HEAD.size + header_bytes
        self._sections: list[tuple[int, int, int]] = []
        for stored, plain in self._lengths:
            self._sections.append((at, stored, plain))
            at += stored
        if at != len(blob):
            raise ImageError("the sections of the index do not add up to its length")

    def _read_header(self, header: dict[str, Any]) -> None:
        if header["version"] != 1:
            raise ImageError("the index has an unknown version", "update lazyfs, or index the image again")
        self.manifest_digest = _text(header["manifest"])
        self.namespace_sha256 = _text(header["namespace_sha256"])
        self._lengths = [
            (_number(a, MAX_INDEX_BYTES), _number(b, MAX_SECTION_BYTES)) for a, b in header["sections"]
        ]
        layers = header["layers"]
        if len(layers) > MAX_LAYERS or len(self._lengths) != 1 + 2 * len(layers):
            raise ImageError("the index has the wrong number of sections")
        self.layers = tuple(
            LayerRecord(
                blob_digest=_text(layer["digest"]),
                blob_bytes=_number(layer["size"], 1 << 50),
                diff_id=_text(layer["diff_id"]),
                compression=Compression(layer["compression"]),
                tar_bytes=_number(layer["tar_bytes"], 1 << 50),
                content_root=_hex(layer["content_root"]),
                window_groups=tuple(
                    (_number(a, 1 << 50), _number(b, _MAX_GROUP_BYTES)) for a, b in layer["window_groups"]
                ),
            )
            for layer in layers
        )

    def _section(self, number: int) -> bytes:
        at, stored, plain = self._sections[number]
        raw = _decompress(self._blob[at : at + stored], plain)
        if len(raw) != plain:
            raise ImageError("a section of the index has the wrong length")
        return raw

    def namespace(self) -> bytes:
        """The EROFS metadata, checked against its digest in the header."""
        if self._namespace:
            return self._namespace
        namespace = self._section(0)
        if hashlib.sha256(namespace).hexdigest() != self.namespace_sha256:
            raise ImageError("the namespace in the index does not have the digest the index gives")
        self._namespace = namespace
        return namespace

    def table(self, layer: int) -> bytes:
        """The block table of layer number `layer`, which has that layer's content root."""
        table = unpack_table(self._section(1 + 2 * layer))
        if hashlib.sha256(table).hexdigest() != self.layers[layer].content_root:
            raise ImageError("a block table in the index does not have the content root the index gives")
        return table

    def spans(self, layer: int) -> bytes:
        """The span records of layer number `layer`."""
        return self._section(2 + 2 * layer)


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 256:
        raise ValueError("not a short text")
    return value


def _hex(value: object) -> str:
    text = _text(value)
    if len(text) != 64 or text.strip("0123456789abcdef"):
        raise ValueError("not a sha256")
    return text


def _number(value: object, limit: int) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError("not a number in range")
    return value


def _compress(raw: bytes) -> bytes:
    options: dict[int, int] = {
        zstd.CompressionParameter.compression_level: _LEVEL,
        zstd.CompressionParameter.checksum_flag: 1,
        zstd.CompressionParameter.window_log: 23,
    }
    return zstd.compress(raw, options=options)


def _decompress(stored: bytes | memoryview, limit_bytes: int) -> bytes:
    """One whole zstd frame of at most `limit_bytes` of content; never allocates more than that."""
    decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 23})
    try:
        raw = decoder.decompress(stored, limit_bytes + 1)
        if len(raw) <= limit_bytes and not decoder.eof:
            raw += decoder.decompress(b"", 1)
    except zstd.ZstdError as error:
        raise ImageError(f"the index is damaged ({error})") from None
    if len(raw) > limit_bytes or not decoder.eof or decoder.unused_data:
        raise ImageError("a part of the index is longer or shorter than it says")
    return raw
