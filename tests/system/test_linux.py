"""Mount system calls, on the real kernel."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.erofs.writer import Device, write_erofs
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import Node
from lazyfs.errors import HostError
from lazyfs.system import detached, mountapi, mountinfo, sockets, syscalls

CONTENT = bytes(range(256)) * 64
ROOT = Path(__file__).resolve().parents[2]


def _node(kind: Kind, mode: int) -> Node:
    return Node(kind=kind, mode=mode, uid=0, gid=0, mtime_s=0, mtime_ns=0)


@pytest.fixture
def image(tmp_path: Path) -> tuple[str, list[str]]:
    """EROFS metadata over two devices, each with one file of CONTENT; and a device node."""
    root = _node(Kind.DIR, 0o755)
    root.nlink = 2
    root.children = {}
    for layer in (0, 1):
        file = _node(Kind.FILE, 0o644)
        file.size, file.layer = len(CONTENT), layer
        root.children[b"file%d" % layer] = file
        (tmp_path / f"data{layer}").write_bytes(CONTENT)
    null = _node(Kind.CHR, 0o666)
    null.rdev_major, null.rdev_minor = 1, 3
    root.children[b"null"] = null
    devices = [Device(b"%064d" % layer, len(CONTENT)) for layer in (0, 1)]
    (tmp_path / "meta").write_bytes(write_erofs(root, devices))
    return str(tmp_path / "meta"), [str(tmp_path / "data0"), str(tmp_path / "data1")]


@pytest.fixture
def mount_fd(image: tuple[str, list[str]]) -> Iterator[int]:
    fd = detached.erofs_mount_detached(*image)
    yield fd
    os.close(fd)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "mount point\\").mkdir()
    path = str(tmp_path / "mount point\\")
    yield path
    while mountinfo.mount_at(path):
        mountapi.umount2(path, mountapi.MNT_DETACH)


def _path(fd: int, name: str = "") -> str:
    return f"/proc/self/fd/{fd}/{name}"


def _content(fd: int, name: str = "file0") -> bytes:
    return Path(_path(fd, name)).read_bytes()


@pytest.mark.parametrize("directio", [True, False])
def test_erofs_is_mounted_attached_nowhere(image: tuple[str, list[str]], directio: bool) -> None:
    before = {entry.mount_id for entry in mountinfo.mounts()}
    fd = detached.erofs_mount_detached(*image, directio=directio)
    try:
        assert sorted(os.listdir(_path(fd))) == ["file0", "file1", "null"]
        assert _content(fd, "file0") == _content(fd, "file1") == CONTENT
        assert {entry.mount_id for entry in mountinfo.mounts()} == before
        assert fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    finally:
        os.close(fd)


def _may_open_device(fd: int) -> bool:
    try:
        os.close(os.open(_path(fd, "null"), os.O_RDONLY))
    except PermissionError:
        return False
    return True


def test_clones_share_the_superblock_and_have_their_own_attributes(mount_fd: int) -> None:
    fd = detached.clone_mount(mount_fd, mountapi.MOUNT_RDONLY)
    again_fd = detached.clone_mount(fd)
    try:
        assert os.fstat(fd).st_dev == os.fstat(again_fd).st_dev == os.fstat(mount_fd).st_dev
        assert not _may_open_device(mount_fd)
        assert _may_open_device(fd)
        assert not _may_open_device(again_fd)
    finally:
        os.close(fd)
        os.close(again_fd)


def test_old_kernels_clone_in_a_hidden_namespace(mount_fd: int) -> None:
    """What kernels before 6.15 need, any number of times, without a trace in our own mount table."""
    before = {entry.mount_id for entry in mountinfo.mounts()}
    clones = [detached._clone_hidden(mount_fd) for _ in range(3)]
    clones.append(detached._clone_hidden(clones[0]))
    assert all(_content(fd) == CONTENT for fd in (mount_fd, *clones))
    assert {entry.mount_id for entry in mountinfo.mounts()} == before
    assert fcntl.fcntl(mount_fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    for fd in clones:
        os.close(fd)


@pytest.mark.parametrize("by_descriptor", [True, False])
def test_attach(mount_fd: int, target: str, by_descriptor: bool) -> None:
    fd = detached.clone_mount(mount_fd)
    if by_descriptor:
        target_fd = os.open(target, os.O_PATH)
        detached.attach(fd, target_fd)
        os.close(target_fd)
    else:
        detached.attach(fd, target)
    entry = mountinfo.mount_at(target)
    assert entry is not None
    assert (entry.fstype, entry.mountpoint, entry.root) == ("erofs", target, "/")
    assert {"ro", "nodev", "nosuid"} <= set(entry.options)
    assert entry.dev == (os.major(os.stat(target).st_dev), os.minor(os.stat(target).st_dev))
    with pytest.raises(syscalls.SyscallError) as caught:
        mountapi.umount2(target)
    assert caught.value.errno == errno.EBUSY  # our descriptor
    attached_clone_fd = detached.clone_mount(fd)
    os.close(fd)
    mountapi.umount2(target)
    assert mountinfo.mount_at(target) is None
    assert _content(attached_clone_fd) == CONTENT
    os.close(attached_clone_fd)


@pytest.mark.parametrize("hidden", [False, True])
def test_overlay_on_a_detached_mount(mount_fd: int, target: str, tmp_path: Path, hidden: bool) -> None:
    upper, work = tmp_path / "upper:, \\x", tmp_path / "work"
    if hidden:
        upper = tmp_path / "upper"
    upper.mkdir()
    work.mkdir()
    make = detached._overlay_hidden if hidden else detached.overlay_mount_detached
    fd = make(mount_fd, str(upper), str(work), ("metacopy=on",), mountapi.MOUNT_NODEV)
    assert _content(fd) == CONTENT
    Path(_path(fd, "new")).write_bytes(b"new")
    Path(_path(fd, "file0")).chmod(0o600)
    os.unlink(_path(fd, "file1"))
    assert (upper / "new").read_bytes() == b"new"
    assert os.getxattr(upper / "file0", "trusted.overlay.metacopy") is not None
    detached.attach(fd, target)
    os.close(fd)
    assert sorted(os.listdir(target)) == ["file0", "new", "null"]
    mountapi.umount2(target)
    # the lower mount is still usable
    again_fd = detached.overlay_mount_detached(mount_fd, str(upper), str(work))
    os.close(again_fd)


def test_errors_carry_the_kernels_words_and_errno(
    mount_fd: int, image: tuple[str, list[str]], tmp_path: Path
) -> None:
    with pytest.raises(syscalls.SyscallError, match="Unknown parameter 'nonsense'") as caught:
        detached.overlay_mount_detached(mount_fd, str(tmp_path), str(tmp_path), ["nonsense=on"])
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(syscalls.SyscallError, match="missing") as caught:
        detached.overlay_mount_detached(mount_fd, str(tmp_path / "missing"), str(tmp_path))
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(syscalls.SyscallError) as caught:
        detached.erofs_mount_detached(image[0], image[1][:1])
    assert caught.value.hint
    with pytest.raises(syscalls.SyscallError) as caught:
        detached.attach(mount_fd, str(tmp_path / "missing"))
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(syscalls.SyscallError, match="nosuchfs") as caught:
        mountapi.fsopen("nosuchfs")
    assert caught.value.errno == errno.ENODEV
    with pytest.raises(ValueError, match="0x100000"):
        mountapi.mount_setattr(mount_fd, 0x100000)


def test_openat2_stays_in_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").write_text("inside")
    (root / "absolute").symlink_to("/etc/passwd")
    (root / "up").symlink_to("../../../../../etc/passwd")
    (root / "loop").symlink_to("loop")
    (root / "magic").symlink_to("/proc/self/root")
    root_fd = os.open(root, os.O_PATH)
    for name in ("absolute", "up", "../../etc/passwd", "/etc/passwd"):
        fd = syscalls.openat2_in_root(root_fd, name, os.O_RDONLY)
        assert os.read(fd, 100) == b"inside"
        os.close(fd)
    for name, number in (("loop", errno.ELOOP), ("magic", errno.ENOENT), ("none", errno.ENOENT)):
        with pytest.raises(syscalls.SyscallError) as caught:
            syscalls.openat2_in_root(root_fd, name, os.O_RDONLY)
        assert caught.value.errno == number
    os.close(root_fd)


def test_descriptors_travel_with_all_of_the_data() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        read_fd, write_fd = os.pipe()
        sockets.send_fds(ours, b"hello", [read_fd, write_fd])
        os.close(read_fd)
        data, fds = sockets.recv_fds(theirs, 100, 2)
        assert data == b"hello"
        os.write(fds[1], b"x")
        assert os.read(fds[0], 1) == b"x"
        assert all(fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC for fd in fds)
        sockets.send_fds(ours, b"many", [fds[0]] * 30)
        with pytest.raises(HostError):
            sockets.recv_fds(theirs, 100, 2)
        sockets.send_fds(ours, b"none", [])
        assert sockets.recv_fds(theirs, 100, 2) == (b"none", [])
        ours.close()
        assert sockets.recv_fds(theirs, 100, 2) == (b"", [])
        for fd in (write_fd, *fds):
            os.close(fd)


def test_mountinfo_line() -> None:
    line = rb"36 35 98:0 /mnt1 /a\040b\134\011c rw,noatime master:1 x:2 - ext3 /dev/a\043 rw,errors=continue"
    entry = mountinfo.parse_line(line)
    assert entry is not None
    assert (entry.mount_id, entry.parent_id, entry.dev) == (36, 35, (98, 0))
    assert (entry.root, entry.mountpoint) == ("/mnt1", "/a b\\\tc")
    assert (entry.fstype, entry.source) == ("ext3", "/dev/a#")
    assert entry.options == ("rw", "noatime")
    assert entry.super_options == ("rw", "errors=continue")


@given(st.binary(max_size=200))
def test_mountinfo_takes_any_bytes(line: bytes) -> None:
    mountinfo.parse_line(line)
    mountinfo.parse_line(b"36 35 98:0 / " + line.replace(b" ", b"_") + b" rw - ext3 " + line + b" rw")


@given(st.binary(min_size=1, max_size=50).filter(lambda name: b"\0" not in name))
def test_mountinfo_unescapes_what_the_kernel_escapes(name: bytes) -> None:
    escaped = b"".join(b"\\%03o" % c if c in b" \t\n\\#" else bytes([c]) for c in name)
    entry = mountinfo.parse_line(b"1 2 0:3 / " + escaped + b" rw - erofs none rw")
    assert entry is not None
    assert os.fsencode(entry.mountpoint) == name


def test_the_light_client_gets_no_heavy_imports() -> None:
    program = (
        "import sys, lazyfs.system.mountapi, lazyfs.system.detached, lazyfs.system.mountinfo;"
        "print([m for m in ('trio', 'json', 'dataclasses', 'socket', 'threading', 'subprocess', 'inspect')"
        " if m in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
