"""What the cache holds, and evicting from it. Nothing that a mount uses is ever removed.

Profiles are little and make the next cold start quick, so they go last, and only if all else did not suffice.

An entry is in use while anybody holds its lock file shared (locks.py; for upper directories see uppers.py). Removing
takes the lock exclusively, renames the entry out of the way, then deletes it. A process killed in between leaves a
whole entry, or rubbish in tmp/ that the next run sweeps.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass

from lazyfs.cache import uppers
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.locks import Exclusive
from lazyfs.cache.places import LOCK, REMOVED
from lazyfs.cache.profiles import trim_profiles
from lazyfs.core.oci.digests import ContentRoot, Digest, is_digest
from lazyfs.errors import LazyfsError

# A download in progress touches its directory in tmp/ all the time: whatever is so old is rubbish.
_RUBBISH_AGE_S = 3600.0
_TURN = {"upper": 0, "profile": 2}  # whose turn it is to go; all others: 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A layer's data, an image's documents, a layer's indexes, an image's profile, or an upper directory. Times in s
    since the epoch."""

    kind: str  # "layer", "image", "scan" (indexes of a layer), "profile" or "upper"
    name: str  # 64 hex digits: content root, manifest digest or digest of the layer's blob; random for an upper
    path: str
    size_bytes: int  # on disk, holes not counted
    used_at_s: float
    in_use: bool


def entries(cache: CacheDirectory) -> list[Entry]:
    """Everything in the cache, least recently used first."""
    found = []
    for kind, path in cache.entry_paths():
        lock = os.path.join(path, LOCK)
        with contextlib.suppress(FileNotFoundError):
            used_at_s = os.stat(lock if os.path.exists(lock) else path).st_mtime
            with Exclusive(lock) as free:
                in_use = not free and os.path.exists(lock)
            found.append(Entry(kind, os.path.basename(path), path, _disk_bytes(path), used_at_s, in_use))
    for upper in uppers.records(cache.path):
        size_bytes = _disk_bytes(upper.path)
        found.append(
            Entry("upper", os.path.basename(upper.path), upper.path, size_bytes, upper.made_at_s, upper.held)
        )
    return sorted(found, key=lambda entry: entry.used_at_s)


def remove(cache: CacheDirectory, entry: Entry) -> bool:
    """Removes one entry unless it is in use. Returns whether it is gone."""
    if entry.kind == "upper":
        return uppers.remove(cache.path, entry.path)
    lock = os.path.join(entry.path, LOCK)
    if os.path.exists(lock):
        with Exclusive(lock) as free:
            if not free:
                return False
            grave = cache.set_aside(entry.path)
    else:
        grave = cache.set_aside(entry.path)  # it lost its lock file, so nobody can use it
    _delete(grave)
    return not os.path.lexists(entry.path)


def _delete(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        os.unlink(path)


def collect(cache: CacheDirectory, max_bytes: int | None) -> tuple[int, int]:
    """Evicts least recently used entries until the cache is at most `max_bytes`; None: all that are not in use.

    Returns bytes freed and bytes left. Profiles are removed last, and not at all by None. Removes in any case upper
    directories that nobody holds, since no mount will use them again, rubbish in tmp/ and among the profiles, and
    references to images that are gone.
    """
    trim_profiles(cache, check=True)
    _sweep(cache)
    listed = entries(cache)
    total = sum(entry.size_bytes for entry in listed)
    freed = 0
    for entry in sorted(listed, key=lambda entry: _TURN.get(entry.kind, 1)):
        if entry.kind != "upper" and max_bytes is not None and total - freed <= max_bytes:
            break
        if entry.kind == "profile" and max_bytes is None:
            break
        if not entry.in_use and remove(cache, entry):
            freed += entry.size_bytes
    for path in cache.reference_paths():
        with contextlib.suppress(OSError), open(path, "rb") as file:
            digest = file.read(256).decode("ascii", "replace")
            if not is_digest(digest) or not os.path.exists(cache.image_path(Digest(digest))):
                os.unlink(path)
    return freed, total - freed


def verify(cache: CacheDirectory) -> tuple[int, int, list[ContentRoot]]:
    """Checks every present block against its sha256 and marks damaged ones absent, so that they are fetched again.

    Returns the number of blocks checked, the number of damaged ones, and the content roots of entries that cannot be
    opened.
    """
    checked = damaged = 0
    broken = []
    for content_root in cache.content_roots():
        try:
            layer = cache.open_layer(content_root)
            if layer is None:
                continue
        except LazyfsError:
            broken.append(content_root)
            continue
        try:
            checked += layer.present_blocks()
            damaged += len(layer.verify())
        finally:
            layer.close()
    return checked, damaged, broken


def _sweep(cache: CacheDirectory) -> None:
    for name in os.listdir(cache.tmp):
        path = os.path.join(cache.tmp, name)
        with contextlib.suppress(OSError):
            age_s = time.time() - max(os.stat(path).st_mtime, _newest(path))
            if age_s > _RUBBISH_AGE_S or name.startswith(REMOVED):
                _delete(path)


def _newest(path: str) -> float:
    if not os.path.isdir(path):
        return 0.0
    with os.scandir(path) as entries:
        return max((entry.stat(follow_symlinks=False).st_mtime for entry in entries), default=0.0)


def _disk_bytes(path: str) -> int:
    total = 0 if os.path.isdir(path) else os.stat(path).st_blocks * 512
    for directory, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(directory, name)).st_blocks * 512
    return total
