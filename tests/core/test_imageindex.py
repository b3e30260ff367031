"""The index of an image: what goes in comes out; damaged, foreign or hostile bytes give ImageError and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.index.imageindex import INLINE_BYTES, ImageIndex, encode_image
from lazyfs.core.index.layerindex import LayerHead
from lazyfs.core.index.layerscan import encode_layer
from lazyfs.errors import ImageError
from tests.core.indexes import LAYER, NO_JSON, file_entry, make_scan, part_of, with_header, with_header_text

NAMESPACE = bytes(range(256)) * 16
MANIFEST = "sha256:" + "ef" * 32
LARGE = encode_layer(make_scan([file_entry(b"%d" % number, 1) for number in range(200)]))
SMALL_PART, LARGE_PART = part_of(LAYER), part_of(LARGE)
SMALL_HEAD = LAYER[: SMALL_PART.head_bytes]
PARTS = (SMALL_PART, LARGE_PART, SMALL_PART)
HEADS = {SMALL_PART.index_digest: SMALL_HEAD}
BLOB = encode_image(MANIFEST, NAMESPACE, PARTS, HEADS)


def read_all(blob: bytes) -> ImageIndex:
    index = ImageIndex(blob)
    index.namespace()
    for part in index.parts:
        head = index.inlined_head(part)
        if head is not None:
            LayerHead(head).table()
    return index


def test_what_goes_in_comes_out() -> None:
    assert SMALL_PART.head_bytes < INLINE_BYTES < LARGE_PART.head_bytes
    index = read_all(BLOB)
    assert index.manifest_digest == MANIFEST and index.namespace() == NAMESPACE
    assert index.parts == PARTS and index.layers == tuple(part.record for part in PARTS)
    assert index.inlined_head(SMALL_PART) == SMALL_HEAD and index.inlined_head(LARGE_PART) is None
    assert encode_image(MANIFEST, NAMESPACE, PARTS, HEADS) == BLOB


def test_an_image_without_layers_has_an_index() -> None:
    assert read_all(encode_image(MANIFEST, NAMESPACE, [], {})).layers == ()


@given(st.integers(0, len(BLOB) - 1), st.integers(1, 255))
def test_a_flipped_byte_is_noticed(at: int, mask: int) -> None:
    damaged = bytearray(BLOB)
    damaged[at] ^= mask
    # A few bits of a zstd frame's header mean nothing; then all that is read is right.
    try:
        index = read_all(bytes(damaged))
    except ImageError:
        return
    assert (index.namespace(), index.parts, index.inlined_head(SMALL_PART)) == (NAMESPACE, PARTS, SMALL_HEAD)


@given(st.integers(0, len(BLOB) - 1))
def test_a_cut_is_noticed(end: int) -> None:
    with pytest.raises(ImageError):
        read_all(BLOB[:end])


@given(st.binary(max_size=200), st.booleans())
def test_noise_gives_an_image_error(noise: bytes, led: bool) -> None:
    with pytest.raises(ImageError):
        read_all(b"LZFSIMG2" + noise if led else noise)


HOSTILE: list[Callable[[dict[str, Any]], object]] = [
    lambda h: h.update(version=1),
    lambda h: h.update(version=3),
    lambda h: h.pop("version"),
    lambda h: h.pop("layers"),
    lambda h: h.update(layers=5),
    lambda h: h.update(layers="ab"),
    lambda h: h.update(layers=[]),
    lambda h: h.update(layers=[[]]),
    lambda h: h.update(layers=h["layers"] * 1000),
    lambda h: h.update(manifest=None),
    lambda h: h.update(manifest="x" * 300),
    lambda h: h.update(namespace_sha256="0" * 64),
    lambda h: h.update(namespace_sha256="../../x"),
    lambda h: h.update(sections=[[1, 2, 3]] * 2),
    lambda h: h.update(sections=[[True, 1]] * 2),
    lambda h: h.update(sections={"ab": 1, "cd": 2}),
    lambda h: h["sections"][0].__setitem__(0, -1),
    lambda h: h["sections"][0].__setitem__(0, 1 << 62),
    lambda h: h["sections"][0].__setitem__(1, 10),
    lambda h: h["sections"][0].__setitem__(1, 1 << 31),
    lambda h: h["sections"][0].__setitem__(1, 1.5),
    lambda h: h["sections"][1].__setitem__(1, 1 << 31),
    lambda h: h["layers"][0].update(compression="brotli"),
    lambda h: h["layers"][0].update(content_root="../" + "a" * 61),
    lambda h: h["layers"][0].update(digest="sha256:../../etc"),
    lambda h: h["layers"][0].update(tar_bytes=-1),
    lambda h: h["layers"][0].update(device_bytes=-1),
    lambda h: h["layers"][0].update(device_bytes=1),
    lambda h: h["layers"][0].pop("diff_id"),
    lambda h: h["layers"][0].pop("index"),
    lambda h: h["layers"][0]["index"].update(digest="../../etc/passwd"),
    lambda h: h["layers"][0]["index"].update(size=1 << 40),
    lambda h: h["layers"][0]["index"].update(head=[1 << 29, "0" * 64]),
    lambda h: h["layers"][0]["index"].update(head=[5000, "0" * 64]),
    lambda h: h["layers"][0]["index"].update(head=[1, "x"]),
    lambda h: h["layers"][0]["index"].update(head=7),
    lambda h: h["layers"][1]["index"].update(head=[100, "0" * 64]),
    lambda h: [h],
    lambda h: "text",
    lambda h: 7,
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_header_gives_an_image_error(number: int) -> None:
    with pytest.raises(ImageError):
        read_all(with_header(BLOB, HOSTILE[number]))


@pytest.mark.parametrize("text", NO_JSON)
def test_a_header_that_is_no_json_gives_an_image_error(text: bytes) -> None:
    with pytest.raises(ImageError):
        ImageIndex(with_header_text(BLOB, text))


def test_unknown_keys_are_ignored() -> None:
    changed = with_header(BLOB, lambda h: (h.update(later=1), h["layers"][0]["index"].update(more={}), None)[2])
    assert read_all(changed).parts == PARTS


def test_a_bomb_in_a_header_stays_small() -> None:
    stored = zstd.compress(bytes(200 << 20))
    with pytest.raises(ImageError, match="longer"):
        ImageIndex(BLOB[:8] + len(stored).to_bytes(8, "little") + stored)
