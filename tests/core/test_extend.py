"""A tree read back from a namespace is the tree that was written, and grows as if all layers had been flattened."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.core.erofs.reader import ErofsReader
from lazyfs.core.index.namespace import LayerDevice, read_tree, write_namespace
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import LayerEntry, Node, extend, flatten
from lazyfs.errors import ImageError
from tests.core.layerentries import directory, entry, file, hardlink, symlink, walk

PATHS = st.lists(st.sampled_from(["a", "b", "c", "long" * 40]), min_size=1, max_size=3).map("/".join)
XATTRS = st.dictionaries(
    st.sampled_from([b"user.a", b"security.capability", b"trusted.x", b"com.apple.x"]),
    st.binary(max_size=60),
    max_size=2,
)
DEVICE_NUMBERS = st.tuples(st.integers(0, 4095), st.integers(0, 2**20 - 1))


@st.composite
def layer_entries(draw: st.DrawFn) -> LayerEntry:
    """Any entry that a layer may have, with all that an inode keeps."""
    path = draw(PATHS)
    parent, _, name = path.rpartition("/")
    kind = draw(st.sampled_from(["file", "file", "dir", "symlink", "hardlink", "special", "whiteout", "opaque"]))
    match kind:
        case "file":
            made = file(path, draw(st.integers(0, 10_000)))
            made.address = 4096 * draw(st.integers(0, 5))
        case "dir":
            made = directory(path)
        case "symlink":
            made = symlink(path, draw(PATHS))
        case "hardlink":
            made = hardlink(path, draw(PATHS))
        case "special":
            made = entry(path, draw(st.sampled_from([Kind.CHR, Kind.BLK, Kind.FIFO])))
            if made.entry.kind is not Kind.FIFO:
                made.entry.rdev_major, made.entry.rdev_minor = draw(DEVICE_NUMBERS)
        case "whiteout":
            made = file(f"{parent}/.wh.{name}".lstrip("/"))
        case _:
            made = file(f"{path}/.wh..wh..opq")
    made.entry.mode = draw(st.integers(0, 0o7777))
    made.entry.uid, made.entry.gid = draw(st.tuples(st.integers(0, 2**32 - 2), st.integers(0, 2**32 - 2)))
    made.entry.mtime_s, made.entry.mtime_ns = draw(st.tuples(st.integers(-(2**40), 2**40), st.integers(0, 10**9 - 1)))
    made.entry.xattrs = draw(XATTRS)
    return made


LAYERS = st.lists(st.lists(layer_entries(), max_size=10), min_size=1, max_size=4)
# The third has the content of the first: one device for both.
DEVICES = [LayerDevice(ContentRoot(root * 64), 1 << 20) for root in "abad"]


def namespace(root: Node, layers: int) -> bytes:
    return write_namespace(root, DEVICES[:layers])


def read_back(image: bytes, layers: int) -> Node:
    reader = ErofsReader(image)
    reader.check()
    return read_tree(reader, [device.content_root for device in DEVICES[:layers]])


@settings(deadline=None, max_examples=300)
@given(LAYERS)
def test_a_tree_that_grows_equals_one_flattened_from_all_layers(layers: list[list[LayerEntry]]) -> None:
    try:
        whole = namespace(flatten(layers), len(layers))
    except ImageError:
        return
    for lower in range(len(layers) + 1):
        try:
            base = namespace(flatten(layers[:lower]), lower)
        except ImageError:
            continue
        grown = extend(read_back(base, lower), layers[lower:], lower)
        assert namespace(grown, len(layers)) == whole


@settings(deadline=None, max_examples=200)
@given(LAYERS)
def test_layer_by_layer(layers: list[list[LayerEntry]]) -> None:
    """As hosts do it that change an image again and again."""
    image = namespace(flatten([]), 0)
    for number, layer in enumerate(layers):
        try:
            whole = namespace(flatten(layers[: number + 1]), number + 1)
        except ImageError:
            return
        image = namespace(extend(read_back(image, number), [layer], number), number + 1)
        assert image == whole


def test_what_a_node_is_made_of_comes_back() -> None:
    special = entry("dev", Kind.CHR, rdev_major=0xABC, rdev_minor=0x12345)
    layers = [
        [directory("d", mode=0o1777), file("d/f", 3, mtime_s=-5, xattrs={b"user.a": b"1"}), special],
        [hardlink("l", "d/f"), hardlink("d/m", "dev"), symlink("s", "d/f"), file("d/g", 2)],
    ]
    root = flatten(layers)
    found, wanted = (dict(walk(tree)) for tree in (read_back(namespace(root, 2), 2), root))
    assert found["l"] is found["d/f"] and found["d/m"] is found["dev"]
    for path, node in wanted.items():
        other = found[path]
        for name in set(Node.__slots__) - {"children"}:
            assert getattr(other, name) == getattr(node, name), (path, name)
        assert set(other.children or ()) == set(node.children or ())
    assert found.keys() == wanted.keys()


def test_large_directories_grow() -> None:
    many = [file(f"d/{number:05}", 1 + number % 3) for number in range(3000)]
    layers = [many, [file("d/00017.5"), file("d/.wh.00042"), file("e")]]
    grown = extend(read_back(namespace(flatten(layers[:1]), 1), 1), layers[1:], 1)
    assert namespace(grown, 2) == namespace(flatten(layers), 2)


def test_a_large_directory_that_does_not_change() -> None:
    many = [file(f"d/{number:05}", number % 3) for number in range(3000)]
    layers = [[*many, hardlink("d/02000.5", "d/00001"), directory("d/00100.5")], [file("a")]]
    grown = extend(read_back(namespace(flatten(layers[:1]), 1), 1), layers[1:], 1)
    assert namespace(grown, 2) == namespace(flatten(layers), 2)


def test_what_cannot_be_written_is_named_in_a_directory_that_does_not_change() -> None:
    base = read_back(namespace(flatten([[directory("d/e"), file("d/f")]]), 1), 1)
    grown = extend(base, [[directory("d/e", xattrs={b"system.posix_acl_access": b"bad"})]], 1)
    with pytest.raises(ImageError, match="b'e': its ACL"):
        namespace(grown, 2)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 1 << 14), st.binary(min_size=1, max_size=8))
def test_a_damaged_namespace_is_a_tree_or_an_error(place: int, damage: bytes) -> None:
    """No other exception, whatever is made of it."""
    layer = [directory("d"), file("d/a", 3), file("d/b", 0), hardlink("l", "d/a"), symlink("s", "d"), file("f", 9)]
    image = bytearray(namespace(flatten([layer]), 1))
    place %= len(image) - len(damage)
    image[place : place + len(damage)] = damage
    try:
        tree = read_tree(ErofsReader(bytes(image)), [device.content_root for device in DEVICES[:1]])
        namespace(extend(tree, [[file("d/c"), hardlink("m", "f"), file(".wh.s")]], 1), 2)
    except ImageError:
        pass


def test_devices_of_other_layers_are_an_error() -> None:
    reader = ErofsReader(namespace(flatten([[file("a")]]), 1))
    with pytest.raises(ImageError, match="does not have"):
        read_tree(reader, [ContentRoot("b" * 64)])


def test_a_replaced_layer_leaves_no_device() -> None:
    image = namespace(flatten([[file("a")], [file("a")]]), 2)
    assert [device.tag for device in ErofsReader(image).devices] == [b"b" * 64]
