"""What the cache keeps of one image, by manifest digest.

    <cache>/indexes/<manifest digest, hex>/manifest          the image manifest, verbatim
                                          /config            the image config, verbatim
                                          /image-made        its index (core/index/imageindex.py), made by this host
                                          /image-attached    its index, as its own repository has it
                                          /image-elsewhere   its index, as an index repository has it, behind a line
                                                             that names that
                                          /lacks-<sha256>    an index repository had none, and when
                                          /packs             startup packs that were found attached to it, and when
                                          /namespace.erofs   the EROFS metadata of the index, as a file
                                          /index, /windows   an index of version 1, and the digest of its windows blob
                                          /groups/           windows of that, one file a group
                                          /lock              as for layers (cache/directory.py)
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from typing import NamedTuple

from lazyfs.cache import places
from lazyfs.cache.directory import CacheDirectory
from lazyfs.core.oci.digests import Digest
from lazyfs.errors import HostError

# The index of an image as this host made it, and as a registry had it. Names apart, for they are not trusted alike: a
# new index is made out of the first kind only.
_MADE, _ATTACHED, _ELSEWHERE = "image-made", "image-attached", "image-elsewhere"
_V1, _V1_WINDOWS = "index", "windows"
_INDEXES = (_MADE, _ATTACHED, _ELSEWHERE, _V1)
_PACKS = "packs"
# How long nobody is asked again who said what he has of an image.
LACKING_S = 300.0
_MAX_NOTE_BYTES = 64 << 10


def index_directory(cache: CacheDirectory, manifest_digest: Digest) -> str:
    """Where everything about one image manifest is kept."""
    return cache.image_path(manifest_digest)


def make_index_directory(cache: CacheDirectory, manifest_digest: Digest) -> str:
    """Makes that place, or notes that it is in use; returns it. HostError: disk."""
    directory = index_directory(cache, manifest_digest)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with open(os.path.join(directory, places.LOCK), "ab"):  # first: without it the directory counts as rubbish
            os.utime(os.path.join(directory, places.LOCK))
    except OSError as error:
        raise HostError(f"cannot write to the cache: {error.strerror}", "check the disk") from None
    return directory


class KeptIndex(NamedTuple):
    """An index of an image in the cache."""

    blob: bytes
    # Who has it, so that what is missing here can be fetched from there: an index repository, "" for the image's own
    # repository, None for nobody: it was made here.
    place: str | None


def has_index(cache: CacheDirectory, manifest_digest: Digest) -> bool:
    """Whether an index of that image is in the cache, of whatever version."""
    directory = index_directory(cache, manifest_digest)
    return any(os.path.exists(os.path.join(directory, name)) for name in _INDEXES)


def kept_indexes(cache: CacheDirectory, manifest_digest: Digest) -> list[KeptIndex]:
    """The indexes of version 2 that are kept of an image, the one to take first. HostError: disk."""
    directory = index_directory(cache, manifest_digest)
    found = []
    for name, place in ((_MADE, None), (_ATTACHED, "")):
        blob = read_file(os.path.join(directory, name))
        if blob is not None:
            found.append(KeptIndex(blob, place))
    named, _, blob = (read_file(os.path.join(directory, _ELSEWHERE)) or b"").partition(b"\n")
    if named:
        found.append(KeptIndex(blob, os.fsdecode(named)))
    return found


def keep_index(cache: CacheDirectory, manifest_digest: Digest, blob: bytes, place: str | None) -> None:
    """Files an index of version 2. `place`: as in KeptIndex; None if this host made it out of the layers."""
    directory = make_index_directory(cache, manifest_digest)
    if place:
        # One file, so that the index and where the rest of it is never come apart.
        cache.write_atomically(os.path.join(directory, _ELSEWHERE), os.fsencode(place) + b"\n" + blob)
    else:
        cache.write_atomically(os.path.join(directory, _MADE if place is None else _ATTACHED), blob)


def note_lacking(cache: CacheDirectory, manifest_digest: Digest, place: str) -> None:
    """An index repository said that it has no index of that image. It only saves time: a full disk is no error."""
    write_small(make_index_directory(cache, manifest_digest), _lacking(place), str(int(time.time())).encode())


def is_lacking(cache: CacheDirectory, manifest_digest: Digest, place: str) -> bool:
    """Whether it said so just now (LACKING_S)."""
    noted = read_file(os.path.join(index_directory(cache, manifest_digest), _lacking(place))) or b""
    return noted.isdigit() and 0 <= time.time() - int(noted[:20]) < LACKING_S


def forget_lacking(cache: CacheDirectory, manifest_digest: Digest, place: str) -> None:
    """It has one now."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(index_directory(cache, manifest_digest), _lacking(place)))


