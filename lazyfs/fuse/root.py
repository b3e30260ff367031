"""The whole root of an image through FUSE, for hosts where EROFS cannot be mounted.

An image is immutable, so the kernel may keep all answers for ever, and the handlers need no state. A FUSE node id
is the EROFS nid plus 2; hard links share an inode because they share a nid; FORGET means nothing. Only open
directories have state: the position of their listing.

Metadata comes from the namespace file (`Metadata`) and never awaits anything. A read is answered from the cache
at once, or after its fetch: with the bytes or EIO, never less. Only FUSEError leaves a handler: any other exception
would end pyfuse3's loop, and with it the process and the mount.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Concatenate, NoReturn, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import FileHandleT, FileNameT, FUSEError, XAttrNameT

from lazyfs.core.erofs.format import BLOCK_BYTES, NAME_MAX
from lazyfs.core.erofs.metadata import Metadata
from lazyfs.core.tar.kinds import Kind
from lazyfs.errors import HostError, ImageError, LazyfsError
from lazyfs.fuse.device import LayerData
from lazyfs.fuse.repeats import RepeatFilter

if TYPE_CHECKING:
    from pyfuse3 import EntryAttributes, FileInfo, ReaddirToken, RequestContext, StatvfsData

log = logging.getLogger(__name__)

FOREVER_S = 1e9  # 31 years: kernel time-outs of names and attributes, which never change

# Each waiting read occupies one task of pyfuse3, which stops answering *everything* when all `max_tasks` are
# occupied. Beyond MAX_WAITING a read therefore fails at once instead of freezing the mount; the kernel's limit on
# background reads (tuning.py) is far lower.
MAX_TASKS = 4096
MAX_WAITING = MAX_TASKS - 256

_MAX_KNOWN_FILES = 65536  # remembered places of opened files, about 200 bytes each
_LOG_PAUSE_S = 5.0  # the same failure is logged once in this time

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(slots=True)
class RootCounters:
    """Counts since the mount; `waiting` is the number of reads that wait now."""

    lookups: int = 0
    opens: int = 0
    listings: int = 0
    reads_cached: int = 0
    reads_fetched: int = 0
    bytes_read: int = 0
    failures: int = 0
    waiting: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(slots=True)
class _File:
    """Where the data of a regular file lies. `data` is None for an empty file."""

    data: LayerData | None
    address: int
    size: int


class _Listing:
    """An open directory: an iterator over its entries, and its position. The offset cookie of an entry is its
    number, which never changes, so seekdir and a later reader find the same place."""

    __slots__ = ("_entries", "_last", "_nid", "_position", "_reader")

    def __init__(self, reader: Metadata, nid: int) -> None:
        self._reader = reader
        self._nid = nid
        self._rewind()

    def _rewind(self) -> None:
        self._entries: Iterator[tuple[bytes, int, int]] = self._reader.entries(self._nid)
        self._position = 0  # number of the entry that comes next
        self._last: tuple[bytes, int, int] | None = None  # the one before it

    def entry(self, number: int) -> tuple[bytes, int, int] | None:
        """Entry `number`; None behind the last one. Ascending order is cheap, and so is the last entry again (it did
        not fit into the reply); going back further reads the directory again up to there."""
        if number < self._position - 1:
            self._rewind()
        while self._position <= number:
            self._last = next(self._entries, None)
            if self._last is None:
                return None
            self._position += 1
        return self._last


def _guarded(
    handler: Callable[Concatenate[RootOperations, _P], Coroutine[Any, Any, _R]],
) -> Callable[Concatenate[RootOperations, _P], Coroutine[Any, Any, _R]]:
    """Lets only FUSEError out of a handler. Our own errors become EIO and a line in the log, a bug EIO and a
    traceback there."""

    async def guarded(self: RootOperations, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return await handler(self, *args, **kwargs)
        except FUSEError:
            raise
        except Exception as error:
            self.report(handler.__name__, error)
            raise FUSEError(errno.EIO) from None

    return guarded


class RootOperations(pyfuse3.Operations):
    """pyfuse3's request handlers over one namespace and the layers in the order of its device table.

    The caller keeps ownership of `layers`. Raises ImageError if they do not fit the namespace. For one trio thread.
    """

    supports_dot_lookup = False  # only NFS export needs it
    enable_writeback_cache = False

    def __init__(self, reader: Metadata, layers: Sequence[LayerData], *, enable_acl: bool = False) -> None:
        if [device.size_bytes for device in reader.devices] != [layer.size_bytes for layer in layers]:
            raise ImageError("the layers do not fit the image's namespace", "build the index again")
        self.enable_acl = enable_acl
        self.counters = RootCounters()
        self.initialised = trio.Event()  # FUSE_INIT was answered
        self._reader = reader
        self._layers = tuple(layers)
        self._root_nid = reader.root_nid
        self._files: dict[int, _File] = {}
        self._listings: dict[int, _Listing] = {}
        self._next_listing = 1
        self._failures = RepeatFilter(_LOG_PAUSE_S)
        self._absent = pyfuse3.EntryAttributes()
        self._absent.st_ino = pyfuse3.InodeT(0)  # "there is no such name", which the kernel caches
        self._absent.entry_timeout = FOREVER_S
        self._statfs = self._make_statfs()

    # -- identity ----------------------------------------------------------------------------------------

    def _nid(self, inode: int) -> int:
        # FUSE's root is 1. The others are nid + 2, so that nid 0 is neither the root nor "absent".
        return self._root_nid if inode == pyfuse3.ROOT_INODE else inode - 2

    def _attributes(self, nid: int) -> EntryAttributes:
        inode = self._reader.inode(nid)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.ROOT_INODE if nid == self._root_nid else pyfuse3.InodeT(nid + 2)
        entry.entry_timeout = entry.attr_timeout = FOREVER_S
        entry.st_mode = pyfuse3.ModeT(inode.mode)
        entry.st_nlink = inode.nlink
        entry.st_uid = inode.uid
        entry.st_gid = inode.gid
        entry.st_rdev = inode.rdev
        entry.st_size = inode.size
        entry.st_blocks = -(-inode.size // BLOCK_BYTES) * (BLOCK_BYTES // 512)  # as the kernel's EROFS says
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = inode.mtime_ns
        return entry

    def init(self) -> None:
        # libfuse sends its answer as soon as this returns, before any other task can run.
        self.initialised.set()

    # -- metadata ----------------------------------------------------------------------------------------

    @_guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        self.counters.lookups += 1
        if len(name) > NAME_MAX:
            raise FUSEError(errno.ENAMETOOLONG)
        nid = self._reader.lookup(self._nid(parent_inode), name)
        return self._absent if nid is None else self._attributes(nid)

    @_guarded
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(self._nid(inode))

    @_guarded
    async def readlink(self, inode: int, ctx: RequestContext) -> FileNameT:
        return FileNameT(self._reader.readlink(self._nid(inode)))

    @_guarded
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        value = self._reader.xattrs(self._nid(inode)).get(name)
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return value

    @_guarded
    async def listxattr(self, inode: int, ctx: RequestContext) -> list[XAttrNameT]:
        names = self._reader.xattrs(self._nid(inode))
        # As EROFS and others do: only root sees trusted.*.
        return [XAttrNameT(name) for name in names if ctx.uid == 0 or not name.startswith(b"trusted.")]

    @_guarded
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        return self._statfs

    def _make_statfs(self) -> StatvfsData:
        result = pyfuse3.StatvfsData()
        result.f_bsize = result.f_frsize = BLOCK_BYTES
        result.f_blocks = sum(layer.size_bytes for layer in self._layers) // BLOCK_BYTES
        result.f_files = self._reader.inode_count
        result.f_namemax = NAME_MAX
        return result

    @_guarded
    async def opendir(self, inode: int, ctx: RequestContext) -> FileHandleT:
        number = FileHandleT(self._next_listing)
        self._next_listing += 1
        self._listings[number] = _Listing(self._reader, self._nid(inode))
        return number

    @_guarded
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        self.counters.listings += 1
        listing = self._listings[fh]
        number = start_id
        while (entry := listing.entry(number)) is not None:
            name, nid, _ = entry
            number += 1
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), self._attributes(nid), number):
                return

    async def releasedir(self, fh: int) -> None:
        self._listings.pop(fh, None)

    # -- data --------------------------------------------------------------------------------------------

    @_guarded
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        self.counters.opens += 1
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise FUSEError(errno.EROFS)
        nid = self._nid(inode)
        self._file(nid)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(nid), keep_cache=True)

    def _file(self, nid: int) -> _File:
        file = self._files.get(nid)
        if file is None:
            inode = self._reader.inode(nid)
            if inode.kind != Kind.FILE or (inode.size and inode.device < 0):
                raise ImageError(f"inode {nid} has no file data", "the index is damaged: build it again")
            data = self._layers[inode.device] if inode.device >= 0 else None
            file = _File(data, inode.address, inode.size)
            if len(self._files) >= _MAX_KNOWN_FILES:
                self._files.clear()
            self._files[nid] = file
        return file

    @_guarded
    async def read(self, fh: int, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]  # any buffer will do
        file = self._file(fh)
        size = min(size, file.size - off)
        if size <= 0 or file.data is None:
            return b""
        address = file.address + off
        data = file.data.read_cached(address, size)
        if data is None:
            data = await self._fetch(file.data, address, size)
            self.counters.reads_fetched += 1
        else:
            self.counters.reads_cached += 1
        if len(data) != size:
            # The kernel would fill the rest with zeros.
            raise ImageError(f"{len(data)} bytes instead of {size} at address {address} of a layer")
        self.counters.bytes_read += size
        return data

    async def _fetch(self, layer: LayerData, address: int, size: int) -> bytes:
        counters = self.counters
        if counters.waiting >= MAX_WAITING:
            raise HostError(f"more than {MAX_WAITING} reads wait for data", "the registry is too slow")
        counters.waiting += 1
        try:
            return await layer.read(address, size)
        finally:
            counters.waiting -= 1

    async def release(self, fh: int) -> None:
        pass

    # flush, fsync, fsyncdir, access: the base class says ENOSYS; the kernel takes that as success and never
    # asks again. (access is not asked at all under default_permissions.)

    # -- what a read-only root refuses -------------------------------------------------------------------

    async def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise FUSEError(errno.EROFS)

    setattr = mknod = mkdir = unlink = rmdir = symlink = rename = link = _refuse
    write = create = setxattr = removexattr = _refuse

    # -- failures ----------------------------------------------------------------------------------------

    def report(self, what: str, error: Exception) -> None:
        """Counts a failure and logs it, a repeated one only once in a few seconds."""
        self.counters.failures += 1
        text = f"{what}: {error}" if isinstance(error, LazyfsError) else f"{what}: {error!r}"
        if not self._failures.is_new(text):
            return
        if isinstance(error, LazyfsError):
            log.warning("%s", text)
        else:
            log.error("%s", text, exc_info=error)


# An inline attribute entry: no name suffix, index 2 or 3 (erofs_fs.h: POSIX ACL, access and default), value
# size, and a value that starts with version 2 (include/uapi/linux/posix_acl_xattr.h).
_ACL_ENTRY = re.compile(rb"\x00[\x02\x03]..\x02\x00\x00\x00", re.DOTALL)


def may_have_acls(namespace: bytes | memoryview) -> bool:
    """Whether the namespace has anything that looks like a POSIX ACL; never falsely no. Enable ACLs only if it has:
    they make the kernel ask for one per inode that a user other than the owner touches."""
    return _ACL_ENTRY.search(namespace) is not None
