"""One layer's entry in the block cache.

    <cache>/layers/<content root>/table     the block table (core/layer/blocks.py)
                                 /data      sparse file: the layer's address space, decoded
                                 /present   8 bytes a block: xxh3-64 of its content, 0 = absent
                                 /lock      flock: shared by users, exclusive for eviction; mtime = last use
                                 /sound     the seal: while it is valid, the kernel may read `data` by itself

A block is verified (sha256) and written before it is marked present, so any torn state reads as absent. A process
checks the mark against the data when it first reads the block, so bit rot and power cuts lead to a fetch, never to
wrong bytes, and no fsync is needed. Two processes that fill one block write the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import mmap
import os
import threading

import xxhash

from lazyfs.core.layer.blocks import PAGE_BYTES, BlockTable, page_align
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.errors import HostError, ImageError

# Names in an entry, besides LOCK.
TABLE, DATA, PRESENT, SEAL = "table", "data", "present", "sound"
# `seal` compares so many bytes in one call: one call a second slows readers little.
SEAL_STEP_BYTES = 64 << 20


def _mark(data: bytes | memoryview) -> int:
    """The presence mark of a block's content; never 0, which means absent."""
    return xxhash.xxh3_64_intdigest(data) or 1


class LayerClosed(HostError):
    """The layer was closed while somebody read it: open it again."""


class _Held:
    """The descriptors of an open layer, and the map of its marks.

    Every call has a reference while it works, so that no descriptor is closed, and its number used for another file,
    while a thread still writes to it.
    """

    __slots__ = ("data_fd", "lock_fd", "marks")

    def __init__(self, data_fd: int, lock_fd: int, marks: memoryview) -> None:
        self.data_fd = data_fd
        self.lock_fd = lock_fd
        self.marks = marks

    def __del__(self) -> None:
        os.close(self.data_fd)
        os.close(self.lock_fd)


