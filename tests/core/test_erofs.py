"""EROFS metadata: what is written is read back, and damage is an ImageError, never anything else."""

from __future__ import annotations

import contextlib
import hashlib
import stat
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.core.erofs.format import SUPER_OFFSET, superblock_checksum
from lazyfs.core.erofs.reader import ErofsReader, Inode
from lazyfs.core.erofs.writer import Device, write_erofs
from lazyfs.core.tar.reader import Kind
from lazyfs.core.tar.tree import Node
from lazyfs.errors import ImageError

BLOCK = 4096
DEVICES = (Device(b"a" * 64, 3 * BLOCK), Device(b"b" * 64, 0), Device(b"c" * 64, 1 << 36))
NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: name not in (b".", b"..") and b"/" not in name and b"\0" not in name
)
TEXT = st.binary(min_size=1, max_size=60).filter(lambda text: b"\0" not in text)
TREE_KINDS = [Kind.FILE, Kind.DIR, Kind.CHR, Kind.BLK, Kind.FIFO, Kind.SYMLINK]
XATTR_NAMES = st.builds(bytes.__add__, st.sampled_from([b"user.", b"trusted.", b"security."]), TEXT)


def node(kind: Kind, **fields: object) -> Node:
    values: dict[str, object] = {"mode": 0o644, "uid": 0, "gid": 0, "mtime_s": 0, "mtime_ns": 0, **fields}
    return Node(kind, **values)  # type: ignore[arg-type]


def directory(children: dict[bytes, Node] | None = None, **fields: object) -> Node:
    children = children or {}
    links = 2 + sum(child.kind == Kind.DIR for child in children.values())
    return node(Kind.DIR, **{"mode": 0o755, "children": children, "nlink": links, **fields})


@st.composite
def nodes(draw: st.DrawFn, kind: Kind) -> Node:
    made = node(
        kind,
        mode=draw(st.integers(0, 0o7777)),
        uid=draw(st.integers(0, 2**32 - 2)),
        gid=draw(st.integers(0, 2**32 - 2)),
        mtime_s=draw(st.integers(-(2**63), 2**63 - 1)),
        mtime_ns=draw(st.integers(0, 999_999_999)),
    )
    if kind == Kind.SYMLINK:
        length = draw(st.sampled_from([1, 3900, 4031, 4032, 4033, 4095]))
        made.target = draw(TEXT)[:1] * length
    elif kind in (Kind.CHR, Kind.BLK):
        made.rdev_major = draw(st.integers(0, 4095))
        made.rdev_minor = draw(st.integers(0, 2**20 - 1))
    elif kind == Kind.FILE:
        made.layer, limit = draw(st.sampled_from([(-1, 0), (0, 3), (2, 1 << 24)]))
        if limit:
            block = draw(st.integers(0, limit - 1))
            made.address = block * BLOCK
            made.size = draw(st.integers(1, (limit - block) * BLOCK))
    if kind in (Kind.FILE, Kind.DIR):
        made.xattrs = draw(st.dictionaries(XATTR_NAMES, st.binary(max_size=5000), max_size=3))
    return made


@st.composite
def trees(draw: st.DrawFn) -> Node:
    root = draw(nodes(Kind.DIR))
    root.children = {}
    directories = [root]
    files: list[Node] = []
    for kind in draw(st.lists(st.sampled_from([*TREE_KINDS, Kind.HARDLINK]), max_size=25)):
        parent = draw(st.sampled_from(directories)).children
        assert parent is not None
        name = draw(NAMES)
        if name in parent:
            continue
        if kind == Kind.HARDLINK:
            if files:
                parent[name] = draw(st.sampled_from(files))
            continue
        child = parent[name] = draw(nodes(kind))
        if kind == Kind.DIR:
            child.children = {}
            directories.append(child)
        else:
            files.append(child)
    count_links(root)
    return root


