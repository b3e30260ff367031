"""What starts of an image touch, as this host saw it (core/starts/profile.py).

    <cache>/profiles/<manifest digest, hex>   the image's reference, a line feed, the profile; mtime = last change

Small files that outlive the image's data: the next cold start is fetched by them. A damaged one counts as none.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Collection, Iterator
from typing import NamedTuple

from lazyfs.cache.directory import CacheDirectory
from lazyfs.core.oci.digests import ContentRoot, Digest
from lazyfs.core.oci.reference import MAX_REFERENCE_CHARS, parse_reference, repository_of
from lazyfs.core.starts.profile import LAYERS_BYTES, MAX_PROFILE_BYTES, Profile, layers_of, learn
from lazyfs.errors import HostError, ImageError, UserError

# Those last changed are kept. A profile of 2,000 touches takes 40 kB.
MAX_PROFILES = 512
MAX_ALL_BYTES = 32 << 20
# How many profiles of other images are looked at for one image.
MAX_SIMILAR = 8
_MAX_REFERENCE_BYTES = 4 * MAX_REFERENCE_CHARS  # UTF-8
# Another process merges for some milliseconds. Without the lock, what it adds may be lost, and nothing else.
_LOCK_S = 2.0
_LOCK_TRY_S = 0.01


class _Stamp(NamedTuple):
    """The beginning of a file."""

    repository: str
    layers: frozenset[ContentRoot]


def load_profile(cache: CacheDirectory, manifest_digest: Digest) -> Profile | None:
    """The profile of an image; None if there is none that can be read. Raises nothing: it only saves time."""
    return _load(cache.profile_path(manifest_digest))


def _load(path: str) -> Profile | None:
    _, line_end, data = _beginning(path, _MAX_REFERENCE_BYTES + MAX_PROFILE_BYTES + 2).partition(b"\n")
    try:
        return Profile.decode(memoryview(data)) if line_end else None
    except ImageError:
        return None


def _beginning(path: str, limit_bytes: int) -> bytes:
    """The first bytes of a file; b"" if it is none."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            return b""
        with open(path, "rb") as file:
            return file.read(limit_bytes)
    except OSError:
        return b""


def keep_profile(
    cache: CacheDirectory, manifest_digest: Digest, reference: str, start: Profile, *, partial: bool = False
) -> Profile:
    """Adds what one start touched (or several: a profile) to the image's profile; returns that.

    `reference`: the image's canonical one. `partial` as for learn(). Several processes may do so at once. It hashes,
    compresses and waits: not for the trio thread. HostError: disk.
    """
    with _alone(cache):
        profile = learn(load_profile(cache, manifest_digest), start, partial=partial)
        line = reference.encode("utf-8", "surrogateescape").replace(b"\n", b" ")[:_MAX_REFERENCE_BYTES]
        cache.write_atomically(cache.profile_path(manifest_digest), line + b"\n" + profile.encode())
        trim_profiles(cache)
    return profile


def trim_profiles(cache: CacheDirectory, *, check: bool = False) -> None:
    """Removes the oldest of too many; with `check` also what is no profile at all."""
    ages = []
    for path in cache.profile_paths():
        with contextlib.suppress(OSError):
            status = os.stat(path)
            ages.append((status.st_mtime_ns, status.st_size, path))
    total = 0
    for number, (_, size_bytes, path) in enumerate(sorted(ages, reverse=True)):
        total += size_bytes
        if number >= MAX_PROFILES or total > MAX_ALL_BYTES or (check and _load(path) is None):
            with contextlib.suppress(OSError):
                os.unlink(cache.set_aside(path))  # what is no file goes with the rubbish


def profiles_with(
    cache: CacheDirectory, content_roots: Collection[ContentRoot], repository: str, *, but: Digest | None = None
) -> list[Profile]:
    """Profiles of images that share layers with one of these `content_roots`, or lie in the same repository (as
    `repository_of` gives it): the most similar first, MAX_SIMILAR at most.

    Other versions in the repository come first, the last changed one before all; then images by the number of layers
    that they share. `but`: an image that is left out. It reads the beginning of each profile's file.
    """
    wanted = frozenset(content_roots)
    left_out = cache.profile_path(but) if but is not None else None
    found = []
    for path in cache.profile_paths():
        stamp = _stamp(path) if path != left_out else None
        if stamp is None:
            continue
        same, shared = stamp.repository == repository, len(stamp.layers & wanted)
        if same or shared:
            with contextlib.suppress(OSError):
                found.append((same, 0 if same else shared, os.stat(path).st_mtime_ns, path))
    profiles = (_load(path) for *_, path in sorted(found, reverse=True)[:MAX_SIMILAR])
    return [profile for profile in profiles if profile is not None]


def _stamp(path: str) -> _Stamp | None:
    """Which image's profile a file has, without decoding it; None if it is none."""
    line, _, data = _beginning(path, _MAX_REFERENCE_BYTES + 1 + LAYERS_BYTES).partition(b"\n")
    try:
        layers = frozenset(layers_of(data))
    except ImageError:
        return None
    try:
        repository = repository_of(parse_reference(line.decode("utf-8", "surrogateescape")))
    except UserError:
        repository = ""  # of a later version of lazyfs
    return _Stamp(repository, layers)


@contextlib.contextmanager
def _alone(cache: CacheDirectory) -> Iterator[None]:
    """Keeps other processes from merging meanwhile, if they let go within _LOCK_S."""
    directory = os.path.dirname(cache.profile_path(Digest("")))
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot open {directory}: {error.strerror}", "check the disk") from None
    try:
        deadline_s = time.monotonic() + _LOCK_S
        while time.monotonic() < deadline_s:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOCK_TRY_S)
        yield
    finally:
        os.close(fd)
