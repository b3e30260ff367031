"""The index blob: what goes in comes out; damaged, foreign or hostile bytes give ImageError and
nothing else.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.index.blob import Index, LayerRecord, encode_index
from lazyfs.core.index.windows import pack_windows, unpack_windows
from lazyfs.core.layer.blocks import BlockTableBuilder, pack_table
from lazyfs.core.layer.deflate import WINDOW_BYTES
from lazyfs.core.layer.spans import WINDOWS_PER_GROUP, Compression, Point, PointKind, encode_points
from lazyfs.errors import ImageError

NAMESPACE = bytes(range(256)) * 16
MANIFEST = "sha256:" + "ab" * 32
SPANS = encode_points([Point(10, 0, 0, PointKind.ENTRY)])


def make_table() -> bytes:
    builder = BlockTableBuilder()
    for size in (1, 5000, 262144):
        builder.add(builder.place(size), 512 * (1 + size), size, hashlib.sha256(b"%d" % size).digest())
    return builder.finish(1 << 30)


TABLE = make_table()
RECORD = LayerRecord(
    MANIFEST,
    1000,
    MANIFEST,
    Compression.GZIP,
    1 << 30,
    hashlib.sha256(TABLE).hexdigest(),
    ((0, 500), (500, 9)),
)
BLOB = encode_index(MANIFEST, NAMESPACE, [RECORD], [pack_table(TABLE)], [SPANS])


def read_all(blob: bytes) -> Index:
    index = Index(blob)
    index.namespace()
    for layer in range(len(index.layers)):
        index.table(layer)
        index.spans(layer)
    return index


def test_what_goes_in_comes_out() -> None:
    index = read_all(BLOB)
    assert index.manifest_digest == MANIFEST
    assert index.layers == (RECORD,)
    assert (index.namespace(), index.table(0), index.spans(0)) == (NAMESPACE, TABLE, SPANS)
    assert encode_index(MANIFEST, NAMESPACE, [RECORD], [pack_table(TABLE)], [SPANS]) == BLOB


def test_the_namespace_is_decoded_once() -> None:
    index = Index(BLOB)
    assert index.namespace() is index.namespace()


def test_an_image_without_layers_has_an_index() -> None:
    assert read_all(encode_index(MANIFEST, NAMESPACE, [], [], [])).layers == ()


@given(st.integers(0, len(BLOB) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_noticed(at: int, mask: int) -> None:
    damaged = bytearray(BLOB)
    damaged[at] ^= mask
    # A few bits of a zstd frame's header mean nothing; then all that is read is right.
    try:
        index = read_all(bytes(damaged))
    except ImageError:
        return
    assert (index.namespace(), index.table(0), index.spans(0)) == (NAMESPACE, TABLE, SPANS)


@given(st.integers(0, len(BLOB) - 1))
def test_a_cut_is_noticed(end: int) -> None:
    with pytest.raises(ImageError):
        read_all(BLOB[:end])


@given(st.binary(max_size=200), st.booleans())
def test_noise_gives_an_image_error(noise: bytes, led: bool) -> None:
    with pytest.raises(ImageError):
        read_all(b"LZFSIDX1" + noise if led else noise)


def with_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    """BLOB with a header changed (in place, or to what `change` returns unless that is None)."""
    (length,) = struct.unpack_from("<Q", BLOB, 8)
    header = json.loads(zstd.decompress(BLOB[16 : 16 + length]))
    result = change(header)
    stored = zstd.compress(json.dumps(header if result is None else result).encode())
    return BLOB[:8] + struct.pack("<Q", len(stored)) + stored + BLOB[16 + length :]


HOSTILE: list[Callable[[dict[str, Any]], object]] = [
    lambda h: h.update(version=2),
    lambda h: h.pop("version"),
    lambda h: h.pop("layers"),
    lambda h: h.update(layers=5),
    lambda h: h.update(layers="ab"),
    lambda h: h.update(layers=[]),
    lambda h: h.update(layers=[[]]),
    lambda h: h.update(manifest=None),
    lambda h: h.update(manifest="x" * 300),
    lambda h: h.update(namespace_sha256="0" * 64),
    lambda h: h.update(sections=[[1, 2, 3]] * 3),
    lambda h: h.update(sections=[[True, 1]] * 3),
    lambda h: h.update(sections={"ab": 1, "cd": 2, "ef": 3}),
    lambda h: h["sections"][0].__setitem__(0, -1),
    lambda h: h["sections"][0].__setitem__(0, 1 << 62),
    lambda h: h["sections"][0].__setitem__(1, 10),
    lambda h: h["sections"][0].__setitem__(1, 1 << 31),
    lambda h: h["sections"][0].__setitem__(1, 1.5),
    lambda h: h["layers"][0].update(compression="brotli"),
    lambda h: h["layers"][0].update(compression=[]),
    lambda h: h["layers"][0].update(content_root="../" + "a" * 61),
    lambda h: h["layers"][0].update(content_root="a" * 64),
    lambda h: h["layers"][0].update(tar_bytes=-1),
    lambda h: h["layers"][0].update(window_groups=[[0, 1 << 29]]),
    lambda h: h["layers"][0].update(window_groups=7),
    lambda h: h["layers"][0].pop("diff_id"),
    lambda h: [h],
    lambda h: "text",
    lambda h: 7,
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_header_gives_an_image_error(number: int) -> None:
    with pytest.raises(ImageError):
        read_all(with_header(HOSTILE[number]))


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"version": 1' + b"0" * 10_000 + b"}", b"\xff", b"NaN", b""]
)
def test_a_header_that_is_no_json_gives_an_image_error(text: bytes) -> None:
    stored = zstd.compress(text)
    with pytest.raises(ImageError):
        Index(BLOB[:8] + struct.pack("<Q", len(stored)) + stored)


def test_a_bomb_in_a_header_stays_small() -> None:
    stored = zstd.compress(bytes(200 << 20))
    with pytest.raises(ImageError, match="longer"):
        Index(BLOB[:8] + struct.pack("<Q", len(stored)) + stored)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=70))
def test_windows_are_grouped_and_filled_in_front(windows: list[bytes]) -> None:
    groups = pack_windows(windows)
    assert len(groups) == -(-len(windows) // WINDOWS_PER_GROUP)
    raw = b"".join(unpack_windows(group) for group in groups)
    assert raw == b"".join(window.rjust(WINDOW_BYTES, b"\0") for window in windows)


@given(st.integers(0, 1 << 30), st.integers(1, 255))
def test_a_damaged_group_is_noticed(at: int, mask: int) -> None:
    group = bytearray(pack_windows([b"window" * 1000, bytes(range(256)) * 100])[0])
    group[at % len(group)] ^= mask
    try:
        raw = unpack_windows(bytes(group))
    except ImageError:
        return
    assert raw == unpack_windows(pack_windows([b"window" * 1000, bytes(range(256)) * 100])[0])


@pytest.mark.parametrize(
    "stored",
    [b"", b"x", zstd.compress(b""), zstd.compress(b"short"), zstd.compress(bytes(33 * WINDOW_BYTES))],
)
def test_a_group_of_the_wrong_length_is_refused(stored: bytes) -> None:
    with pytest.raises(ImageError):
        unpack_windows(stored)