def count_links(root: Node) -> None:
    for _, found in walk(root):
        found.nlink = 2 if found.kind == Kind.DIR else 0
    for _, found in walk(root):
        if found.kind != Kind.DIR:
            found.nlink += 1
        for child in (found.children or {}).values():
            found.nlink += child.kind == Kind.DIR


def walk(root: Node, path: tuple[bytes, ...] = ()) -> Iterator[tuple[tuple[bytes, ...], Node]]:
    yield path, root
    for name, child in (root.children or {}).items():
        yield from walk(child, (*path, name))


def same(reader: ErofsReader, found: Inode, wanted: Node) -> None:
    assert found.kind == wanted.kind
    assert stat.S_IMODE(found.mode) == wanted.mode
    assert (found.uid, found.gid, found.nlink) == (wanted.uid, wanted.gid, wanted.nlink)
    assert found.mtime_ns == wanted.mtime_s * 10**9 + wanted.mtime_ns
    assert reader.xattrs(found.nid) == wanted.xattrs
    if wanted.kind == Kind.FILE:
        assert (found.size, found.device) == (wanted.size, wanted.layer)
        assert found.address == (wanted.address if wanted.size else 0)
    if wanted.kind == Kind.SYMLINK:
        assert reader.readlink(found.nid) == wanted.target
        assert found.size == len(wanted.target)
    if wanted.kind in (Kind.CHR, Kind.BLK):
        # glibc's makedev() for numbers this small
        assert (
            found.rdev == wanted.rdev_major << 8 | wanted.rdev_minor & 0xFF | (wanted.rdev_minor >> 8) << 20
        )


def compare(reader: ErofsReader, root: Node) -> None:
    """Every node is found by lookup, and entries() lists just the children."""
    nids: dict[Node, int] = {}
    pending = [(root, reader.root_nid, reader.root_nid)]
    while pending:
        wanted, nid, parent = pending.pop()
        assert nids.setdefault(wanted, nid) == nid
        same(reader, reader.inode(nid), wanted)
        if wanted.kind != Kind.DIR:
            continue
        children = wanted.children or {}
        listed = list(reader.entries(nid))
        assert [name for name, _, _ in listed] == sorted([b".", b"..", *children])
        for name, child_nid, file_type in listed:
            assert reader.lookup(nid, name) == child_nid
            if name in (b".", b".."):
                assert (child_nid, file_type) == (nid if name == b"." else parent, Kind.DIR)
            else:
                assert file_type == children[name].kind
                pending.append((children[name], child_nid, nid))
        for missing in (b"", b"\0", b"!", b"~~", b"\xff" * 255):
            assert (reader.lookup(nid, missing) is not None) == (missing in children)
    assert len(set(nids.values())) == len(nids) == reader.inode_count


@settings(deadline=None, max_examples=200)
@given(trees())
def test_round_trip(root: Node) -> None:
    image = write_erofs(root, DEVICES, b"0123456789abcdef")
    assert len(image) % BLOCK == 0
    reader = ErofsReader(image)
    assert reader.devices == DEVICES
    compare(reader, root)
    reader.check()


@settings(deadline=None, max_examples=10)
@given(trees(), st.randoms(use_true_random=False))
def test_insertion_order_does_not_matter(root: Node, random: object) -> None:
    image = write_erofs(root, DEVICES)
    for _, found in walk(root):
        for mapping in (found.children, found.xattrs):
            items: list[tuple[bytes, object]] = list((mapping or {}).items())
            random.shuffle(items)  # type: ignore[attr-defined]
            if mapping is not None:
                mapping.clear()
                mapping.update(items)  # type: ignore[arg-type]
    assert write_erofs(root, DEVICES) == image


def small_tree() -> Node:
    shared = node(Kind.FILE, size=5000, layer=0, address=BLOCK, nlink=2, xattrs={b"user.k": b"v"})
    inner = directory({b"hard": shared, b"link": node(Kind.SYMLINK, target=b"../top", mode=0o777)})
    many = directory({b"n%04d" % number: node(Kind.FIFO) for number in range(600)})
    null = node(Kind.CHR, rdev_major=1, rdev_minor=3)
    return directory(
        {b"top": shared, b"dirA": inner, b"many": many, b"null": null, b"empty": node(Kind.FILE)}
    )


