"""A generated tree with every kind of inode, its data on local "devices", and a comparison with a mount."""

from __future__ import annotations

import os
import random
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lazyfs.core.erofs.format import TYPE_BITS
from lazyfs.core.erofs.writer import Device, write_erofs
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import Node

BLOCK_BYTES = 4096
HUGE_BYTES = (5 << 30) + 12345
MARKS = {0: b"first", (4 << 30) - 3: b"around 4 GiB", HUGE_BYTES - 4: b"last"}
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # capability.h, version 2, effective
NOBODY = 65534


def acl(user: int) -> bytes:
    """user::rw- user:USER:r-- group::--- mask::r-- other::--- (posix_acl_xattr.h)"""
    nobody = 0xFFFFFFFF
    entries = [(1, 6, nobody), (2, 4, user), (4, 0, nobody), (0x10, 4, nobody), (0x20, 0, nobody)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


class TreeBuilder:
    """Collects nodes and writes their data to `directory`/data-N; `finish` writes namespace.erofs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.root = directory_node(0o755)
        self._files = [os.open(directory / f"data-{number}", os.O_RDWR | os.O_CREAT) for number in (0, 1)]
        self._ends = [0, 0]

    def file(self, content: bytes, layer: int = 0, **fields: Any) -> Node:
        node = Node(Kind.FILE, fields.pop("mode", 0o644), 0, 0, 0, 0, size=len(content))
        if content:
            self._place(node, layer)
            assert os.pwrite(self._files[layer], content, node.address) == len(content)
        for name, value in fields.items():
            setattr(node, name, value)
        return node

    def huge(self) -> Node:
        node = Node(Kind.FILE, 0o644, 0, 0, 0, 0, size=HUGE_BYTES)
        self._place(node, 0)
        for offset, text in MARKS.items():
            os.pwrite(self._files[0], text, node.address + offset)
        return node

    def _place(self, node: Node, layer: int) -> None:
        node.layer, node.address = layer, self._ends[layer]
        self._ends[layer] += -(-node.size // BLOCK_BYTES) * BLOCK_BYTES

    def finish(self) -> Path:
        count_links(self.root)
        devices = []
        for number, (fd, end) in enumerate(zip(self._files, self._ends, strict=True)):
            size_bytes = max(end, BLOCK_BYTES)
            os.truncate(fd, size_bytes)
            os.close(fd)
            devices.append(Device(b"%064x" % number, size_bytes))
        (self.directory / "namespace.erofs").write_bytes(write_erofs(self.root, devices))
        return self.directory


def directory_node(mode: int = 0o755) -> Node:
    return Node(Kind.DIR, mode, 0, 0, 0, 0, children={})


def count_links(root: Node) -> None:
    for _, node in walk(root):
        node.nlink = 0
    for _, node in walk(root):
        if node.children is None:
            node.nlink += 1
        else:
            node.nlink = 2 + sum(child.children is not None for child in node.children.values())


def walk(root: Node, path: bytes = b"") -> Iterator[tuple[bytes, Node]]:
    yield path, root
    for name, child in (root.children or {}).items():
        yield from walk(child, os.path.join(path, name))


def every_kind(builder: TreeBuilder, seed: int = 1) -> Node:
    """Fills the builder's root."""
    rng = random.Random(seed)
    root = builder.root
    assert root.children is not None
    root.mtime_s, root.mtime_ns, root.xattrs = -1, 999_999_999, {b"user.on-root": b"1"}
    linked = builder.file(b"hard link" * 1000, mode=0o600)
    deep = directory_node(0o1777)
    root.children.update({
        b"empty": builder.file(b""),
        b"one": builder.file(b"1", mtime_s=-(1 << 33), mtime_ns=1),  # the year 1697
        b"late": builder.file(b"2", mtime_s=1 << 33, mtime_ns=123_456_789, uid=4294967294, gid=3_000_000_000),
        b"setuid": builder.file(b"#!", mode=0o6755, xattrs={b"security.capability": CAPABILITY}),
        b"link-a": linked,
        b"symlink": Node(Kind.SYMLINK, 0o777, 7, 8, 9, 10, size=5, target=b"../\xff\xfe"),
        b"long-symlink": Node(Kind.SYMLINK, 0o777, 0, 0, 0, 0, size=4095, target=b"x/" * 2047 + b"y"),
        b"fifo": Node(Kind.FIFO, 0o640, 0, 0, 0, 0),
        b"whiteout": Node(Kind.CHR, 0o600, 0, 0, 0, 0),
        b"chr": Node(Kind.CHR, 0o620, 0, 5, 0, 0, rdev_major=4, rdev_minor=64),
        b"blk": Node(Kind.BLK, 0o660, 0, 6, 0, 0, rdev_major=259, rdev_minor=70000),
        b"deep": deep,
        b"\xff\x80not utf-8\n": builder.file(b"name", layer=1),
        b"n" * 255: builder.file(b"long name", layer=1),
        b"xattrs": builder.file(b"x", xattrs={
            b"user.a": b"", b"user.b": bytes(range(256)), b"trusted.t": b"secret", b"user.big": bytes(2000)}),
        b"acl": builder.file(b"shared", mode=0o640, xattrs={b"system.posix_acl_access": acl(NOBODY)}),
        b"huge": builder.huge(),
    })
    assert deep.children is not None
    deep.children[b"link-b"] = linked
    for number in range(3000):
        deep.children[b"entry-%d" % number] = builder.file(b"%d" % number if number % 50 == 0 else b"")
    below = deep
    for level in range(30):
        inner = directory_node(0o755)
        assert below.children is not None
        below.children[b"level %d" % level] = inner
        below = inner
    sizes = (4095, 4096, 4097, 65536, 131072, 131073, 1 << 20, (1 << 20) + 1, (3 << 20) + 17)
    for number, size in enumerate(sizes):
        content = rng.randbytes(size)
        node = builder.file(content, layer=number % 2, mtime_s=number, uid=number)
        root.children[b"sized-%d" % size] = node
    return root


def differences(target: Path, root: Node, directory: Path) -> list[str]:
    """What distinguishes the mount at `target` from the tree: lstat, listing, links, attributes, content."""
    found: list[str] = []
    inodes: dict[int, int] = {}
    data = [os.open(directory / f"data-{number}", os.O_RDONLY) for number in range(2)]
    try:
        for path, node in walk(root):
            place = os.path.join(os.fsencode(target), path)
            for what, have, want in _facts(place, node, data):
                if have != want:
                    found.append(f"{path!r}: {what} is {have!r:.200}, not {want!r:.200}")
            number = os.lstat(place).st_ino
            if inodes.setdefault(id(node), number) != number:
                found.append(f"{path!r}: hard links have different inodes")
        if len(set(inodes.values())) != len(inodes):
            found.append("different files share an inode number")
    finally:
        for fd in data:
            os.close(fd)
    return found


def _facts(place: bytes, node: Node, data: list[int]) -> Iterator[tuple[str, object, object]]:
    status = os.lstat(place)
    yield "mode", status.st_mode, TYPE_BITS[node.kind] | node.mode
    yield "owner", (status.st_uid, status.st_gid), (node.uid, node.gid)
    yield "nlink", status.st_nlink, node.nlink
    mtime_ns = node.mtime_s * 10**9 + node.mtime_ns
    yield "times", (status.st_mtime_ns, status.st_ctime_ns, status.st_atime_ns), (mtime_ns,) * 3
    yield "rdev", status.st_rdev, os.makedev(node.rdev_major, node.rdev_minor)
    yield "blocks", status.st_blocks, -(-status.st_size // BLOCK_BYTES) * 8
    names = os.listxattr(place, follow_symlinks=False)
    yield "attributes", {
        os.fsencode(name): os.getxattr(place, name, follow_symlinks=False) for name in names
    }, node.xattrs
    if node.children is not None:
        with os.scandir(place) as entries:
            kinds = {entry.name: (entry.inode(), stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode))
                     for entry in entries}
        yield "names", set(kinds), set(node.children)
        for name, child in node.children.items():
            want = (os.lstat(os.path.join(place, name)).st_ino, TYPE_BITS[child.kind])
            yield f"entry {name!r}", kinds.get(name), want
    elif node.kind == Kind.SYMLINK:
        yield "target", os.readlink(place), node.target
        yield "size", status.st_size, len(node.target)
    elif node.kind == Kind.FILE:
        yield "size", status.st_size, node.size
        if node.size < HUGE_BYTES:
            content = os.pread(data[node.layer], node.size, node.address) if node.size else b""
            yield "content", Path(os.fsdecode(place)).read_bytes(), content


def small_image(tmp_path: Path, files: int = 3) -> Path:
    """near: in layer 0, always there; far-0, far-1, ...: in layer 1, which can be disturbed."""
    builder = TreeBuilder(tmp_path / "image")
    assert builder.root.children is not None
    builder.root.children[b"near"] = builder.file(b"near" * 5000)
    for number in range(files):
        builder.root.children[b"far-%d" % number] = builder.file(b"%06d" % number * 2000, layer=1)
    return builder.finish()
