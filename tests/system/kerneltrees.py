"""A tree of everything an image can hold: as nodes, as a directory made by system calls, and what both show."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazyfs.core.erofs.writer import Device
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import Node
from lazyfs.system import mountapi

BLOCK = 4096
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # VFS_CAP_REVISION_2, cap_net_raw=ep
NO_ID = 0xFFFFFFFF


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


ACL = acl((1, 7, NO_ID), (2, 5, 70000), (4, 5, NO_ID), (8, 3, 12), (16, 5, NO_ID), (32, 0, NO_ID))
XATTRS = {
    b"user.empty": b"",
    b"user.\xff\xfe": b"not text \0\xff",
    b"trusted.t": b"x" * 1000,
    b"security.capability": CAPABILITY,
}


def node(kind: Kind, **fields: object) -> Node:
    values: dict[str, object] = {"mode": 0o644, "uid": 0, "gid": 0, "mtime_s": 1, "mtime_ns": 2, **fields}
    return Node(kind, **values)  # type: ignore[arg-type]


def directory(children: dict[bytes, Node], **fields: object) -> Node:
    return node(Kind.DIR, **{"mode": 0o755, "children": children, **fields})


def file(size: int = 0, **fields: object) -> Node:
    return node(Kind.FILE, **{"size": size, "layer": 0 if size else -1, **fields})


class Data:
    """Device files, and the places given out in them."""

    def __init__(self, base: Path, count: int) -> None:
        self.paths = [base / f"device{number}" for number in range(count)]
        self._ends = [0] * count
        for path in self.paths:
            path.touch()

    def file(self, device: int, size: int, pieces: dict[int, bytes], **fields: object) -> Node:
        """A file of `size` bytes, sparse but for `pieces` (offset: bytes)."""
        address = self._ends[device]
        self._ends[device] += -(-size // BLOCK) * BLOCK
        with self.paths[device].open("r+b") as stream:
            stream.truncate(self._ends[device])
            for offset, content in pieces.items():
                stream.seek(address + offset)
                stream.write(content)
        return node(Kind.FILE, size=size, layer=device, address=address, **fields)

    def devices(self) -> list[Device]:
        return [Device(b"%064d" % number, end) for number, end in enumerate(self._ends)]


def count_links(root: Node) -> None:
    found = [root]
    for parent in found:
        found.extend((parent.children or {}).values())
    for one in found:
        one.nlink = 2 if one.kind == Kind.DIR else found.count(one)
    for parent in found:
        parent.nlink += sum(child.kind == Kind.DIR for child in (parent.children or {}).values())


def everything(data: Data) -> Node:
    """A tree with each feature that a container image may have."""
    shared = data.file(0, 6, {0: b"shared"}, nlink=3, xattrs={b"user.s": b"1"})
    long_names = {bytes([65 + number]) * 255: file(mode=number) for number in range(40)}
    odd_names = [b"\xff\xfe\x80", b"-", b"!", b" ", b"\n", b"...", b".a", b"\\", "ä☃".encode(), b"\x01"]
    return directory(
        {
            b"empty": file(),
            b"small": data.file(0, 10, {0: b"0123456789"}, mode=0o4755, uid=70000, gid=2**32 - 2),
            b"other": data.file(1, 5000, {0: b"a" * 5000}, mode=0o2711, uid=65536),
            b"third": data.file(2, BLOCK, {0: b"b" * BLOCK}, mode=0),
            b"hard1": shared,
            b"sub": directory({b"hard2": shared, b"deep": directory({b"hard3": shared})}, mode=0o1777),
            b"large": data.file(1, 5 * 2**30 + 3, {0: b"start", 2**32 - 2: b"over", 5 * 2**30: b"end"}),
            b"behind": data.file(1, 9, {0: b"behind it"}),
            b"old": file(mtime_s=-1_000_000_000, mtime_ns=999_999_999),
            b"before": file(mtime_s=-1, mtime_ns=1),
            b"late": file(mtime_s=2**33, mtime_ns=123_456_789),
            b"zero": node(Kind.CHR, rdev_major=0, rdev_minor=0),
            b"null": node(Kind.CHR, rdev_major=1, rdev_minor=3, mode=0o666),
            b"disk": node(Kind.BLK, rdev_major=4095, rdev_minor=2**20 - 1),
            b"disk2": node(Kind.BLK, rdev_major=259, rdev_minor=70000),
            b"fifo": node(Kind.FIFO, mode=0o600, xattrs={b"trusted.f": b"f"}),
            b"short": node(Kind.SYMLINK, target=b"x", mode=0o777),
            b"4032": node(Kind.SYMLINK, target=b"y" * 4032, mode=0o777),
            b"4033": node(Kind.SYMLINK, target=b"w" * 4033, mode=0o777),
            b"4095": node(Kind.SYMLINK, target=b"/z" * 2047 + b"z", mode=0o777, uid=5),
            b"linkx": node(Kind.SYMLINK, target=b"v" * 3000, mode=0o777, xattrs={b"trusted.l": b"l" * 1200}),
            b"xattrs": file(xattrs=XATTRS),
            b"acl": data.file(0, 3, {0: b"acl"}, mode=0o750, xattrs={b"system.posix_acl_access": ACL}),
            b"acldir": directory(
                {b"in": file()},
                mode=0o750,
                xattrs={b"system.posix_acl_access": ACL, b"system.posix_acl_default": ACL, b"user.d": b"d"},
            ),
            b"many": directory({b"%d" % number: file(uid=number) for number in range(5000)}),
            b"subdirs": directory({b"d%d" % number: directory({}) for number in range(300)}),
            b"longnames": directory(long_names, xattrs={b"user.big": b"B" * 2000}),
            b"oddnames": directory({name: file() for name in odd_names}),
            **{b"x" * 255: file()},
        },
        uid=1,
        gid=2,
        mode=0o711,
        mtime_s=77,
    )


def make(path: bytes, wanted: Node, data: Data, made: dict[Node, bytes]) -> None:
    """The node by system calls, as an unpacker would: owner, mode, attributes, time last."""
    if wanted in made:
        os.link(made[wanted], path, follow_symlinks=False)
        return
    made[wanted] = path
    kind = wanted.kind
    if kind == Kind.DIR:
        if not os.path.isdir(path):
            os.mkdir(path)
        for name, child in (wanted.children or {}).items():
            make(os.path.join(path, name), child, data, made)
    elif kind == Kind.SYMLINK:
        os.symlink(wanted.target, path)
    elif kind == Kind.FILE:
        with open(path, "wb") as stream:
            os.truncate(stream.fileno(), wanted.size)
            # The large one stays sparse: content is compared against the device file instead.
            if 0 < wanted.size < 2**20:
                with data.paths[wanted.layer].open("rb") as device:
                    device.seek(wanted.address)
                    stream.write(device.read(wanted.size))
    else:
        types = {Kind.CHR: stat.S_IFCHR, Kind.BLK: stat.S_IFBLK, Kind.FIFO: stat.S_IFIFO}
        os.mknod(path, types[kind] | 0o600, os.makedev(wanted.rdev_major, wanted.rdev_minor))
    os.lchown(path, wanted.uid, wanted.gid)
    if kind != Kind.SYMLINK:
        os.chmod(path, wanted.mode)
    for name, value in wanted.xattrs.items():
        os.setxattr(path, name, value, follow_symlinks=False)
    time_ns = wanted.mtime_s * 10**9 + wanted.mtime_ns
    os.utime(path, ns=(time_ns, time_ns), follow_symlinks=False)


Seen = dict[bytes, tuple[object, ...]]


def seen(root: Path) -> Seen:
    """What lstat, readlink, readdir and listxattr say, by path; of inode numbers, which names share one."""
    found: Seen = {}
    names: dict[int, list[bytes]] = {}
    pending = [b""]
    base = os.fsencode(root)
    while pending:
        path = pending.pop()
        full = os.path.join(base, path) if path else base
        info = os.lstat(full)
        kind = stat.S_IFMT(info.st_mode)
        special = kind in (stat.S_IFCHR, stat.S_IFBLK)
        size = 0 if kind == stat.S_IFDIR else info.st_size
        xattrs = {name: os.getxattr(full, name, follow_symlinks=False) for name in _listxattr(full)}
        found[path] = (
            info.st_mode, info.st_uid, info.st_gid, info.st_nlink, info.st_mtime_ns, size,
            info.st_rdev if special else 0,
            os.readlink(full) if kind == stat.S_IFLNK else b"",
            xattrs,
        )  # fmt: skip
        names.setdefault(info.st_ino, []).append(path)
        if kind == stat.S_IFDIR:
            with os.scandir(full) as entries:
                for entry in entries:
                    child = os.path.join(path, entry.name)
                    assert entry.inode() == os.lstat(entry.path).st_ino
                    assert entry.is_dir(follow_symlinks=False) == os.path.isdir(entry.path)
                    pending.append(child)
    for group in names.values():
        for path in group:
            found[path] += (sorted(group),)
    return found


def _listxattr(path: bytes) -> list[str]:
    return sorted(name for name in os.listxattr(path, follow_symlinks=False) if name != "security.selinux")


@contextmanager
def mounted(image: Path, data: Data, target: Path) -> Iterator[None]:
    context = mountapi.fsopen("erofs")
    try:
        mountapi.fsconfig_string(context, "source", str(image))
        for path in data.paths:
            mountapi.fsconfig_string(context, "device", str(path))
        mountapi.fsconfig_flag(context, "ro")
        mountapi.fsconfig_create(context)
        mount = mountapi.fsmount(context)
    finally:
        os.close(context)
    try:
        mountapi.move_mount(mount, str(target))
    finally:
        os.close(mount)
    try:
        yield
    finally:
        mountapi.umount2(str(target))