GOLDEN = "e86716612536"


def test_bytes_stay_the_same() -> None:
    """Indexes are addressed by content: the same tree must give the same bytes in every release."""
    image = write_erofs(small_tree(), DEVICES)
    assert hashlib.sha256(image).hexdigest().startswith(GOLDEN)


@pytest.mark.parametrize("length", [*range(3900, 4100, 7), *range(4024, 4036), 8100, 8190, 8191, 8192, 12288])
def test_directory_blocks_of_every_fill(length: int) -> None:
    """Around the sizes where a directory stops fitting behind its inode, or a block is exactly full."""
    left = length - 27  # "." and ".." with their dirents
    names: list[bytes] = []
    while left:
        size = left if left <= 267 else min(267, left - 13)
        names.append(
            b"%05d" % len(names) + b"x" * (size - 17) if size >= 17 else b"%c" % len(names) * (size - 12)
        )
        left -= size
    root = directory({name: node(Kind.FIFO) for name in names})
    reader = ErofsReader(write_erofs(root, ()))
    compare(reader, root)
    reader.check()


@pytest.mark.parametrize("size", [0, 1, 3900, 4000, 4016, 4017, 4096, 65535])
def test_attributes_of_every_length(size: int) -> None:
    attributes = {b"user.a": b"x" * size, b"security.capability": b"y" * 20, b"trusted." + b"n" * 255: b""}
    target = b"t" * 4000
    root = directory(
        {
            b"file": node(Kind.FILE, xattrs=attributes),
            b"dir": directory({b"x" * 255: node(Kind.FIFO)}, xattrs=attributes),
            b"link": node(Kind.SYMLINK, target=target, xattrs={b"security.x": b"z" * size}),
        },
        xattrs=attributes,
    )
    reader = ErofsReader(write_erofs(root, ()))
    compare(reader, root)
    reader.check()


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


ACL = acl((1, 7, 0xFFFFFFFF), (2, 5, 70000), (4, 5, 0xFFFFFFFF), (16, 5, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF))
MINIMAL_ACL = acl((1, 6, 0), (4, 4, 0), (32, 4, 0))


def test_attributes_that_no_file_system_takes_are_left_out() -> None:
    access, default = b"system.posix_acl_access", b"system.posix_acl_default"
    given_xattrs = {
        access: ACL, default: ACL, b"user.u": b"1", b"trusted.t": b"2", b"user.": b"", b"btrfs.x": b"",
        b"system.posix_acl_access2": b"",
    }  # fmt: skip
    root = directory(
        {
            b"file": node(Kind.FILE, xattrs=given_xattrs),
            b"fifo": node(Kind.FIFO, xattrs=given_xattrs),
            b"link": node(Kind.SYMLINK, target=b"x", xattrs=given_xattrs),
            b"none": node(Kind.FILE, xattrs={access: acl()}),
            b"minimal": node(Kind.FILE, xattrs={access: MINIMAL_ACL}),
        },
        xattrs=given_xattrs,
    )
    reader = ErofsReader(write_erofs(root, ()))
    reader.check()
    trusted = {b"trusted.t": b"2"}
    assert reader.xattrs(reader.root_nid) == {access: ACL, default: ACL, b"user.u": b"1", **trusted}
    found = {name: reader.xattrs(nid) for name, nid, _ in reader.entries(reader.root_nid)}
    assert found[b"file"] == {access: ACL, b"user.u": b"1", **trusted}
    assert found[b"fifo"] == {access: ACL, **trusted}
    assert found[b"link"] == trusted
    assert found[b"none"] == {}
    assert found[b"minimal"] == {access: MINIMAL_ACL}


