"""EROFS metadata before its real judges: fsck.erofs and the kernel.

The reference is not our own reader: the same tree is made with system calls in a directory of an ordinary
file system, and the mount must show the same, seen through the same system calls and getfacl.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from pathlib import Path

import pytest

from lazyfs.core.erofs.reader import ErofsReader
from lazyfs.core.erofs.writer import write_erofs
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import Node
from lazyfs.system import syscalls
from tests.system.kerneltrees import BLOCK, Data, count_links, directory, everything, file, make, mounted, node, seen


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
