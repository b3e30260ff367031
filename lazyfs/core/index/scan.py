"""What one pass over a layer finds out, and the form in which a cache keeps it: a layer is read only once.

Layout (docs/FORMATS.md, "Scan of a layer"; version 1): a blob of sections (core/index/sections.py), magic "LZFSSCN1".
The sections are the entries (JSON), the packed block table, the span records and the groups of windows back to back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from lazyfs.core.index.blob import LayerRecord, read_record, record_fields
from lazyfs.core.index.sections import Sections, encode_sections, number
from lazyfs.core.layer.blocks import pack_table, unpack_table
from lazyfs.core.tar.reader import Kind, TarEntry
from lazyfs.core.tar.tree import LayerEntry
from lazyfs.errors import ImageError

_MAGIC = b"LZFSSCN1"
_SECTIONS = 4
# Kept on this host, made on the way to an index: the time counts, not the last byte.
_LEVEL = 3
_MAX_NUMBER = 1 << 60


@dataclass(slots=True)
class LayerScan:
    """All that an index needs of a layer, known after one pass.

    The record names no window groups: where they lie is up to the index. Kept scans have entries without segments:
    their addresses are given out.
    """

    record: LayerRecord
    entries: list[LayerEntry]
    table: bytes
    span_records: bytes
    window_groups: list[bytes]


def encode_scan(scan: LayerScan) -> bytes:
    """The blob."""
    places, at = [], 0
    for group in scan.window_groups:
        places.append((at, len(group)))
        at += len(group)
    record = dataclasses.replace(scan.record, window_groups=tuple(places))
    entries = json.dumps([_fields(item) for item in scan.entries], separators=(",", ":"))
    sections = [entries.encode(), pack_table(scan.table), scan.span_records, b"".join(scan.window_groups)]
    return encode_sections(_MAGIC, {"version": 1, "layer": record_fields(record)}, sections, _LEVEL)


def decode_scan(blob: bytes) -> LayerScan:
    """Inverse of encode_scan. ImageError if damaged or of another version."""
    sections = Sections(blob, _MAGIC, "the scan of a layer", "it is made anew")
    try:
        if len(sections) != _SECTIONS:
            raise ValueError("wrong number of sections")
        record = read_record(sections.header["layer"])
        entries = [_entry(*fields) for fields in json.loads(sections.section(0))]
        groups = sections.section(3)
        if sum(length for _, length in record.window_groups) != len(groups):
            raise ValueError("wrong length of windows")
        windows = [groups[at : at + length] for at, length in record.window_groups]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ImageError(f"the scan of a layer is damaged ({type(error).__name__})") from None
    table = unpack_table(sections.section(1))
    if hashlib.sha256(table).hexdigest() != record.content_root:
        raise ImageError("the scan of a layer is damaged (block table)")
    record = dataclasses.replace(record, window_groups=())
    return LayerScan(record, entries, table, sections.section(2), windows)


def _fields(item: LayerEntry) -> list[Any]:
    entry = item.entry
    xattrs = {_text(name): _text(value) for name, value in entry.xattrs.items()}
    numbers = [int(entry.kind), entry.mode, entry.uid, entry.gid, entry.size, entry.mtime_s, entry.mtime_ns]
    device = [entry.rdev_major, entry.rdev_minor]
    return [item.address, _text(entry.path), numbers, _text(entry.target), device, xattrs]


def _entry(
    address: int, path: str, numbers: list[int], target: str, device: list[int], xattrs: dict[str, str]
) -> LayerEntry:
    kind, mode, uid, gid, size, mtime_s, mtime_ns = numbers
    major, minor = device
    for value in (address, mode, uid, gid, size, mtime_ns, major, minor):
        number(value, _MAX_NUMBER)
    if type(mtime_s) is not int or abs(mtime_s) > _MAX_NUMBER:
        raise ValueError("not a time in range")
    entry = TarEntry(
        _raw(path), Kind(kind), mode, uid, gid, size, mtime_s, mtime_ns, _raw(target), major, minor,
        {_raw(name): _raw(value) for name, value in xattrs.items()},
    )  # fmt: skip
    return LayerEntry(entry, address)


def _text(raw: bytes) -> str:
    """Bytes as the characters of the same numbers, since JSON has only text."""
    return raw.decode("latin-1")


def _raw(text: str) -> bytes:
    return text.encode("latin-1")
