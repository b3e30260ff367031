"""What the cache keeps of one image, by manifest digest."""

from __future__ import annotations

import os

from lazyfs.cache.directory import BlockCache
from lazyfs.errors import HostError


def index_directory(cache: BlockCache, manifest_digest: str) -> str:
    """Where everything about one image manifest is kept."""
    return cache.image_path(manifest_digest)


def make_index_directory(cache: BlockCache, manifest_digest: str) -> str:
    """Makes that place, or notes that it is in use; returns it. HostError: disk."""
    directory = index_directory(cache, manifest_digest)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with open(os.path.join(directory, "lock"), "ab"):  # first: without it the directory counts as rubbish
            os.utime(os.path.join(directory, "lock"))
        os.makedirs(os.path.join(directory, "groups"), mode=0o700, exist_ok=True)
    except OSError as error:
        raise HostError(f"cannot write to the cache: {error.strerror}", "check the disk") from None
    return directory


def has_index(cache: BlockCache, manifest_digest: str) -> bool:
    """Whether an index of that image is in the cache."""
    return os.path.exists(os.path.join(index_directory(cache, manifest_digest), "index"))


def keep_index(cache: BlockCache, manifest_digest: str, blob: bytes, windows_digest: str) -> None:
    """Files an index in the cache; the index itself last, since its presence says that all is there."""
    directory = make_index_directory(cache, manifest_digest)
    cache.write_atomically(os.path.join(directory, "windows"), windows_digest.encode())
    cache.write_atomically(os.path.join(directory, "index"), blob)


def read_file(path: str) -> bytes | None:
    """A small file of the cache; None if there is none. HostError: disk."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}", "check the disk") from None
