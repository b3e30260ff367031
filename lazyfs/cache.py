"""The block cache: decoded file data of layers, shared by all images and processes of a host.

    <cache>/version                     "1"
    <cache>/layers/<content root>/table     the block table (core/blocks.py)
                                 /data      sparse file: the layer's address space, decoded
                                 /present   8 bytes a block: xxh3-64 of its content, 0 = absent
                                 /lock      flock: shared by users, exclusive for eviction; mtime = last use
    <cache>/indexes/<manifest digest>/      see images.py

A block is verified (sha256) and written first and marked present after, so any torn state reads as absent.
The mark is checked against the data when a process first reads the block: bit rot and power cuts turn into a
fetch, never into wrong bytes, and no fsync is needed. Two processes filling one block write the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator

import xxhash

from lazyfs.core.blocks import PAGE_BYTES, BlockTable, page_align
from lazyfs.errors import HostError, ImageError

_VERSION = b"1\n"
# Names in tmp/ that nobody needs any more begin so.
REMOVED = "removed-"
_CREATE_TRIES = 16


def _mark(data: bytes | memoryview) -> int:
    """The presence mark of a block's content; never 0, which means absent."""
    return xxhash.xxh3_64_intdigest(data) or 1


class LayerClosed(HostError):
    """The layer was let go while somebody read it: open it again."""


class _Held:
    """What an open layer holds: descriptors and the map of its marks.

    Every call keeps a reference while it works, so that nothing is closed, and no number of a closed
    descriptor used again, below a thread that still writes.
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
    """One layer's place in the cache, held open (and so safe from eviction) until close().

    All methods are synchronous and may be called from any thread. HostError: the disk fails, or it was
    closed.
    """

    def __init__(self, path: str, lock_fd: int) -> None:
        """Opens the entry; `lock_fd` belongs to it from now on, also when this raises.

        ImageError: the entry is damaged (a power cut, bit rot). HostError: it cannot be opened at all.
        """
        self.path = path
        self.content_root = os.path.basename(path)
        data_fd = -1
        try:
            self.table = _open_table(path, self.content_root)
            data_fd = os.open(os.path.join(path, "data"), os.O_RDWR | os.O_CLOEXEC)
            if os.fstat(data_fd).st_size != self.table.device_bytes:
                os.ftruncate(data_fd, self.table.device_bytes)
            marks = _open_marks(path, self.table.count)
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
        # One byte a block: whether this process has seen that data and mark agree.
        self._checked = bytearray(self.table.count)
        self._complete_to = 0

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
        """The bytes at [address, address + size_bytes) if all their blocks are here and sound, else None.

        They stand in a buffer of the calling thread, which its next read overwrites: an allocation for each
        large read cost a fifth to a third of the throughput (measured through the mount, with read-ahead of 128
        KiB 1.65 against 2.05 GB/s, of 1 MiB 1.9 against 2.7).

        A read past the end of the device is cut at the end, as for a file. A block whose data does not match
        its mark is marked absent.
        """
        held = self._open()
        blocks = self.table.overlapping(address, size_bytes)
        checked = self._checked.find(0, blocks.start, blocks.stop) < 0
        if not checked and 0 in held.marks[blocks.start : blocks.stop]:
            return None
        size_bytes = max(0, min(size_bytes, self.table.device_bytes - address))
        data = _pread_buffered(held.data_fd, size_bytes, address)
        if len(data) != size_bytes:
            return self._cut_off(held, blocks, size_bytes)
        if not checked:
            for block in blocks:
                if not self._checked[block]:
                    if not self._check(held, block, data, address):
                        return None
                    if self._zero_gaps(held, block):
                        data = _pread_buffered(held.data_fd, size_bytes, address)
        return data

    def _check(self, held: _Held, block: int, data: memoryview, address: int) -> bool:
        """Compares a block with its mark, taking from `data` (read at `address`) what lies in there."""
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
        """Sees to it that the rest of a block's first and last page is zeros, for no mark covers it.

        Says whether something had to be written. (Whole pages between blocks are holes, which cannot rot.)
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

    def _cut_off(self, held: _Held, blocks: range, size_bytes: int) -> memoryview | None:
        """Somebody made the data file shorter: gives it its size back; what was there is absent now."""
        for block in blocks:
            held.marks[block] = 0
            self._checked[block] = 0
        if os.fstat(held.data_fd).st_size < self.table.device_bytes:
            os.ftruncate(held.data_fd, self.table.device_bytes)
        return None if blocks else memoryview(bytes(size_bytes))

    def has(self, block: int) -> bool:
        """Whether the block is marked present (its data may not have been checked yet)."""
        return bool(self._open().marks[block])

    def missing(self, blocks: range) -> list[int]:
        """Those of `blocks` that are absent."""
        marks = self._open().marks[blocks.start : blocks.stop]
        return [number for number, mark in enumerate(marks, blocks.start) if not mark]

    def publish(self, block: int, data: bytes | memoryview) -> bool:
        """Writes and marks a block if its sha256 is right; False, and nothing changed, if not. HostError:
        disk.
        """
        held = self._open()
        if hashlib.sha256(data).digest() != self.table.digest(block):
            return False
        write_block(held.data_fd, data, self.table.addresses[block])
        held.marks[block] = _mark(data)
        return True

    def is_complete(self) -> bool:
        """Whether every block was here once. Looks at each block once in the object's life."""
        marks = self._open().marks
        while self._complete_to < self.table.count and marks[self._complete_to]:
            self._complete_to += 1
        return self._complete_to == self.table.count

    def verify(self) -> list[int]:
        """Checks every present block against its sha256; marks the damaged ones absent and returns them."""
        held = self._open()
        damaged = []
        for block in range(self.table.count):
            if held.marks[block]:
                data = b""
                with contextlib.suppress(HostError):  # what cannot be read is as good as damaged
                    data = _pread(held.data_fd, self.table.lengths[block], self.table.addresses[block])
                if hashlib.sha256(data).digest() != self.table.digest(block):
                    held.marks[block] = 0
                    self._checked[block] = 0
                    damaged.append(block)
        return damaged

    def present_blocks(self) -> int:
        """How many blocks are here."""
        return sum(map(bool, self._open().marks[: self.table.count]))

    def close(self) -> None:
        """Lets go of the entry, once calls under way in other threads have returned. May be called twice."""
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


