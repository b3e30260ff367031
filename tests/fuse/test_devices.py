"""The layer devices through a real, detached FUSE mount."""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from lazyfs.errors import RemoteError
from lazyfs.fuse import wire
from lazyfs.fuse.device import Device
from lazyfs.fuse.devices import DeviceServer, node_of
from lazyfs.fuse.wire import answer_init
from lazyfs.system.detached import fuse_mount_detached

ROOT_A = "a1" * 32
ROOT_B = "b2" * 32
SIZE = 5 * 1024 * 1024 + 3 * 4096
CONTENT = random.Random(1).randbytes(SIZE)


class MemoryDevice:
    """Answers from `content`; the faults are switched on by tests."""

    def __init__(self, content_root: str, content: bytes) -> None:
        self.content_root = content_root
        self.size_bytes = len(content)
        self.content = content
        self.cached = True
        self.failure: Exception | None = None
        self.short = 0
        self.arrived = threading.Semaphore(0)  # one for each read
        self.gate = trio.Event()
        self.gate.set()

    def read_cached(self, address: int, size: int) -> bytes | None:
        self.arrived.release()
        if not self.cached:
            return None
        if self.failure is not None:
            raise self.failure
        return self.content[address : address + size - self.short]

    def wait_for(self, reads: int) -> None:
        for _ in range(reads):
            assert self.arrived.acquire(timeout=20)

    async def read(self, address: int, size: int) -> bytes:
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return self.content[address : address + size]


class Memory:
    def __init__(self, *devices: MemoryDevice) -> None:
        self.devices = devices

    def by_name(self, content_root: bytes) -> Device | None:
        return next((d for d in self.devices if d.content_root == content_root.decode()), None)

    def by_node(self, nodeid: int) -> Device | None:
        return next((d for d in self.devices if node_of(d.content_root) == nodeid), None)

    def names(self) -> Sequence[str]:
        return [device.content_root for device in self.devices]