class CachedLayer:
    """One layer's entry in the cache, open, and so safe from eviction, until close().

    All methods are synchronous and may be called from any thread. HostError: the disk fails. LayerClosed: it is closed.
    """

    def __init__(self, path: str, lock_fd: int) -> None:
        """Opens the entry. It owns `lock_fd` from now on, also when this raises.

        ImageError: the entry is damaged (a power cut, bit rot). HostError: it cannot be opened.
        """
        self.path = path
        self.content_root = ContentRoot(os.path.basename(path))
        data_fd = -1
        try:
            self.table = _open_table(path, self.content_root)
            data_fd = os.open(os.path.join(path, DATA), os.O_RDWR | os.O_CLOEXEC)
            marks = _open_marks(path, self.table.count)
            _restore_size(data_fd, self.table, marks)
        except BaseException as error:
            os.close(lock_fd)
            if data_fd >= 0:
                os.close(data_fd)
            if isinstance(error, FileNotFoundError):
                raise ImageError(
                    f"the cache entry {path} is not whole", "remove it: lazyfs cache prune"
                ) from None
            if isinstance(error, OSError):
                raise HostError(
                    f"cannot open the cache entry {path}: {error.strerror}", "check the disk"
                ) from None
            raise
        self._held: _Held | None = _Held(data_fd, lock_fd, marks)
        # One byte a block: whether this process found that data and mark agree.
        self._checked = bytearray(self.table.count)
        self._complete_to = 0
        # Blocks before _sealed_to agreed with their marks while the data file was in _sealing_state.
        self._sealed_to = 0
        self._sealing_state = b""

    def _open(self) -> _Held:
        held = self._held
        if held is None:
            raise LayerClosed(f"layer {self.content_root[:12]} was closed while it was in use", "try again")
        return held

    @property
    def size_bytes(self) -> int:
        """Size of the layer's data device, a multiple of 4096."""
        return self.table.device_bytes

    def read(self, address: int, size_bytes: int) -> bytes | memoryview | None:
        """The bytes at [address, address + size_bytes); None if one of their blocks is absent or damaged.

        They are in a buffer of the calling thread, valid until its next read: an allocation for each read costs a fifth
        of the throughput.

        A read past the end of the device is cut at the end, as for a file. A block whose data does not match its mark
        becomes absent.
        """
        held = self._open()
        blocks = self.table.overlapping(address, size_bytes)
        if 0 in held.marks[blocks.start : blocks.stop]:
            return None
        size_bytes = max(0, min(size_bytes, self.table.device_bytes - address))
        data = _pread_buffered(held.data_fd, size_bytes, address)
        if len(data) != size_bytes:
            self._cut_off(held)
            return None if blocks else memoryview(bytes(size_bytes))
        # Again: another thread may have given a data file that was cut off its size back, and so zeros for data.
        if 0 in held.marks[blocks.start : blocks.stop]:
            return None
        if self._checked.find(0, blocks.start, blocks.stop) >= 0:
            for block in blocks:
                if not self._checked[block]:
                    if not self._check(held, block, data, address):
                        return None
                    if self._zero_gaps(held, block):
                        data = _pread_buffered(held.data_fd, size_bytes, address)
        return data

    def _check(self, held: _Held, block: int, data: memoryview, address: int) -> bool:
        """Compares a block with its mark. Uses `data`, which was read at `address`, if the block lies in it whole."""
        start = self.table.addresses[block] - address
        length = self.table.lengths[block]
        content: bytes | memoryview = data[max(0, start) : max(0, start + length)]
        if len(content) != length:
            content = _pread(held.data_fd, length, self.table.addresses[block])
        if len(content) != length or _mark(content) != held.marks[block]:
            held.marks[block] = 0
            return False
        self._checked[block] = 1
        return True

    def _zero_gaps(self, held: _Held, block: int) -> bool:
        """Writes zeros to the rest of a block's first and last page if something else is there: no mark covers it.

        Returns whether it wrote. (Whole pages between blocks are holes, which cannot rot.)
        """
        table = self.table
        first = table.addresses[block]
        end = first + table.lengths[block]
        low, high = first - first % PAGE_BYTES, page_align(end)
        if low < first and block:
            low = max(low, table.addresses[block - 1] + table.lengths[block - 1])
        if end < high and block + 1 < table.count:
            high = min(high, table.addresses[block + 1])
        repaired = False
        for start, size_bytes in ((low, first - low), (end, high - end)):
            if size_bytes and _pread(held.data_fd, size_bytes, start).strip(b"\0"):
                write_block(held.data_fd, bytes(size_bytes), start)
                repaired = True
        return repaired

    def _cut_off(self, held: _Held) -> None:
        """Repairs a data file that somebody cut off: it gets its size back, and all that was cut off becomes absent."""
        self._checked = bytearray(self.table.count)
        _restore_size(held.data_fd, self.table, held.marks)

    def has(self, block: int) -> bool:
        """Whether the block is marked present. Its data may be unchecked."""
        return bool(self._open().marks[block])

    def missing(self, blocks: range) -> list[int]:
        """Those of `blocks` that are absent."""
        marks = self._open().marks[blocks.start : blocks.stop]
        return [number for number, mark in enumerate(marks, blocks.start) if not mark]

    def publish(self, block: int, data: bytes | memoryview) -> bool:
        """Writes and marks a block if its sha256 is right. Else returns False and changes nothing. HostError: the disk
        fails.
        """
        held = self._open()
        if hashlib.sha256(data).digest() != self.table.digest(block):
            return False
        if os.fstat(held.data_fd).st_size != self.table.device_bytes:
            self._cut_off(held)  # or this write would fill with zeros what was cut off before it
        write_block(held.data_fd, data, self.table.addresses[block])
        held.marks[block] = _mark(data)
        return True

    def is_complete(self) -> bool:
        """Whether every block was present once. Looks at each block once in the object's life."""
        marks = self._open().marks
        while self._complete_to < self.table.count and marks[self._complete_to]:
            self._complete_to += 1
        return self._complete_to == self.table.count

    def verify(self) -> list[int]:
        """Checks every present block against its sha256, marks damaged ones absent, and returns them."""
        held = self._open()
        damaged = []
        for block in range(self.table.count):
            if held.marks[block]:
                data = b""
                with contextlib.suppress(HostError):  # what cannot be read counts as damaged
                    data = _pread(held.data_fd, self.table.lengths[block], self.table.addresses[block])
                if hashlib.sha256(data).digest() != self.table.digest(block):
                    held.marks[block] = 0
                    self._checked[block] = 0
                    damaged.append(block)
        return damaged

    def seal(self) -> bool:
        """Goes on sealing the layer, by SEAL_STEP_BYTES a call. True: it is sealed, which is on disk.

        To be sealed, all blocks must agree with their marks while nobody writes to the data, which is then synced to
        disk. Only data in memory is compared, so this reads no disk. False: unfinished, or a block is absent, damaged
        or not in memory. HostError: the disk fails.
        """
        held = self._open()
        state = _state(held.data_fd)
        if state != self._sealing_state:
            self._sealing_state, self._sealed_to = state, 0
        if not self.is_complete():
            return False
        left_bytes = SEAL_STEP_BYTES
        while self._sealed_to < self.table.count:
            address, length = self.table.addresses[self._sealed_to], self.table.lengths[self._sealed_to]
            data = _pread_from_memory(held.data_fd, length, address) if left_bytes > 0 else None
            if data is None or not self._check(held, self._sealed_to, data, address):
                return False
            if self._zero_gaps(held, self._sealed_to):
                return False  # which changed the file's state: begin anew
            self._sealed_to += 1
            left_bytes -= length
        try:
            os.fdatasync(held.data_fd)
            if _state(held.data_fd) != state:
                return False
            with open(os.path.join(self.path, SEAL), "wb") as file:
                file.write(state)
        except OSError as error:
            raise HostError(f"cannot write to the block cache: {error.strerror}", "check the disk") from None
        return True

    def is_sealed(self) -> bool:
        """Whether `seal` succeeded since this machine was started, and since then nobody wrote to the data and no block
        became absent.

        If so, the kernel may read the data file by itself: reading through lazyfs would check nothing more.
        """
        held = self._open()
        if 0 in held.marks[: self.table.count]:
            return False
        try:
            with open(os.path.join(self.path, SEAL), "rb") as file:
                return file.read(256) == _state(held.data_fd)
        except OSError:
            return False

    def open_data_path(self) -> str:
        """A path by which this process can open the data file again, even if the entry was renamed or removed."""
        return f"/proc/self/fd/{self._open().data_fd}"

    def present_blocks(self) -> int:
        """How many blocks are present."""
        return sum(map(bool, self._open().marks[: self.table.count]))

    def close(self) -> None:
        """Releases the entry as soon as calls in other threads have returned. May be called twice."""
        self._held = None