BAD_ACLS = [
    b"", b"\2\0\0", ACL[:-1], b"\1" + ACL[1:], acl((1, 8, 0), (4, 0, 0), (32, 0, 0)),
    acl((4, 0, 0), (1, 0, 0), (32, 0, 0)),
    acl((1, 7, 0), (2, 7, 1), (4, 7, 0), (32, 7, 0)),
    acl((1, 7, 0), (2, 7, 0xFFFFFFFF), (4, 7, 0), (16, 7, 0), (32, 7, 0)),
    acl((3, 0, 0)),
]  # fmt: skip
FILE, DIR, LINK, CHR = Kind.FILE, Kind.DIR, Kind.SYMLINK, Kind.CHR
LOOP = directory()
assert LOOP.children is not None
LOOP.children[b"again"] = LOOP


@pytest.mark.parametrize(
    "child",
    [
        *(node(FILE, xattrs={b"system.posix_acl_access": value}) for value in BAD_ACLS),
        node(FILE, xattrs={b"user." + b"n" * 256: b""}),
        node(FILE, xattrs={b"user.a\0b": b""}),
        node(FILE, xattrs={b"user.a": bytes(65536)}),
        node(FILE, xattrs={b"user.%d" % number: bytes(65000) for number in range(5)}),
        node(FILE, size=1),
        node(FILE, size=1, layer=3),
        node(FILE, size=1, layer=1),
        node(FILE, size=1, layer=0, address=12),
        node(FILE, size=1, layer=0, address=-BLOCK),
        node(FILE, size=1, layer=0, address=3 * BLOCK),
        node(FILE, size=3 * BLOCK + 1, layer=0),
        node(FILE, size=-1, layer=0),
        node(FILE, uid=2**32 - 1),
        node(FILE, gid=-1),
        node(FILE, mode=0o10000),
        node(FILE, mtime_s=2**63),
        node(FILE, mtime_ns=10**9),
        node(FILE, mtime_ns=-1),
        node(FILE, nlink=2**32),
        node(CHR, rdev_major=4096),
        node(CHR, rdev_minor=2**20),
        node(LINK, target=b""),
        node(LINK, target=b"x" * 4096),
        node(LINK, target=b"a\0b"),
        node(Kind.HARDLINK, target=b"x"),
        LOOP,
    ],
)
def test_what_cannot_be_represented(child: Node) -> None:
    with pytest.raises(ImageError):
        write_erofs(directory({b"child": child}), DEVICES)


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0", b"x" * 256])
def test_names_that_linux_does_not_have(name: bytes) -> None:
    with pytest.raises(ImageError):
        write_erofs(directory({name: node(Kind.FIFO)}), ())


def test_limits_of_the_address_space() -> None:
    with pytest.raises(ImageError, match="16 TiB"):
        write_erofs(directory(), [Device(b"", (2**32 - 1) * BLOCK)])
    with pytest.raises(ImageError):
        write_erofs(directory(), [Device(b"", 0)] * 4097)
    with pytest.raises(ImageError):
        write_erofs(node(FILE), ())
    devices = [Device(b"%d" % number, BLOCK) for number in range(4096)]
    root = directory({b"f": node(FILE, size=1, layer=4095)}, xattrs={b"user.x": bytes(5000)})
    reader = ErofsReader(write_erofs(root, devices))
    compare(reader, root)
    reader.check()


def test_limits_of_a_device_and_a_file() -> None:
    """Devices as large as 32-bit block numbers allow, several of them, and a file as large as a chunk."""
    devices = tuple(Device(b"%d" % number, (2**32 - 2) * BLOCK) for number in range(3))
    largest = node(FILE, size=1 << 43, layer=1, address=BLOCK)
    last = node(FILE, size=BLOCK, layer=2, address=(2**32 - 3) * BLOCK)
    root = directory({b"largest": largest, b"last": last})
    reader = ErofsReader(write_erofs(root, devices))
    assert reader.devices == devices
    compare(reader, root)
    largest.size += 1
    with pytest.raises(ImageError, match="8 TiB"):
        write_erofs(root, devices)


