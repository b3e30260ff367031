"""Lock files of the cache directory: flock(2), shared by who uses an entry, exclusive for who removes it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator


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
