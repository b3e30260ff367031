"""The indexes of layers that the cache keeps (core/index/layerindex.py), whole or in part.

    <cache>/scans/<digest of the layer's blob>/lock                   flock: shared by users, exclusive for eviction
                                              /<index digest>/layer   the whole index, made by this host
                                                             /head-<sha256 of it>
                                                                     what was fetched of one: its head,
                                                             /<n>     and the group of windows at its byte n
                                              /chain-<sha256>         the tree of an image's layers up to this one

What this host made out of the layer itself is of use to every image that has the layer. What was fetched is as
trustworthy as the repository it came from, so mounts use it, whose index names its digests; no new index is made of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Sequence

from lazyfs.cache import places
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.images import index_directory, kept_indexes, read_file, write_small
from lazyfs.cache.locks import lock_shared
from lazyfs.core.index.imageindex import ImageIndex, LayerPart
from lazyfs.core.index.layerindex import LayerHead
from lazyfs.core.oci.digests import DiffId, Digest, sha256_digest
from lazyfs.core.oci.documents import Descriptor
from lazyfs.errors import HostError, ImageError

_HEAD = "head-"


class KeptLayerIndex:
    """What is here of one layer's index; safe from eviction until close(), or until nobody refers to it.

    Methods are synchronous, and may be called from any thread.
    """

    def __init__(self, cache: CacheDirectory, blob_digest: Digest, index_digest: Digest) -> None:
        """HostError: the disk is full or fails."""
        self._lock_fd = -1
        directory = _directory(cache, blob_digest)
        self._directory = os.path.join(directory, index_digest.removeprefix("sha256:"))
        try:
            self._lock_fd = _hold(directory)
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
        except OSError as error:
            raise HostError(f"cannot write to the cache: {error.strerror}", "check the disk") from None

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of it. May be called twice."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    @property
    def is_whole(self) -> bool:
        """Whether all of it is here."""
        return os.path.exists(os.path.join(self._directory, "layer"))

    def head(self, head_bytes: int, head_sha256: str) -> bytes | None:
        """Its first `head_bytes` bytes. They were right when they were filed; what they are made of has checksums.

        An image's index may name another head than the layer's index of that digest has. It gets that one, and nobody
        else does.
        """
        return self._read("layer", 0, head_bytes) or self._read(_HEAD + head_sha256, 0, head_bytes)

    def keep_head(self, head: bytes, head_sha256: str) -> None:
        """Files a head that was verified. It only saves time, so a disk that is full is no error."""
        write_small(self._directory, _HEAD + head_sha256, head)

    def forget(self) -> None:
        """Removes what is here, groups aside: it has turned out to be of no use."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self._directory):
                if name == "layer" or name.startswith(_HEAD):
                    os.unlink(os.path.join(self._directory, name))

    def group(self, offset: int, length: int) -> bytes | None:
        """A group of windows, as stored."""
        return self._read("layer", offset, length) or self._read(str(offset), 0, length)

    def keep_group(self, offset: int, stored: bytes) -> None:
        """Files a group that was fetched, if the disk has room."""
        write_small(self._directory, str(offset), stored)

    def _read(self, name: str, offset: int, length: int) -> bytes | None:
        try:
            with open(os.path.join(self._directory, name), "rb") as file:
                found = os.pread(file.fileno(), length, offset)
        except OSError:
            return None
        return found if len(found) == length else None


class MadeLayer:
    """The whole index of a layer, made by this host. Sizes in bytes."""

    def __init__(self, blob: bytes) -> None:
        """ImageError if it is damaged."""
        self.blob = blob
        self.head = head = LayerHead(blob)
        if head.whole_bytes != len(blob):
            raise ImageError("the index of a layer is cut short")
        self.head_blob = blob[: head.head_bytes]
        self.part = LayerPart(
            head.record, sha256_digest(blob), len(blob), head.head_bytes, hashlib.sha256(self.head_blob).hexdigest()
        )