def resealed(image: bytes | bytearray) -> bytes:
    """With a right checksum, as whoever forges an image would have."""
    sealed = bytearray(image)
    struct.pack_into("<I", sealed, SUPER_OFFSET + 4, superblock_checksum(sealed[:BLOCK]))
    return bytes(sealed)


def use(image: bytes) -> None:
    """Everything the reader can do, on whatever nids the image itself and its surroundings offer."""
    with contextlib.suppress(ImageError):
        reader = ErofsReader(image)
        for walk_all in (reader.check, reader.tree):
            with contextlib.suppress(ImageError):
                walk_all()
        actions: list[Callable[[int], object]] = [
            reader.inode,
            lambda nid: list(reader.entries(nid)),
            lambda nid: reader.lookup(nid, b"n0300"),
            lambda nid: reader.lookup(nid, b"top"),
            reader.readlink,
            reader.xattrs,
        ]
        for nid in (-1, 2**64 - 1, *range(len(image) // 32 + 1)):
            for action in actions:
                with contextlib.suppress(ImageError):
                    action(nid)


SMALL = write_erofs(small_tree(), DEVICES)
VALUES = st.one_of(st.integers(0, 255), st.sampled_from([0, 255]))
EDITS = st.lists(st.tuples(st.integers(SUPER_OFFSET, len(SMALL) - 1), VALUES), min_size=1, max_size=12)
# Most edits should hit the structures: superblock, device slots, inodes, the first dirents.
NEAR = st.lists(st.tuples(st.integers(SUPER_OFFSET, 2048), st.integers(0, 255)), min_size=1, max_size=3)


@settings(deadline=None, max_examples=150)
@given(st.one_of(EDITS, NEAR))
def test_damage_is_an_image_error(edits: list[tuple[int, int]]) -> None:
    image = bytearray(SMALL)
    for position, value in edits:
        image[position] = value
    use(resealed(image))
    if image[:BLOCK] != SMALL[:BLOCK]:
        with pytest.raises(ImageError):
            ErofsReader(bytes(image))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, len(SMALL) - 1), st.binary(max_size=64))
def test_truncated_and_foreign_buffers(length: int, garbage: bytes) -> None:
    with pytest.raises(ImageError):
        ErofsReader(SMALL[:length])
    with pytest.raises(ImageError):
        ErofsReader(garbage * 64)
    with pytest.raises(ImageError):
        ErofsReader(SMALL + bytes(BLOCK))


def patched(position: int, form: str, value: int) -> bytes:
    image = bytearray(SMALL)
    struct.pack_into("<" + form, image, position, value)
    return resealed(image)


@pytest.mark.parametrize(
    ("field", "form", "value"),
    [(0, "I", 1), (12, "B", 9), (13, "B", 1), (14, "H", 0), (14, "H", 0xFFFF), (36, "I", 1), (40, "I", 1),
     (80, "I", 0xD), (80, "I", 8), (80, "I", 4), (80, "I", 0), (84, "H", 1), (86, "H", 0),
     (86, "H", 0xFFFF), (88, "H", 0), (90, "B", 1), (128 + 64, "I", 0xFFFFFFFF), (128 + 68, "I", 1)],
)  # fmt: skip
def test_superblock_outside_the_profile(field: int, form: str, value: int) -> None:
    with pytest.raises(ImageError):
        ErofsReader(patched(SUPER_OFFSET + field, form, value))


def rejected_by_check(image: bytes) -> None:
    reader = ErofsReader(resealed(image))
    with pytest.raises(ImageError):
        reader.check()


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"dirA", b"d/rA"), (b"dirA", b"d\0rA"), (b"dirA", b"zzzz"), (b"n0300", b"n0299"), (b"n0300", b"n9999"),
     (b"../top", b"..\0top")],
)  # fmt: skip
def test_check_finds_bad_names(old: bytes, new: bytes) -> None:
    assert SMALL.count(old) == 1
    rejected_by_check(SMALL.replace(old, new))


