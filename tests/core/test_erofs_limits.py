"""What EROFS or Linux cannot represent is left out, or refused with an ImageError."""

from __future__ import annotations

import struct

import pytest

from lazyfs.core.erofs.reader import ErofsReader
from lazyfs.core.erofs.writer import Device, write_erofs
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import Node
from lazyfs.errors import ImageError
from tests.core.namespaces import BLOCK, DEVICES, compare, directory, node


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
