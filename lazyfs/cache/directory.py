"""The cache directory, shared by all images and processes of a host.

    <cache>/version                     "1"
    <cache>/layers/<content root>/      an entry: decoded file data of a layer, see layer.py
    <cache>/indexes/<manifest digest>/  documents and index of an image, see images.py
    <cache>/scans/<digest of a blob>/   the index of a layer, see scans.py
    <cache>/profiles/<manifest digest>  what starts of an image touch, see profiles.py
    <cache>/refs/<key>                  the manifest digest that a reference led to, see images/resolve.py
    <cache>/uppers/<random>/            an upper directory, see uppers.py
    <cache>/tmp/                        what is being made, and what was removed

The names are declared in places.py. Only this room knows them: others ask here where something is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from lazyfs.cache import places
from lazyfs.cache.layer import DATA, PRESENT, TABLE, CachedLayer, allocate
from lazyfs.cache.locks import lock_shared
from lazyfs.core.layer.blocks import BlockTable
from lazyfs.core.oci.digests import ContentRoot, Digest
from lazyfs.errors import HostError, ImageError

_VERSION = b"1\n"
_CREATE_TRIES = 16
# Kinds of entries that are evicted one by one, and where they lie.
_FOLDERS = {"layer": places.LAYERS, "image": places.INDEXES, "scan": places.SCANS, "profile": places.PROFILES}


class CacheDirectory:
    """The cache directory. Cheap to open; any number of processes may use it at once."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)
            for name in (*_FOLDERS.values(), places.REFS, places.TMP):
                os.makedirs(os.path.join(path, name), mode=0o700, exist_ok=True)
            version = os.path.join(path, places.VERSION)
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

    # -- where things are, whether they exist or not ------------------------------------------------------

    def layer_path(self, content_root: ContentRoot) -> str:
        """The directory of a layer's entry."""
        return os.path.join(self.path, places.LAYERS, content_root)

    def image_path(self, manifest_digest: Digest) -> str:
        """The directory of an image's documents and index."""
        return places.image_path(self.path, manifest_digest)

    def scan_path(self, blob_digest: Digest) -> str:
        """The directory of the index of a layer."""
        return os.path.join(self.path, places.SCANS, blob_digest.removeprefix("sha256:"))

    def profile_path(self, manifest_digest: Digest) -> str:
        """The file that has an image's profile."""
        return os.path.join(self.path, places.PROFILES, manifest_digest.removeprefix("sha256:"))

    def profile_paths(self) -> list[str]:
        """All files that a `profile_path` is the path of."""
        directory = os.path.join(self.path, places.PROFILES)
        return [os.path.join(directory, name) for name in os.listdir(directory)]

    def reference_path(self, key: str) -> str:
        """The file that has the manifest digest to which a reference led."""
        return os.path.join(self.path, places.REFS, key)

    @property
    def tmp(self) -> str:
        """The directory for what is being made. Whatever an interrupted process leaves there is swept."""
        return os.path.join(self.path, places.TMP)

    def entry_paths(self) -> Iterator[tuple[str, str]]:
        """(kind, path) of everything that can be evicted by itself: layers, images, indexes of layers, and profiles."""
        for kind, folder in _FOLDERS.items():
            directory = os.path.join(self.path, folder)
            for name in os.listdir(directory):
                yield kind, os.path.join(directory, name)

    def reference_paths(self) -> list[str]:
        """All files that a `reference_path` is the path of."""
        return [self.reference_path(key) for key in os.listdir(os.path.join(self.path, places.REFS))]

    # -- writing -----------------------------------------------------------------------------------------

    def write_atomically(self, path: str, data: bytes) -> None:
        """Writes a whole file so that a reader sees the old or the new one (rename). HostError: the disk fails."""
        temporary = ""
        try:
            fd, temporary = tempfile.mkstemp(dir=self.tmp)
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

    # -- layers ------------------------------------------------------------------------------------------

    def has_layer(self, content_root: ContentRoot) -> bool:
        """Whether a layer seems to be here: open_layer() will tell."""
        return os.path.exists(os.path.join(self.layer_path(content_root), TABLE))

    def open_layer(self, content_root: ContentRoot) -> CachedLayer | None:
        """The layer's entry, locked against eviction; None if there is none. The caller closes it.

        ImageError: the entry is damaged; create_layer() replaces it. HostError: it cannot be opened.
        """
        path = self.layer_path(content_root)
        lock_path = os.path.join(path, places.LOCK)
        while True:
            try:
                lock_fd = os.open(lock_path, os.O_RDWR | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                raise HostError(
                    f"cannot open the cache entry {path}: {error.strerror}", "check the disk"
                ) from None
            if lock_shared(lock_fd, lock_path):
                return CachedLayer(path, lock_fd)
            os.close(lock_fd)

    def create_layer(self, content_root: ContentRoot, table: bytes) -> CachedLayer:
        """Opens the layer's entry; makes an empty one if there is none that is whole. The caller closes it.

        ImageError: `table` does not have that content root. HostError: the disk is full or fails.
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

    def _make_layer(self, content_root: ContentRoot, table: bytes, opened: BlockTable) -> None:
        path = self.layer_path(content_root)
        temporary = ""
        try:
            temporary = tempfile.mkdtemp(dir=self.tmp)
            for name, content in ((TABLE, table), (DATA, b""), (PRESENT, b""), (places.LOCK, b"")):
                with open(os.path.join(temporary, name), "wb") as file:
                    file.write(content)
                    if name == DATA:
                        file.truncate(opened.device_bytes)
                    elif name == PRESENT:
                        allocate(file.fileno(), max(8, 8 * opened.count))
            os.rename(temporary, path)
        except OSError as error:
            if temporary:
                shutil.rmtree(temporary, ignore_errors=True)
            if not os.path.lexists(path):
                raise HostError(f"cannot create a cache entry: {error.strerror}", "check the disk") from None
            if not os.path.exists(os.path.join(path, places.LOCK)):  # else another process was faster
                self.set_aside(path)

    def peek(self, content_root: ContentRoot) -> tuple[BlockTable, memoryview] | None:
        """A layer's block table and its marks (0: absent) of this moment; None if there is no whole entry.

        Takes no lock and does not count as use: the entry may be evicted at any time.
        """
        path = self.layer_path(content_root)
        try:
            with open(os.path.join(path, TABLE), "rb") as file:
                table = BlockTable(file.read())
            with open(os.path.join(path, PRESENT), "rb") as file:
                marks = memoryview(file.read(8 * table.count)).cast("Q")
        except (OSError, ImageError, TypeError):  # TypeError: `present` is no whole number of marks
            return None
        if table.content_root != content_root or len(marks) != table.count:
            return None
        return table, marks

    def set_aside(self, path: str) -> str:
        """Renames an entry out of the way and returns its new path. The caller deletes it, or `lazyfs cache gc` does.
        """
        name = f"{places.REMOVED}{os.getpid()}-{os.urandom(4).hex()}-{os.path.basename(path)}"
        grave = os.path.join(self.tmp, name)
        with contextlib.suppress(OSError):
            os.rename(path, grave)
        return grave

    def content_roots(self) -> list[ContentRoot]:
        """Content roots of all layers that have an entry."""
        names = os.listdir(os.path.join(self.path, places.LAYERS))
        return sorted(ContentRoot(name) for name in names if len(name) == 64)