class Connection:
    """A FUSE connection, mounted detached, that outlives its servers."""

    def __init__(self) -> None:
        self.fuse_fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self.mount_fd = fuse_mount_detached(self.fuse_fd)
        answer_init(self.fuse_fd)
        self.log: list[str] = []

    def path(self, name: str = "") -> str:
        return f"/proc/self/fd/{self.mount_fd}/{name}"

    def server(self, *devices: MemoryDevice, polling: bool = False, max_tasks: int = 4) -> DeviceServer:
        mount_fd = None if polling else self.mount_fd
        return DeviceServer(
            self.fuse_fd, Memory(*devices), mount_fd, max_tasks=max_tasks, log=self.log.append
        )

    def pread(self, name: str, size: int, offset: int, flags: int = 0) -> bytes:
        """Through a fresh descriptor, so that no page is left of an earlier read."""
        fd = os.open(self.path(name), os.O_RDONLY | flags)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(-1, -(-size // 4096) * 4096) as page_aligned:
                buffer = memoryview(page_aligned)[:size]
                try:
                    return bytes(buffer[: os.preadv(fd, [buffer], offset)])
                finally:
                    buffer.release()
        finally:
            os.close(fd)


@pytest.fixture
def connection() -> Iterator[Connection]:
    made = Connection()
    yield made
    os.close(made.mount_fd)
    os.close(made.fuse_fd)


@asynccontextmanager
async def serving(server: DeviceServer) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        yield
        with trio.fail_after(20):
            await server.drain()


@pytest.mark.parametrize("polling", [False, True])
@pytest.mark.parametrize("flags", [0, os.O_DIRECT])
@pytest.mark.parametrize("cached", [True, False])
async def test_every_byte_wherever_it_is_read(
    connection: Connection, polling: bool, flags: int, cached: bool
) -> None:
    device = MemoryDevice(ROOT_A, CONTENT)
    device.cached = cached
    places = [(0, SIZE), (SIZE - 4096, 4096), (4096, 1 << 20), (2 << 20, 3 << 20)]
    places += [(1, 10), (4095, 2), (SIZE - 5, 100), (SIZE, 4096), (SIZE + 12345, 10), (123457, 777777)]
    async with serving(connection.server(device, polling=polling)):
        for offset, size in places:
            got = await trio.to_thread.run_sync(connection.pread, ROOT_A, size, offset, flags)
            assert got == CONTENT[offset : offset + size], (offset, size)
    assert connection.log == []


async def test_devices_are_told_apart_and_listed(connection: Connection) -> None:
    device_a, device_b = MemoryDevice(ROOT_A, CONTENT), MemoryDevice(ROOT_B, CONTENT[4096:8192])
    async with serving(connection.server(device_a, device_b)):

        def look() -> None:
            assert sorted(os.listdir(connection.path())) == [ROOT_A, ROOT_B]
            assert os.stat(connection.path(ROOT_B)).st_size == 4096
            assert connection.pread(ROOT_B, 9999, 0) == CONTENT[4096:8192]
            for name in ("c3" * 32, ROOT_A.upper(), ROOT_A[:-1], "x", "n" * 255):
                with pytest.raises(FileNotFoundError):
                    os.stat(connection.path(name))
            with pytest.raises(OSError, match="Read-only"):
                os.open(connection.path("new"), os.O_CREAT | os.O_WRONLY)
            with pytest.raises(OSError, match="Read-only"):
                os.open(connection.path(ROOT_A), os.O_WRONLY)
            os.statvfs(connection.path())

        await trio.to_thread.run_sync(look)


async def test_hundreds_of_devices_are_listed(connection: Connection) -> None:
    devices = [MemoryDevice(f"{number:064x}"[::-1], b"") for number in range(300)]
    async with serving(connection.server(*devices)):
        names = await trio.to_thread.run_sync(os.listdir, connection.path())
    assert sorted(names) == sorted(device.content_root for device in devices)


async def test_two_roots_with_one_node_id_fail_closed(connection: Connection) -> None:
    twin = ROOT_A[:32] + "0" * 32
    async with serving(connection.server(MemoryDevice(ROOT_A, CONTENT), MemoryDevice(twin, CONTENT))):

        def look() -> None:
            with pytest.raises(OSError) as caught:
                connection.pread(twin, 10, 0)
            assert caught.value.errno == errno.EIO
            assert connection.pread(ROOT_A, 10, 0) == CONTENT[:10]

        await trio.to_thread.run_sync(look)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("failure", [RemoteError("no answer"), OSError(errno.EBADF, "disk"), KeyError("x")])
async def test_a_failure_is_eio_and_logged_once_and_heals(
    connection: Connection, cached: bool, failure: Exception
) -> None:
    device = MemoryDevice(ROOT_A, CONTENT)
    device.cached, device.failure = cached, failure
    async with serving(connection.server(device)):

        def look() -> None:
            for _ in range(3):
                with pytest.raises(OSError) as caught:
                    connection.pread(ROOT_A, 4096, 0, os.O_DIRECT)
                assert caught.value.errno == errno.EIO
            device.failure = None
            assert connection.pread(ROOT_A, 4096, 0, os.O_DIRECT) == CONTENT[:4096]

        await trio.to_thread.run_sync(look)
    assert len(connection.log) == 1


async def test_too_few_bytes_are_eio(connection: Connection) -> None:
    device = MemoryDevice(ROOT_A, CONTENT)
    device.short = 1
    async with serving(connection.server(device)):

        def look() -> None:
            with pytest.raises(OSError) as caught:
                connection.pread(ROOT_A, 4096, 0, os.O_DIRECT)
            assert caught.value.errno == errno.EIO

        await trio.to_thread.run_sync(look)
    assert "4095 bytes instead of 4096" in connection.log[0]


@pytest.mark.parametrize("polling", [False, True])
async def test_drain_answers_what_was_read_and_a_successor_the_rest(
    connection: Connection, polling: bool
) -> None:
    device = MemoryDevice(ROOT_A, CONTENT)
    device.cached = False
    device.gate = trio.Event()
    got: list[bytes] = []
    got_all = trio.Event()

    async def read(offset: int) -> None:
        got.append(await trio.to_thread.run_sync(connection.pread, ROOT_A, 4096, offset, os.O_DIRECT))
        if len(got) == 15:
            got_all.set()

    async with trio.open_nursery() as readers:
        first = connection.server(device, polling=polling)
        async with trio.open_nursery() as nursery:
            await nursery.start(first.run)
            for number in range(10):  # more than max_tasks: some wait for a task
                readers.start_soon(read, number * 4096)
            await trio.to_thread.run_sync(device.wait_for, 10)
            nursery.start_soon(first.drain)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert got == []
            device.gate.set()
        for number in range(10, 15):
            readers.start_soon(read, number * 4096)
        async with serving(connection.server(device, polling=polling)):
            with trio.fail_after(20):
                await got_all.wait()
    assert sorted(got) == sorted(CONTENT[n * 4096 : n * 4096 + 4096] for n in range(15))


async def test_what_a_drain_leaves_is_asked_for_again(connection: Connection) -> None:
    stuck, device = MemoryDevice(ROOT_A, CONTENT), MemoryDevice(ROOT_A, CONTENT)
    stuck.cached = False
    stuck.gate = trio.Event()
    got: list[bytes] = []
    got_it = trio.Event()

    async def read() -> None:
        got.append(await trio.to_thread.run_sync(connection.pread, ROOT_A, 4096, 8192, os.O_DIRECT))
        got_it.set()

    async with trio.open_nursery() as readers:
        first = connection.server(stuck)
        async with trio.open_nursery() as nursery:
            await nursery.start(first.run)
            readers.start_soon(read)
            await trio.to_thread.run_sync(stuck.wait_for, 1)
            with trio.fail_after(20):
                await first.drain(0)
        async with serving(connection.server(device)):
            with trio.fail_after(20):
                await got_it.wait()
    assert got == [CONTENT[8192 : 8192 + 4096]]


async def test_it_polls_after_the_mount_is_released_and_ends_with_it(connection: Connection) -> None:
    device = MemoryDevice(ROOT_A, CONTENT)
    server = connection.server(device)
    results: list[bool] = []
    ended = trio.Event()

    async def run(task_status: trio.TaskStatus[None]) -> None:
        results.append(await server.run(task_status))
        ended.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        fd = await trio.to_thread.run_sync(os.open, connection.path(ROOT_A), os.O_RDONLY)
        server.release_mount()
        null_fd = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null_fd, connection.mount_fd)  # closes the mount's last descriptor but for the open file
        os.close(null_fd)
        assert await trio.to_thread.run_sync(os.pread, fd, 100, 5000) == CONTENT[5000:5100]
        await trio.to_thread.run_sync(os.close, fd)
        with trio.fail_after(20):
            await ended.wait()
    assert results == [True]


def test_a_connection_is_refused_before_init() -> None:
    read_fd, write_fd = os.pipe()
    os.write(write_fd, wire.IN_HEADER.pack(40, wire.GETATTR, 2, 1, 0, 0, 0, 0))
    with pytest.raises(wire.WireError, match="before FUSE_INIT"):
        answer_init(read_fd)
    os.close(read_fd)
    os.close(write_fd)
