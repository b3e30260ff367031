"""EROFS over data devices, as the kernel reads them: beyond 32 bits of blocks, and many pages at a time."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from pathlib import Path

import pytest
import trio

from lazyfs.core.erofs.writer import Device, write_erofs
from lazyfs.fuse.devices import DeviceServer
from lazyfs.fuse.wire import answer_init
from lazyfs.system import mountapi
from lazyfs.system.detached import erofs_mount_detached, fuse_mount_detached
from tests.system.kerneltrees import BLOCK, Data, count_links, directory, file, mounted
from tests.system.test_erofs_kernel import fsck


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