def load_made(cache: CacheDirectory, layer: Descriptor, diff_id: DiffId) -> MadeLayer | None:
    """The index that this host made of a layer, and notes the use; None if there is none that is whole: read the layer.

    It was made when the blob had the digest, and decoded to the DiffID, that its image gave. Here `layer` and `diff_id`
    are from the image that it is wanted for: all of it has to agree.
    """
    directory = _directory(cache, layer.digest)
    for name in _made_names(directory):
        try:
            with open(os.path.join(directory, name, "layer"), "rb") as file:
                blob = file.read()
            made = MadeLayer(blob)
            if made.part.index_digest != "sha256:" + name:
                continue
            os.utime(os.path.join(directory, places.LOCK))
        except (OSError, ImageError):
            continue
        record = made.head.record
        if (record.blob_digest, record.blob_bytes, record.diff_id) == (layer.digest, layer.size_bytes, diff_id):
            return made
    return None


def made_bytes(cache: CacheDirectory, blob_digest: Digest) -> int | None:
    """How large the index is that this host made of a layer, or None if there is none."""
    directory = _directory(cache, blob_digest)
    for name in _made_names(directory):
        with contextlib.suppress(OSError):
            return os.stat(os.path.join(directory, name, "layer")).st_size
    return None


def keep_made(cache: CacheDirectory, made: MadeLayer) -> None:
    """Keep it. HostError: disk."""
    directory = _directory(cache, made.part.record.blob_digest)
    try:
        lock_fd = _hold(directory)
        try:
            place = os.path.join(directory, made.part.index_digest.removeprefix("sha256:"))
            os.makedirs(place, mode=0o700, exist_ok=True)
            cache.write_atomically(os.path.join(place, "layer"), made.blob)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, "scan"))  # of an older lazyfs
        finally:
            os.close(lock_fd)
    except OSError as error:
        raise HostError(f"cannot write to the cache: {error.strerror}", "check the disk") from None


def copy_index(cache: CacheDirectory, other: CacheDirectory, manifest_digest: Digest) -> None:
    """Gives another cache all that this one has of the index of an image, but no data of its layers. OSError."""
    shutil.copytree(
        index_directory(cache, manifest_digest), index_directory(other, manifest_digest), dirs_exist_ok=True
    )
    for kept in kept_indexes(cache, manifest_digest):
        for part in ImageIndex(kept.blob).parts:
            blob_digest = part.record.blob_digest
            with contextlib.suppress(FileNotFoundError):
                shutil.copytree(_directory(cache, blob_digest), _directory(other, blob_digest), dirs_exist_ok=True)


def load_chain(cache: CacheDirectory, layers: Sequence[Descriptor]) -> ImageIndex | None:
    """The tree of these layers, if it is kept, as the index of an image with these layers. Nothing in it is checked but
    its form."""
    blob = read_file(_chain_path(cache, layers))
    if blob is None:
        return None
    try:
        return ImageIndex(blob)
    except ImageError:
        return None


def keep_chain(cache: CacheDirectory, layers: Sequence[Descriptor], blob: bytes) -> None:
    """Keep the tree of these layers, as the index of an image of them. It only saves time: a full disk is no error."""
    with contextlib.suppress(HostError):
        cache.write_atomically(_chain_path(cache, layers), blob)


def _chain_path(cache: CacheDirectory, layers: Sequence[Descriptor]) -> str:
    chain = hashlib.sha256(" ".join(layer.digest for layer in layers).encode()).hexdigest()
    return os.path.join(_directory(cache, layers[-1].digest), f"chain-{chain}")


def _directory(cache: CacheDirectory, blob_digest: Digest) -> str:
    return cache.scan_path(blob_digest)


def _made_names(directory: str) -> list[str]:
    """Names of the indexes of a layer, of which whole ones may be there."""
    try:
        return sorted(name for name in os.listdir(directory) if len(name) == 64)
    except OSError:
        return []


def _hold(directory: str) -> int:
    """Takes a layer's directory against eviction, making it if it is not there or has just been evicted."""
    path = os.path.join(directory, places.LOCK)
    while True:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        try:
            lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue
        if lock_shared(lock_fd, path):
            return lock_fd
        os.close(lock_fd)
