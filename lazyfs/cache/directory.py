"""The block cache: decoded file data of layers, shared by all images and processes of a host.

    <cache>/version                     "1"
    <cache>/layers/<content root>/      an entry, see cache/layer.py
    <cache>/indexes/<manifest digest>/  see serving/store.py
    <cache>/scans/<digest of a blob>/   see scans.py
    <cache>/refs/                       see images/resolve.py
    <cache>/uppers/                     see uppers.py
    <cache>/tmp/                        what is being made, and what was set aside
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile

from lazyfs.cache.layer import CachedLayer, allocate
from lazyfs.cache.locks import lock_shared
from lazyfs.cache.places import REMOVED
from lazyfs.core.layer.blocks import BlockTable
from lazyfs.errors import HostError, ImageError

_VERSION = b"1\n"
_CREATE_TRIES = 16


class BlockCache:
    """The cache directory. Cheap to open; any number of processes may use it at once."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)
            for name in ("layers", "indexes", "scans", "refs", "tmp"):
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
                        allocate(file.fileno(), max(8, 8 * opened.count))
            os.rename(temporary, path)
        except OSError as error:
            if temporary:
                shutil.rmtree(temporary, ignore_errors=True)
            if not os.path.lexists(path):
                raise HostError(f"cannot create a cache entry: {error.strerror}", "check the disk") from None
            if not os.path.exists(os.path.join(path, "lock")):  # else another process was faster
                self.set_aside(path)

    def peek(self, content_root: str) -> tuple[BlockTable, memoryview] | None:
        """A layer's block table and marks (0: absent) as they are now; None if there is no whole entry.

        Takes no lock and counts as no use: the entry may vanish at any time.
        """
        path = self.layer_path(content_root)
        try:
            with open(os.path.join(path, "table"), "rb") as file:
                table = BlockTable(file.read())
            with open(os.path.join(path, "present"), "rb") as file:
                marks = memoryview(file.read(8 * table.count)).cast("Q")
        except (OSError, ImageError, TypeError):  # TypeError: `present` is no whole number of marks
            return None
        if table.content_root != content_root or len(marks) != table.count:
            return None
        return table, marks

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
