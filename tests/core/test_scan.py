"""The scan of a layer as a cache keeps it: what goes in comes out; anything else gives ImageError."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.index.blob import LayerRecord
from lazyfs.core.index.scan import LayerScan, decode_scan, encode_scan
from lazyfs.core.index.sections import Sections, encode_sections
from lazyfs.core.index.windows import pack_windows
from lazyfs.core.layer.blocks import BlockTableBuilder
from lazyfs.core.layer.spans import Compression, Point, PointKind, encode_points
from lazyfs.core.tar.reader import Kind, TarEntry
from lazyfs.core.tar.tree import LayerEntry
from lazyfs.errors import ImageError

DIGEST, DIFF_ID = "sha256:" + "ab" * 32, "sha256:" + "cd" * 32
numbers = st.integers(0, 2**40)
entries = st.builds(
    LayerEntry,
    st.builds(
        TarEntry,
        path=st.binary(max_size=40),
        kind=st.sampled_from(Kind),
        mode=st.integers(0, 0o7777),
        uid=numbers,
        gid=numbers,
        size=numbers,
        mtime_s=st.integers(-(2**40), 2**40),
        mtime_ns=st.integers(0, 10**9 - 1),
        target=st.binary(max_size=40),
        rdev_major=numbers,
        rdev_minor=numbers,
        xattrs=st.dictionaries(st.binary(max_size=10), st.binary(max_size=40), max_size=3),
    ),
    numbers,
)


def make_scan(items: list[LayerEntry], windows: int = 10) -> LayerScan:
    builder = BlockTableBuilder()
    for size in (1, 5000, 262144):
        builder.add(builder.place(size), 512 * (1 + size), size, hashlib.sha256(b"%d" % size).digest())
    table = builder.finish(1 << 30)
    root = hashlib.sha256(table).hexdigest()
    record = LayerRecord(DIGEST, 1000, DIFF_ID, Compression.GZIP, 1 << 30, root, ())
    spans = encode_points([Point(10, 0, 0, PointKind.ENTRY)])
    return LayerScan(record, items, table, spans, pack_windows([bytes([n]) * 100 for n in range(windows)]))


BLOB = encode_scan(make_scan([LayerEntry(TarEntry(b"a", Kind.FILE, 0o644, 0, 0, 1, 2, 3), 4096)]))


@given(st.lists(entries, max_size=5), st.integers(0, 20))
def test_what_goes_in_comes_out(items: list[LayerEntry], windows: int) -> None:
    scan = make_scan(items, windows)
    assert decode_scan(encode_scan(scan)) == scan


def test_segments_are_not_kept() -> None:
    entry = TarEntry(b"sparse", Kind.FILE, 0o644, 0, 0, 100, 2, 3, segments=((0, 512, 100),))
    (kept,) = decode_scan(encode_scan(make_scan([LayerEntry(entry, 4096)]))).entries
    assert kept == LayerEntry(dataclasses.replace(entry, segments=()), 4096)


@given(st.integers(0, len(BLOB) - 1), st.integers(1, 255))
def test_a_flipped_byte_changes_nothing_or_is_noticed(at: int, mask: int) -> None:
    damaged = bytearray(BLOB)
    damaged[at] ^= mask
    # A few bits of a zstd frame's header mean nothing; then all that is read is right.
    with contextlib.suppress(ImageError):
        assert decode_scan(bytes(damaged)) == decode_scan(BLOB)


@given(st.integers(0, len(BLOB) - 1))
def test_a_blob_that_is_cut_short_is_refused(length: int) -> None:
    with pytest.raises(ImageError):
        decode_scan(BLOB[:length])


FIELDS = [4096, "a", [1, 0o644, 0, 0, 1, 2, 3], "", [0, 0], {}]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, -1), (0, "4096"), (0, 1.5), (0, 1 << 70), (1, 7), (1, "\u20ac"), (2, [1, 0, 0]),
        (2, [99, 0, 0, 0, 1, 2, 3]),
        (2, [1, 0, 0, 0, -1, 2, 3]), (2, [1, 0, 0, 0, 1, "2", 3]), (3, None), (4, [True, 0]), (5, []), (5, {"a": 1}),
    ],
)  # fmt: skip
def test_entries_of_the_wrong_form_are_refused(place: int, value: object) -> None:
    """As a damaged checksum would not show: the blob is whole, its content is not."""
    assert decode_scan(with_entries([FIELDS])) == decode_scan(BLOB)
    fields = list(FIELDS)
    fields[place] = value
    for entries in ([fields], fields, {"a": fields}, 7):
        with pytest.raises(ImageError):
            decode_scan(with_entries(entries))


def with_entries(entries: object) -> bytes:
    """BLOB with other entries."""
    known = Sections(BLOB, b"LZFSSCN1", "", "")
    sections = [json.dumps(entries).encode(), *(known.section(number) for number in range(1, len(known)))]
    return encode_sections(b"LZFSSCN1", known.header, sections)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(ImageError):
        decode_scan(noise)