def note_packs(cache: CacheDirectory, manifest_digest: Digest, note: bytes) -> None:
    """Files which packs are attached to an image. It only saves time: a full disk is no error."""
    content = b"%d\n%b" % (time.time(), note)
    write_small(make_index_directory(cache, manifest_digest), _PACKS, content)


def noted_packs(cache: CacheDirectory, manifest_digest: Digest) -> bytes | None:
    """What was filed just now (LACKING_S)."""
    noted = read_file(os.path.join(index_directory(cache, manifest_digest), _PACKS)) or b""
    time_s, _, note = noted[:_MAX_NOTE_BYTES].partition(b"\n")
    return note if time_s.isdigit() and 0 <= time.time() - int(time_s[:20]) < LACKING_S else None


def forget_packs(cache: CacheDirectory, manifest_digest: Digest) -> None:
    """They may be others now."""
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(index_directory(cache, manifest_digest), _PACKS))


def _lacking(place: str) -> str:
    return f"lacks-{hashlib.sha256(os.fsencode(place)).hexdigest()}"


def kept_v1_index(cache: CacheDirectory, manifest_digest: Digest) -> tuple[bytes, str] | None:
    """An index of version 1 that is kept of an image, and the digest of its windows blob."""
    directory = index_directory(cache, manifest_digest)
    blob = read_file(os.path.join(directory, _V1))
    if blob is None:
        return None
    return blob, (read_file(os.path.join(directory, _V1_WINDOWS)) or b"").decode("ascii", "replace")


def keep_v1_index(cache: CacheDirectory, manifest_digest: Digest, blob: bytes, windows_digest: str) -> None:
    """Files an index of version 1; the index itself last, since its presence says that all is there."""
    directory = make_index_directory(cache, manifest_digest)
    cache.write_atomically(os.path.join(directory, _V1_WINDOWS), windows_digest.encode())
    cache.write_atomically(os.path.join(directory, _V1), blob)


def forget_indexes(cache: CacheDirectory, manifest_digest: Digest) -> None:
    """Removes all that are kept of an image: they have turned out to be of no use."""
    for name in _INDEXES:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(index_directory(cache, manifest_digest), name))


def namespace_path(cache: CacheDirectory, manifest_digest: Digest) -> str:
    """Where the namespace of an image is, as a file for the kernel."""
    return os.path.join(index_directory(cache, manifest_digest), places.NAMESPACE)


class WindowGroups:
    """Groups of windows in a directory of their own, made when it is needed: files named by their offsets in a blob."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def close(self) -> None:
        """Nothing: the image's directory is held by whoever has the image open."""

    def forget(self) -> None:
        """Nothing: each group is checked when it is used."""

    def group(self, offset: int, length: int) -> bytes | None:
        """A group, as stored, if it is here."""
        try:
            with open(os.path.join(self._directory, str(offset)), "rb") as file:
                found = file.read(length + 1)
        except OSError:
            return None
        return found if len(found) == length else None

    def keep_group(self, offset: int, stored: bytes) -> None:
        """Files a group that was fetched. It only saves time, so a disk that is full is no error."""
        write_small(self._directory, str(offset), stored)


def v1_windows(cache: CacheDirectory, manifest_digest: Digest) -> WindowGroups:
    """The groups of windows that are kept of an index of version 1."""
    return WindowGroups(os.path.join(index_directory(cache, manifest_digest), "groups"))


def write_small(directory: str, name: str, data: bytes) -> None:
    """Writes a file of tens of kilobytes if the disk has room. Not synced: well below what a thread would cost."""
    path = os.path.join(directory, name)
    temporary = f"{path}.{os.getpid()}"
    with contextlib.suppress(OSError):
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)


def read_file(path: str) -> bytes | None:
    """A small file of the cache; None if there is none. HostError: disk."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}", "check the disk") from None
