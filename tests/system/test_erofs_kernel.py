"""EROFS metadata before its real judges: fsck.erofs and the kernel.

The reference is not our own reader: the same tree is made with system calls in a directory of an ordinary
file system, and the mount must show the same, seen through the same system calls and getfacl.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import stat
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from lazyfs.core.erofs.reader import ErofsReader
from lazyfs.core.erofs.writer import Device, write_erofs
from lazyfs.core.tar.reader import Kind
from lazyfs.core.tar.tree import Node
from lazyfs.fuse.devices import DeviceServer
from lazyfs.fuse.wire import answer_init
from lazyfs.system import mountapi, syscalls
from lazyfs.system.detached import erofs_mount_detached, fuse_mount_detached

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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("devices"), 4)


@pytest.fixture(scope="module")
def tree(data: Data) -> Node:
    root = everything(data)
    count_links(root)
    return root


@pytest.fixture(scope="module")
def image(tree: Node, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "namespace.erofs"
    path.write_bytes(write_erofs(tree, data.devices()))
    return path


def fsck(image: Path, data: Data) -> subprocess.CompletedProcess[str]:
    devices = [f"--device={path}" for path in data.paths]
    return subprocess.run(["fsck.erofs", *devices, str(image)], capture_output=True, text=True, timeout=60)


def test_fsck_finds_no_errors(image: Path, data: Data) -> None:
    result = fsck(image, data)
    assert result.returncode == 0, result.stdout + result.stderr
    ErofsReader(image.read_bytes()).check()


def test_kernel_shows_what_an_unpacked_image_would(
    tree: Node, image: Path, data: Data, target: Path, tmp_path: Path
) -> None:
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    make(os.fsencode(unpacked), tree, data, {})
    with mounted(image, data, target):
        wanted, found = seen(unpacked), seen(target)
        assert found.keys() == wanted.keys()
        different = {path: (found[path], wanted[path]) for path in wanted if found[path] != wanted[path]}
        assert not different
        assert _getfacl(target) == _getfacl(unpacked)
        assert b"user:70000:r-x" in _getfacl(target)
        assert b"default:group:12:-wx" in _getfacl(target)
        for path, values in wanted.items():
            if stat.S_ISREG(values[0]) and path != b"large":  # type: ignore[arg-type]
                content = Path(os.fsdecode(os.path.join(os.fsencode(target), path))).read_bytes()
                assert content == Path(os.fsdecode(os.path.join(os.fsencode(unpacked), path))).read_bytes()
        assert os.statvfs(target).f_namemax == 255


def _getfacl(root: Path) -> bytes:
    command = ["getfacl", "--numeric", "--skip-base", "acl", "acldir", "acldir/in", "small", "xattrs"]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, timeout=60).stdout


def test_large_file_and_what_lies_behind_it(image: Path, data: Data, target: Path) -> None:
    with mounted(image, data, target), (target / "large").open("rb") as stream:
        for offset, content in {0: b"start\0", 2**32 - 3: b"\0over\0", 5 * 2**30 - 1: b"\0end"}.items():
            stream.seek(offset)
            assert stream.read(6)[: len(content)] == content
        assert stream.read() == b""
        assert (target / "behind").read_bytes() == b"behind it"


def test_devices_beyond_32_bits_of_blocks_together(target: Path, tmp_path: Path) -> None:
    """Three devices of 7 or 8 TiB, one of them full of one file: the largest that there is."""
    data = Data(tmp_path, 3)
    padding, size = 7 << 40, 1 << 43
    children = {}
    for number in (0, 2):
        data.file(number, padding, {})
        children[b"f%d" % number] = data.file(number, 3, {0: b"%d!\n" % number})
    children[b"f1"] = data.file(1, size, {0: b"start", size - 3: b"end"})
    root = directory(children)
    count_links(root)
    image = tmp_path / "image"
    image.write_bytes(write_erofs(root, data.devices()))
    assert fsck(image, data).returncode == 0
    with mounted(image, data, target):
        assert (target / "f0").read_bytes() == b"0!\n"
        assert (target / "f2").read_bytes() == b"2!\n"
        with (target / "f1").open("rb") as stream:
            assert stream.read(6) == b"start\0"
            assert stream.seek(-4, os.SEEK_END) == size - 4
            assert stream.read() == b"\0end"


class CountedDevice:
    """The only layer of a FUSE connection; remembers what is read."""

    content_root = "c0" * 32

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size_bytes = len(content)
        self.reads: list[tuple[int, int]] = []  # address, size

    def read_cached(self, address: int, size: int) -> bytes:
        self.reads.append((address, size))
        return self.content[address : address + size]

    async def read(self, address: int, size: int) -> bytes:
        raise AssertionError("everything is cached")

    def by_name(self, content_root: bytes) -> CountedDevice:
        return self

    def by_node(self, nodeid: int) -> CountedDevice:
        return self

    def names(self) -> list[str]:
        return [self.content_root]


RANGE_BYTES = 128 * 1024
# A process of its own: a page fault holds Python's global lock, which the FUSE server needs.
READ = {
    "read": "stream.seek(start); data = stream.read(size)",
    "mapped": "data = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)[start:start + size]",
}


@pytest.mark.parametrize("how", READ)
async def test_neighbouring_pages_become_one_read(target: Path, tmp_path: Path, how: str) -> None:
    """The reason for chunks: 32 pages read ahead are one request to the device or a few, not 32."""
    device = CountedDevice(random.Random(2).randbytes(3 << 20))
    start = device.size_bytes - RANGE_BYTES - 5 * BLOCK
    wanted = hashlib.sha256(device.content[start : start + RANGE_BYTES]).hexdigest()
    padding, size = BLOCK, start + RANGE_BYTES - BLOCK  # the file is not at the start of its device
    root = directory({b"file": file(size, address=padding, nlink=1)}, nlink=2)
    image = tmp_path / "image"
    image.write_bytes(write_erofs(root, [Device(device.content_root.encode(), device.size_bytes)]))
    program = (
        "import hashlib, mmap, sys; start, size = map(int, sys.argv[2:])\n"
        f"with open(sys.argv[1], 'rb', buffering=0) as stream: {READ[how]}\n"
        "print(hashlib.sha256(data).hexdigest())"
    )
    place = [str(target / "file"), str(start - padding), str(RANGE_BYTES)]
    command = ["/usr/bin/python3", "-c", program, *place]
    fuse_fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        fuse_mount_fd = fuse_mount_detached(fuse_fd)
        try:
            answer_init(fuse_fd)
            server = DeviceServer(fuse_fd, device, fuse_mount_fd)

            def look() -> str:
                path = f"/proc/self/fd/{fuse_mount_fd}/{device.content_root}"
                mount_fd = erofs_mount_detached(str(image), [path])
                try:
                    mountapi.move_mount(mount_fd, str(target))
                finally:
                    os.close(mount_fd)
                try:
                    assert device.reads == []
                    return subprocess.check_output(command, text=True, timeout=60)
                finally:
                    mountapi.umount2(str(target))

            async with trio.open_nursery() as nursery:
                await nursery.start(server.run)
                found = await trio.to_thread.run_sync(look)
                with trio.fail_after(20):
                    await server.drain()
        finally:
            os.close(fuse_mount_fd)
    finally:
        os.close(fuse_fd)
    assert found.strip() == wanted
    assert sum(length for _, length in device.reads) >= RANGE_BYTES
    # Linux 6.18: 1 and 3; with flat inodes 32 and 37.
    assert len(device.reads) < 12, device.reads


def test_attributes_larger_than_a_block(target: Path, tmp_path: Path) -> None:
    """ext4 has no room for these, other file systems do."""
    no_data = Data(tmp_path, 0)
    attributes = {b"user.a": b"a" * 60000, b"user.b": b"b" * 60000, b"user.c": b"c"}
    link = node(Kind.SYMLINK, target=b"t" * 4000, mode=0o777, xattrs={b"trusted.x": b"x" * 4010})
    root = directory(
        {
            b"file": file(xattrs=attributes),
            b"dir": directory({b"in": file()}, xattrs=attributes, nlink=2),
            b"link": link,
            # The attributes end exactly where the block does.
            b"edge": file(xattrs={b"user.e": b"e" * (BLOCK - 64 - 12 - 5)}),
        },
        xattrs=attributes,
        nlink=3,
    )
    image = tmp_path / "image"
    image.write_bytes(write_erofs(root, ()))
    assert fsck(image, no_data).returncode == 0
    with mounted(image, no_data, target):
        for path in (target, target / "file", target / "dir"):
            assert {os.fsencode(name): os.getxattr(path, name) for name in os.listxattr(path)} == attributes
        assert os.getxattr(target / "edge", "user.e") == b"e" * 4015
        assert os.getxattr(target / "link", "trusted.x", follow_symlinks=False) == b"x" * 4010
        assert os.readlink(target / "link") == "t" * 4000
        assert os.listdir(target / "dir") == ["in"]


def test_acl_is_enforced(image: Path, data: Data, target: Path) -> None:
    """User 70000 is let in by the ACL alone; user 70001 is not."""
    program = (
        "import os,sys; os.setgroups([]); os.setgid(70002); os.setuid(int(sys.argv[1])); open(sys.argv[2])"
    )
    with mounted(image, data, target):
        for user, code in (("70000", 0), ("70001", 1)):
            command = ["/usr/bin/python3", "-c", program, user, "acl"]
            assert subprocess.run(command, cwd=target, capture_output=True, timeout=60).returncode == code


def test_kernel_notices_a_damaged_superblock(image: Path, data: Data, target: Path, tmp_path: Path) -> None:
    damaged = bytearray(image.read_bytes())
    damaged[1024 + 50] ^= 1  # in the UUID: nothing but the checksum tells
    path = tmp_path / "damaged"
    path.write_bytes(damaged)
    with pytest.raises(syscalls.SyscallError) as caught, mounted(path, data, target):
        pass
    assert caught.value.errno == errno.EBADMSG