def write_block(data_fd: int, data: bytes | memoryview, address: int) -> None:
    """Writes a block's bytes whole, or raises HostError (disk full, I/O error)."""
    try:
        if os.pwrite(data_fd, data, address) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise HostError(
            f"cannot write to the block cache: {error.strerror}", "free space: lazyfs cache gc --max-size"
        ) from None


_thread = threading.local()


def _thread_buffer(size_bytes: int) -> memoryview:
    buffer: memoryview | None = getattr(_thread, "buffer", None)
    if buffer is None or len(buffer) < size_bytes:
        buffer = _thread.buffer = memoryview(bytearray(max(size_bytes, 1 << 20)))
    return buffer


def _pread_buffered(data_fd: int, size_bytes: int, address: int) -> memoryview:
    """Like _pread, but into this thread's buffer."""
    buffer = _thread_buffer(size_bytes)
    try:
        return buffer[: os.preadv(data_fd, [buffer[:size_bytes]], address)]
    except OSError as error:
        raise HostError(f"cannot read the block cache: {error.strerror}", "check the disk") from None


def _pread_from_memory(data_fd: int, size_bytes: int, address: int) -> memoryview | None:
    """Like _pread_buffered; None if the page cache does not have all of it."""
    buffer = _thread_buffer(size_bytes)[:size_bytes]
    try:
        return buffer if os.preadv(data_fd, [buffer], address, os.RWF_NOWAIT) == size_bytes else None
    except OSError:
        return None


def _pread(data_fd: int, size_bytes: int, address: int) -> bytes:
    try:
        return os.pread(data_fd, size_bytes, address)
    except OSError as error:
        raise HostError(f"cannot read the block cache: {error.strerror}", "check the disk") from None


@functools.cache
def _boot_id() -> bytes:
    """Identifies this start of the machine."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read().strip()


def _state(data_fd: int) -> bytes:
    """The content of a valid seal: this start of the machine, and the data file's last change."""
    status = os.fstat(data_fd)
    return b"%s %d %d\n" % (_boot_id(), status.st_mtime_ns, status.st_ctime_ns)


def _open_table(path: str, content_root: ContentRoot) -> BlockTable:
    """The block table, mapped.

    It is hashed at each open, though the index that names it was verified: the file is apart from that, and was not
    synced when it was made. All data is verified against these very bytes. With the right hash they are bytes that were
    checked before they were filed (CacheDirectory.create_layer, LayerFill.publish), so that is not done again: it takes
    five times as long as hashing, which takes 0.3 ms for 10,000 blocks.
    """
    with open(os.path.join(path, TABLE), "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ImageError(f"the cache entry {path} is damaged", "remove it: lazyfs cache prune")
        table = BlockTable(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), was_checked=True)
    if table.content_root != content_root:
        raise ImageError(f"the cache entry {path} is damaged", "remove it: lazyfs cache prune")
    return table


def _open_marks(path: str, count: int) -> memoryview:
    """The presence marks, mapped for writing. A file that is too short grows by "absent"."""
    fd = os.open(os.path.join(path, PRESENT), os.O_RDWR | os.O_CLOEXEC)
    try:
        allocate(fd, max(8, 8 * count))
        return memoryview(mmap.mmap(fd, max(8, 8 * count))).cast("Q")
    finally:
        os.close(fd)


def _restore_size(data_fd: int, table: BlockTable, marks: memoryview) -> None:
    """Gives a data file of a wrong size its size back. First marks absent what it had lost, in all processes."""
    left_bytes = os.fstat(data_fd).st_size
    if left_bytes != table.device_bytes:
        for block in table.overlapping(left_bytes, table.device_bytes):
            marks[block] = 0
        os.ftruncate(data_fd, table.device_bytes)


def allocate(fd: int, size_bytes: int) -> None:
    """Gives a file its size without holes: on a full disk, a store through a map into a hole kills the process."""
    status = os.fstat(fd)
    if status.st_size < size_bytes or status.st_blocks * 512 < size_bytes:
        os.posix_fallocate(fd, 0, size_bytes)
