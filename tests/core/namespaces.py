"""Trees of nodes, drawn and small, and the comparison of one with what a reader finds in EROFS metadata."""

from __future__ import annotations

import stat
from collections.abc import Iterator

from hypothesis import strategies as st

from lazyfs.core.erofs.reader import ErofsReader, Inode
from lazyfs.core.erofs.writer import Device
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import Node

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


def small_tree() -> Node:
    shared = node(Kind.FILE, size=5000, layer=0, address=BLOCK, nlink=2, xattrs={b"user.k": b"v"})
    inner = directory({b"hard": shared, b"link": node(Kind.SYMLINK, target=b"../top", mode=0o777)})
    many = directory({b"n%04d" % number: node(Kind.FIFO) for number in range(600)})
    null = node(Kind.CHR, rdev_major=1, rdev_minor=3)
    return directory(
        {b"top": shared, b"dirA": inner, b"many": many, b"null": null, b"empty": node(Kind.FILE)}
    )
