"""What the cache holds, and making room in it. Only what no mount uses is ever removed.

An entry is in use while anybody holds its lock file shared (locks.py; for upper directories see uppers.py). Removing
takes the lock exclusively, renames the entry out of the way, then deletes: killed anywhere, this leaves a whole entry
or rubbish in tmp/, which the next run sweeps.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass

from lazyfs.cache import uppers
from lazyfs.cache.directory import BlockCache
from lazyfs.cache.locks import exclusive
from lazyfs.cache.places import REMOVED
from lazyfs.core.oci.reference import is_digest
from lazyfs.errors import LazyfsError

# A download in progress owns its directory in tmp/ and touches it all the time; what is this old is rubbish.
_RUBBISH_AGE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A layer, the index directory of an image, the scan of a layer, or an upper directory. Times are seconds since the
    epoch."""

    kind: str  # "layer", "image", "scan" or "upper"
    name: str  # content root, manifest digest or digest of the layer's blob, 64 hex digits; a random one of an upper
    path: str
    size_bytes: int  # on disk, holes not counted
    used_at_s: float
    in_use: bool


def entries(cache: BlockCache) -> list[Entry]:
    """Everything in the cache, least recently used first."""
    found = []
    for kind, folder in (("layer", "layers"), ("image", "indexes"), ("scan", "scans")):
        directory = os.path.join(cache.path, folder)
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            lock = os.path.join(path, "lock")
            with contextlib.suppress(FileNotFoundError):
                used_at_s = os.stat(lock if os.path.exists(lock) else path).st_mtime
                with exclusive(lock) as free:
                    in_use = not free and os.path.exists(lock)
                found.append(Entry(kind, name, path, _disk_bytes(path), used_at_s, in_use))
    for upper in uppers.records(cache.path):
        size_bytes = _disk_bytes(upper.path)
        found.append(
            Entry("upper", os.path.basename(upper.path), upper.path, size_bytes, upper.made_at_s, upper.held)
        )
    return sorted(found, key=lambda entry: entry.used_at_s)


def remove(cache: BlockCache, entry: Entry) -> bool:
    """Removes one entry unless somebody uses it; says whether it is gone."""
    if entry.kind == "upper":
        return uppers.remove(cache.path, entry.path)
    lock = os.path.join(entry.path, "lock")
    if os.path.exists(lock):
        with exclusive(lock) as free:
            if not free:
                return False
            grave = cache.set_aside(entry.path)
    else:
        grave = cache.set_aside(entry.path)  # without a lock it is not in use: a scan, or what has lost its lock
    _delete(grave)
    return not os.path.lexists(entry.path)


def _delete(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        os.unlink(path)


def collect(cache: BlockCache, max_bytes: int) -> tuple[int, int]:
    """Removes least recently used entries until the cache is at most `max_bytes`; 0 removes all unused ones.

    Returns bytes freed and bytes left. Also sweeps what interrupted runs left in tmp/, and references to
    images that are gone. Upper directories that nobody holds go in any case: no mount will use them again.
    """
    _sweep(cache)
    listed = entries(cache)
    total = sum(entry.size_bytes for entry in listed)
    freed = 0
    for entry in sorted(listed, key=lambda entry: entry.kind != "upper"):
        if entry.kind != "upper" and max_bytes and total - freed <= max_bytes:
            break
        if not entry.in_use and remove(cache, entry):
            freed += entry.size_bytes
    references = os.path.join(cache.path, "refs")
    for name in os.listdir(references):
        path = os.path.join(references, name)
        with contextlib.suppress(OSError), open(path, "rb") as file:
            digest = file.read(256).decode("ascii", "replace")
            directory = os.path.join(cache.path, "indexes", digest.removeprefix("sha256:"))
            if not is_digest(digest) or not os.path.exists(directory):
                os.unlink(path)
    return freed, total - freed


def verify(cache: BlockCache) -> tuple[int, int, list[str]]:
    """Checks every block against its sha256. Returns blocks checked, blocks found damaged (now absent, so
    that they are fetched again), and the content roots of entries that cannot be opened at all."""
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


def _sweep(cache: BlockCache) -> None:
    directory = os.path.join(cache.path, "tmp")
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        with contextlib.suppress(OSError):
            if time.time() - max(os.stat(path).st_mtime, _newest(path)) > _RUBBISH_AGE_S or name.startswith(
                REMOVED
            ):
                _delete(path)


def _newest(path: str) -> float:
    if not os.path.isdir(path):
        return 0.0
    with os.scandir(path) as entries:
        return max((entry.stat(follow_symlinks=False).st_mtime for entry in entries), default=0.0)


def _disk_bytes(path: str) -> int:
    total = 0
    for directory, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(directory, name)).st_blocks * 512
    return total