def inode_position(*path: bytes) -> int:
    reader = ErofsReader(SMALL)
    nid: int | None = reader.root_nid
    for name in path:
        assert nid is not None
        nid = reader.lookup(nid, name)
    assert nid is not None
    return nid * 32


TOP, INNER, NULL, MANY, LINKED = (b"top",), (b"dirA",), (b"null",), (b"many",), (b"dirA", b"link")
EMPTY, CHUNK = (b"empty",), 64 + 20 + 4  # the chunk index in TOP's record, behind attributes and padding


@pytest.mark.parametrize(
    ("path", "field", "form", "value"),
    [(TOP, 0, "H", 0), (TOP, 2, "H", 1), (TOP, 2, "H", 0xFFFF), (TOP, 4, "H", 0o040644), (TOP, 6, "H", 1),
     (TOP, 8, "Q", 2**63), (TOP, 8, "Q", 3 * BLOCK), (TOP, 16, "I", 1), (TOP, 16, "I", 0xFFFFFFFE),
     (TOP, 24, "I", 2**32 - 1), (TOP, 40, "I", 10**9), (TOP, 44, "I", 3), (INNER, 44, "I", 3),
     (NULL, 44, "I", 0), (NULL, 8, "Q", 1), (MANY, 8, "Q", 12), (MANY, 8, "Q", 2**63),
     (MANY, 16, "I", 0xFFFF), (LINKED, 8, "Q", 4096),
     (TOP, 0, "H", 1), (TOP, 0, "H", 5), (TOP, 16, "I", 0x1F), (TOP, 16, "I", 0x3E), (TOP, 16, "I", 0x7F),
     (TOP, 16, "I", 0x1003F), (TOP, CHUNK, "H", 1), (TOP, CHUNK + 2, "H", 0), (TOP, CHUNK + 2, "H", 2),
     (TOP, CHUNK + 2, "H", 4), (TOP, CHUNK + 2, "H", 0xFFFF), (TOP, CHUNK + 4, "I", 2),
     (TOP, CHUNK + 4, "I", 0xFFFFFFFF), (EMPTY, 0, "H", 9), (EMPTY, 8, "Q", 1), (INNER, 0, "H", 9),
     (MANY, 0, "H", 9), (LINKED, 0, "H", 9), (NULL, 0, "H", 9)],
)  # fmt: skip
def test_check_finds_bad_inodes(path: tuple[bytes, ...], field: int, form: str, value: int) -> None:
    rejected_by_check(patched(inode_position(*path) + field, form, value))


def test_check_finds_cycles_and_wrong_parents() -> None:
    root, inner, many = (inode_position(*path) // 32 for path in ((), (b"dirA",), (b"many",)))
    # Every place that names one directory names another instead.
    for old, new in ((inner, root), (inner, many), (many, inner), (root, inner)):
        rejected_by_check(SMALL.replace(struct.pack("<Q", old), struct.pack("<Q", new)))


def test_check_bounds_its_own_work() -> None:
    """Directories that share their blocks, each large: refused after about one image's length."""
    children = {b"!%03d" % number: node(Kind.FIFO) for number in range(700)}
    root = directory({b"d%03d" % number: directory(dict(children)) for number in range(8)})
    for name, child in (root.children or {}).items():
        if name != b"d000":
            child.children = {b"!x": node(Kind.FIFO)}
    count_links(root)
    image = bytearray(write_erofs(root, ()))
    reader = ErofsReader(bytes(image))
    first = reader.lookup(reader.root_nid, b"d000")
    assert first is not None
    fields = image[first * 32 + 8 : first * 32 + 20]
    for name in list(root.children or {})[1:]:
        nid = reader.lookup(reader.root_nid, name)
        assert nid is not None
        image[nid * 32 + 8 : nid * 32 + 20] = fields
    rejected_by_check(bytes(image))