def _pread_buffered(data_fd: int, size_bytes: int, address: int) -> memoryview:
    """As _pread, into this thread's buffer."""
    buffer: memoryview | None = getattr(_thread, "buffer", None)
    if buffer is None or len(buffer) < size_bytes:
        buffer = _thread.buffer = memoryview(bytearray(max(size_bytes, 1 << 20)))
    try:
        return buffer[: os.preadv(data_fd, [buffer[:size_bytes]], address)]
    except OSError as error:
        raise HostError(f"cannot read the block cache: {error.strerror}", "check the disk") from None


def _pread(data_fd: int, size_bytes: int, address: int) -> bytes:
    try:
        return os.pread(data_fd, size_bytes, address)
    except OSError as error:
        raise HostError(f"cannot read the block cache: {error.strerror}", "check the disk") from None


def _open_table(path: str, content_root: str) -> BlockTable:
    """The block table, mapped. Hashed here: everything else in the cache is verified against it."""
    with open(os.path.join(path, "table"), "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ImageError(f"the cache entry {path} is damaged", "remove it: lazyfs cache prune")
        table = BlockTable(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    if table.content_root != content_root:
        raise ImageError(f"the cache entry {path} is damaged", "remove it: lazyfs cache prune")
    return table


def _open_marks(path: str, count: int) -> memoryview:
    """The presence marks, mapped for writing. A file that is too short is filled up with "absent"."""
    fd = os.open(os.path.join(path, "present"), os.O_RDWR | os.O_CLOEXEC)
    try:
        _allocate(fd, max(8, 8 * count))
        return memoryview(mmap.mmap(fd, max(8, 8 * count))).cast("Q")
    finally:
        os.close(fd)


def _allocate(fd: int, size_bytes: int) -> None:
    """Gives a file its size with no holes: a store through a map into a hole kills the process when the disk
    is full.
    """
    status = os.fstat(fd)
    if status.st_size < size_bytes or status.st_blocks * 512 < size_bytes:
        os.posix_fallocate(fd, 0, size_bytes)


class BlockCache:
    """The cache directory. Cheap to open; any number of processes may use it at once."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)
            for name in ("layers", "indexes", "refs", "tmp"):
                os.makedirs(os.path.join(path, name), mode=0o700, exist_ok=True)
            version = os.path.join(path, "version")
            if not os.path.exists(version):
                self.write_atomically(version, _VERSION)
            with open(version, "rb") as file:
                found = file.read(16)
        except OSError as error:
            raise HostError(
                f"cannot use the cache directory {path}: {error.strerror}", "choose one with -o cache=DIR"
            ) from None
        if found != _VERSION:
            raise HostError(
                f"the cache directory {path} has an unknown version", "use another with -o cache=DIR"
            )

    def write_atomically(self, path: str, data: bytes) -> None:
        """Writes a whole file so that a reader sees the old or the new one (rename). HostError: disk."""
        temporary = ""
        try:
            fd, temporary = tempfile.mkstemp(dir=os.path.join(self.path, "tmp"))
            with open(fd, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            if isinstance(error, OSError):
                raise HostError(
                    f"cannot write to the cache: {error.strerror}", "check the disk's space"
                ) from None
            raise

    def layer_path(self, content_root: str) -> str:
        """Where a layer's entry is, whether it exists or not."""
        return os.path.join(self.path, "layers", content_root)

    def open_layer(self, content_root: str) -> CachedLayer | None:
        """The layer's entry, locked against eviction; None if there is none. Caller closes it.

        ImageError: the entry is damaged; create_layer() replaces it.
        """
        path = self.layer_path(content_root)
        while True:
            try:
                lock_fd = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                raise HostError(
                    f"cannot open the cache entry {path}: {error.strerror}", "check the disk"
                ) from None
            if lock_shared(lock_fd, os.path.join(path, "lock")):
                return CachedLayer(path, lock_fd)
            os.close(lock_fd)

    def create_layer(self, content_root: str, table: bytes) -> CachedLayer:
        """Opens the layer's entry, making an empty one if there is none, or none that is whole.

        `table` must have that content root (ImageError). HostError: the disk is full or fails.
        """
        opened = BlockTable(table)
        if opened.content_root != content_root:
            raise ImageError("a block table does not have the content root it is filed under")
        for _ in range(_CREATE_TRIES):
            try:
                layer = self.open_layer(content_root)
                if layer is not None:
                    return layer
            except ImageError:
                self.set_aside(self.layer_path(content_root))
            self._make_layer(content_root, table, opened)
        raise HostError(
            f"the cache entry of layer {content_root[:12]} keeps vanishing", "is a cleaner at work?"
        )

    def _make_layer(self, content_root: str, table: bytes, opened: BlockTable) -> None:
        path = self.layer_path(content_root)
        temporary = ""
        try:
            temporary = tempfile.mkdtemp(dir=os.path.join(self.path, "tmp"))
            for name, content in (("table", table), ("data", b""), ("present", b""), ("lock", b"")):
                with open(os.path.join(temporary, name), "wb") as file:
                    file.write(content)
                    if name == "data":
                        file.truncate(opened.device_bytes)
                    elif name == "present":
                        _allocate(file.fileno(), max(8, 8 * opened.count))
            os.rename(temporary, path)
        except OSError as error:
            if temporary:
                shutil.rmtree(temporary, ignore_errors=True)
            if not os.path.lexists(path):
                raise HostError(f"cannot create a cache entry: {error.strerror}", "check the disk") from None
            if not os.path.exists(os.path.join(path, "lock")):  # else another process was faster
                self.set_aside(path)

    def set_aside(self, path: str) -> str:
        """Takes an entry out of the way, to the path returned; `lazyfs cache gc` deletes it if
        nobody does before.
        """
        name = f"{REMOVED}{os.getpid()}-{os.urandom(4).hex()}-{os.path.basename(path)}"
        grave = os.path.join(self.path, "tmp", name)
        with contextlib.suppress(OSError):
            os.rename(path, grave)
        return grave

    def content_roots(self) -> list[str]:
        """Content roots of all layers that have an entry."""
        return sorted(name for name in os.listdir(os.path.join(self.path, "layers")) if len(name) == 64)


def lock_shared(fd: int, lock_path: str) -> bool:
    """Takes an entry's lock file, open as `fd`, as one of its users, and notes the time of use.

    False if the entry was removed between open and lock: then the name leads elsewhere, or nowhere.
    """
    fcntl.flock(fd, fcntl.LOCK_SH)
    if not _still_named(fd, lock_path):
        return False
    os.utime(fd)
    return True


def _still_named(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextlib.contextmanager
def exclusive(lock_path: str) -> Iterator[bool]:
    """Whether nobody holds the lock file; while the context lasts nobody can take it. Missing file: False."""
    try:
        fd = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        yield False
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = _still_named(fd, lock_path)
        except BlockingIOError:
            locked = False
        yield locked
    finally:
        os.close(fd)
