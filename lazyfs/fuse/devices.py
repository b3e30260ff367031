"""The layer devices as a flat FUSE directory: one read-only file per layer, named by its content root.

Stateless: a node id follows from the content root, and OPEN is answered "not needed". So any process that holds
the connection's descriptor can go on where another one died: FUSE_NOTIFY_RESEND makes the kernel repeat requests
that were read and not answered, and answering one twice is harmless.

One read: a reader thread takes the request from the kernel and answers at once if all its blocks are cached. If
not, a trio task fetches and answers. An answer is never short before the end of the device: the bytes, or EIO.

Readers block in read(2): polling first makes a 4 KiB read slower (29 for 23 us). There are two, so that a slow
cache lookup does not hold up the other reads; a third makes both slower. Rejected (docs/MEASUREMENTS.md, "fuse"):

- splice gains little, needs a pipe that holds request and header (an unprivileged pipe holds 1 MiB at most), and
  would send bytes other than those that were verified.
- mmap gains as little, and if a process is killed in a page fault within writev(2), the kernel ends that request
  with EIO; with bytes in memory it is repeated.
- FUSE_DEV_IOC_CLONE: requests read through a clone die with its last descriptor, and so with the process.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from lazyfs.errors import HostError
from lazyfs.fuse import wire
from lazyfs.fuse.device import Device
from lazyfs.fuse.repeats import RepeatFilter

READERS = 2
MAX_TASKS = wire.MAX_BACKGROUND  # fetches in flight at a time; further ones are queued
NAME_CHARACTERS = 64  # sha256 in hex
_NODE_BIT = 1 << 60
_HEX = frozenset(b"0123456789abcdef")
_LOG_PAUSE_S = 10.0  # the same failure is logged once in this time

_READ, _LOOKUP, _GETATTR = wire.READ, wire.LOOKUP, wire.GETATTR
_UNANSWERED = frozenset((wire.FORGET, wire.BATCH_FORGET, wire.INTERRUPT))  # the kernel takes no answer to these


class Devices(Protocol):
    """All layers. Called in reader threads: may read the disk, not the network."""

    def by_name(self, content_root: bytes) -> Device | None:
        """`content_root`: 64 lower-case hex digits."""

    def by_node(self, nodeid: int) -> Device | None:
        """The device whose `node_of` this is. After a restart it must find every device that is mounted."""

    def names(self) -> Sequence[str]: ...


def node_of(content_root: str | bytes) -> int:
    """The node id of a layer: the first 60 bits of its content root, and bit 60, so that it is never 0 or 1."""
    return int(content_root[:15], 16) | _NODE_BIT


def _generation(content_root: str) -> int:
    """The next 60 bits: by them the kernel tells two devices of one node id apart."""
    return int(content_root[15:30], 16)


def _log_to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class DeviceServer:
    """Answers the requests of one FUSE connection. `run` it once; `stop` or `drain` end it.

    `stop` wakes readers through `mount_fd`, a descriptor of the FUSE mount; without it readers poll, which is slower.
    The caller keeps ownership of `fuse_fd` and `mount_fd`.
    """

    def __init__(
        self,
        fuse_fd: int,
        files: Devices,
        mount_fd: int | None = None,
        *,
        readers: int = READERS,
        max_tasks: int = MAX_TASKS,
        log: Callable[[str], None] = _log_to_stderr,
    ) -> None:
        self._fuse_fd = fuse_fd
        self._files = files
        self._mount_fd = mount_fd
        self._reader_count = readers
        self._max_tasks = max_tasks
        self._log = log
        self._failures = RepeatFilter(_LOG_PAUSE_S)
        self._stopping = False
        self._stop_fd = -1
        self._lock = threading.Lock()  # guards _readers_left, _stop_fd
        self._readers_left = 0
        self._ended = False  # ENODEV: the mount is gone
        self._failure: BaseException | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._readers_gone = trio.Event()
        self._finished = trio.Event()
        # Only the trio thread touches these. INVARIANT: requests wait only while _tasks == _max_tasks.
        self._tasks = 0
        self._waiting: deque[tuple[int, Device, int, int]] = deque()

    # -- life ------------------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> bool:
        """Serves until the mount is gone (True), or until it is stopped and has answered all that it read (False).

        When cancelled, it leaves requests unanswered for the next process. Raises HostError if the connection fails
        in another way.
        """
        self._token = trio.lowlevel.current_trio_token()
        os.set_blocking(self._fuse_fd, self._mount_fd is not None)
        try:
            wire.resend(self._fuse_fd)
        except OSError as error:
            if error.errno == errno.ENODEV:
                self._finished.set()
                return True
            raise HostError(
                f"taking over the FUSE connection failed: {error.strerror}", "Linux 6.9 or later is needed"
            ) from None
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            async with trio.open_nursery() as self._nursery:
                self._readers_left = self._reader_count
                for number in range(self._reader_count):
                    # daemon: the process can end while a thread waits for a read that nobody answers
                    threading.Thread(target=self._reader, name=f"fuse-{number}", daemon=True).start()
                task_status.started()
                await self._readers_gone.wait()
                if self._ended or self._failure is not None:
                    self._nursery.cancel_scope.cancel()
        finally:
            self.stop()
            self._nursery = None
            self._finished.set()
        if self._failure is not None:
            message = f"the FUSE connection failed: {self._failure}"
            raise HostError(message, "see the kernel log") from self._failure
        return self._ended

    def stop(self) -> None:
        """Makes each reader stop after its current request. May be called from any thread, any number of times."""
        self._stopping = True
        self._wake()

    async def drain(self, limit_s: float = math.inf) -> None:
        """Stops, and returns when every request that was read is answered. After `limit_s` seconds the rest is left to
        the next process."""
        self.stop()
        with trio.move_on_after(limit_s):
            await self._finished.wait()
            return
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()
            await self._finished.wait()

    def release_mount(self) -> None:
        """Stops using `mount_fd`, so the caller may close it when this returns. From then on readers poll."""
        if self._mount_fd is None:
            return
        path_fd = os.dup(self._mount_fd)
        self._mount_fd = None
        os.set_blocking(self._fuse_fd, False)
        self._wake_blocked(path_fd)

    def _wake(self) -> None:
        with self._lock:
            if self._readers_left == 0 or self._stop_fd < 0:
                return
            os.eventfd_write(self._stop_fd, 1)
            path_fd = None if self._mount_fd is None else os.dup(self._mount_fd)
        if path_fd is not None:
            os.set_blocking(self._fuse_fd, False)
            self._wake_blocked(path_fd)

    def _wake_blocked(self, path_fd: int) -> None:
        """Wakes readers that block in read(2), without signals: each statfs is a request and wakes one. Nobody waits
        for this thread, since perhaps only the next process answers the last request."""

        def knock() -> None:
            try:
                for _ in range(self._reader_count):
                    os.statvfs(path_fd)
            except OSError:
                pass  # the mount is gone, which wakes all readers
            finally:
                os.close(path_fd)

        threading.Thread(target=knock, name="fuse-wake", daemon=True).start()

    # -- reader threads --------------------------------------------------------------------------------

    def _reader(self) -> None:
        try:
            self._read_requests()
        except OSError as error:
            if error.errno == errno.ENODEV:
                self._ended = True
            else:
                self._failure = error
        except BaseException as error:
            self._failure = error
        if self._ended or self._failure is not None:
            self._stopping = True
        with self._lock:
            self._readers_left -= 1
            last = self._readers_left == 0
            if last:
                os.close(self._stop_fd)
                self._stop_fd = -1
        if last:
            self._soon(self._readers_gone.set)
        elif self._failure is not None:
            self.stop()

    def _read_requests(self) -> None:
        fuse_fd = self._fuse_fd
        buffer = bytearray(wire.REQUEST_BUFFER_BYTES)
        buffers = (buffer,)
        readv, unpack, answer = os.readv, wire.IN_HEADER.unpack_from, self._answer
        poller = select.poll()
        poller.register(fuse_fd, select.POLLIN)
        poller.register(self._stop_fd, select.POLLIN)
        while not self._stopping:
            try:
                readv(fuse_fd, buffers)
            except BlockingIOError:
                poller.poll()
                continue
            except OSError as error:
                # ENOENT: the kernel withdrew the request while we read it
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue
                raise
            length, opcode, unique, nodeid, *_ = unpack(buffer)
            try:
                answer(opcode, unique, nodeid, buffer, length)
            except wire.WireError:
                raise
            except Exception as error:
                self._fail(unique, error)

    def _answer(self, opcode: int, unique: int, nodeid: int, buffer: bytearray, length: int) -> None:
        if opcode == _READ:
            self._read(unique, nodeid, buffer)
        elif opcode == _LOOKUP:
            self._lookup(unique, nodeid, bytes(buffer[wire.IN_HEADER.size : length - 1]))
        elif opcode == _GETATTR:
            self._getattr(unique, nodeid)
        elif opcode in _UNANSWERED:
            pass
        elif opcode == wire.READDIR:
            self._readdir(unique, nodeid, buffer)
        elif opcode == wire.STATFS:
            wire.reply(self._fuse_fd, unique, wire.statfs_out())
        elif opcode in (wire.DESTROY, wire.RELEASE, wire.RELEASEDIR, wire.FLUSH):
            wire.reply(self._fuse_fd, unique)
        else:
            # ENOSYS to OPEN and OPENDIR: the kernel opens without asking from then on, and keeps its cache
            wire.reply_error(self._fuse_fd, unique, errno.ENOSYS)

    def _read(self, unique: int, nodeid: int, buffer: bytearray) -> None:
        _, address, size = wire.READ_IN.unpack_from(buffer, wire.IN_HEADER.size)
        device = self._files.by_node(nodeid)
        if device is None:
            raise HostError(f"no layer for node {nodeid:#x}", "its cache directory is gone")
        size = min(size, device.size_bytes - address)
        if size <= 0:  # at or behind the end: empty, as for any file
            wire.reply(self._fuse_fd, unique)
            return
        data_bytes = device.read_cached(address, size)
        if data_bytes is None:
            self._soon(self._admit, (unique, device, address, size))
        else:
            self._send(unique, device, address, size, data_bytes)

    def _send(self, unique: int, device: Device, address: int, size: int, data_bytes: bytes | memoryview) -> None:
        if len(data_bytes) != size:  # never short: the kernel would fill the rest with zeros
            where = f"layer {device.content_root}, address {address}"
            raise HostError(f"{where}: {len(data_bytes)} bytes instead of {size}")
        wire.reply(self._fuse_fd, unique, data_bytes)

    def _lookup(self, unique: int, parent: int, name: bytes) -> None:
        device = None
        if parent == wire.ROOT_ID and len(name) == NAME_CHARACTERS and _HEX.issuperset(name):
            device = self._files.by_name(name)
        if device is None:
            wire.reply_error(self._fuse_fd, unique, errno.ENOENT)
            return
        nodeid = node_of(device.content_root)
        owner = self._files.by_node(nodeid)
        if owner is None or owner.content_root != device.content_root:
            # Somebody made 2**30 layers to find two that begin alike. We would serve one as the other.
            raise HostError(f"layer {device.content_root} has the node id of another one")
        attributes = self._attributes(nodeid, device.size_bytes)
        entry_bytes = wire.entry_out(nodeid, _generation(device.content_root), attributes)
        wire.reply(self._fuse_fd, unique, entry_bytes)

    def _getattr(self, unique: int, nodeid: int) -> None:
        size_bytes = None
        if nodeid != wire.ROOT_ID:
            device = self._files.by_node(nodeid)
            if device is None:
                wire.reply_error(self._fuse_fd, unique, errno.ESTALE)
                return
            size_bytes = device.size_bytes
        wire.reply(self._fuse_fd, unique, wire.attr_out(self._attributes(nodeid, size_bytes)))

    def _attributes(self, nodeid: int, size_bytes: int | None) -> bytes:
        return wire.attributes(nodeid, size_bytes, os.geteuid(), os.getegid())

    def _readdir(self, unique: int, nodeid: int, buffer: bytearray) -> None:
        _, first, size = wire.READ_IN.unpack_from(buffer, wire.IN_HEADER.size)
        names = [".", "..", *self._files.names()] if nodeid == wire.ROOT_ID else []
        out = bytearray()
        for position in range(first, len(names)):
            name = names[position]
            if len(name) == NAME_CHARACTERS:
                entry = wire.dirent(node_of(name), position + 1, name.encode(), wire.DT_REG)
            else:
                entry = wire.dirent(wire.ROOT_ID, position + 1, name.encode(), wire.DT_DIR)
            if len(out) + len(entry) > size:
                break
            out += entry
        wire.reply(self._fuse_fd, unique, bytes(out))

    def _fail(self, unique: int, error: BaseException) -> None:
        """EIO to the reader, the reason to the log."""
        wire.reply_error(self._fuse_fd, unique, errno.EIO)
        text = f"read failed: {error or type(error).__name__}"
        if self._failures.is_new(text):
            with contextlib.suppress(OSError):  # a full log disk stops no reads
                self._log(text)

    # -- trio tasks ------------------------------------------------------------------------------------

    def _soon(self, function: Callable[..., object], *arguments: object) -> None:
        """Runs a function in the trio thread. Does nothing if that is gone: the kernel asks the next process."""
        assert self._token is not None
        try:
            self._token.run_sync_soon(function, *arguments)
        except trio.RunFinishedError:
            self._stopping = True

    def _admit(self, request: tuple[int, Device, int, int]) -> None:
        if self._nursery is None:
            return
        if self._tasks < self._max_tasks:
            self._tasks += 1
            self._nursery.start_soon(self._fetch, request)
        else:
            self._waiting.append(request)

    async def _fetch(self, request: tuple[int, Device, int, int]) -> None:
        """Answers a request, then further ones while any wait."""
        while True:
            unique, device, address, size = request
            try:
                data_bytes = await device.read(address, size)
                self._send(unique, device, address, size, data_bytes)
            except wire.WireError as error:
                self._failure = error
                self.stop()
            except Exception as error:
                self._fail(unique, error)
            if not self._waiting:
                self._tasks -= 1
                return
            request = self._waiting.popleft()
