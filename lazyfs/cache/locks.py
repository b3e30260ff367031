"""Lock files of the cache directory: flock(2), shared by who uses an entry, exclusive for who removes it."""

from __future__ import annotations

import fcntl
import os


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


class Exclusive:
    """A context manager that says whether nobody holds the lock file. While the context lasts nobody can take it.
    Missing file: False. (A class, because contextlib takes 4 ms to import.)"""

    def __init__(self, lock_path: str) -> None:
        self._path = lock_path
        self._fd = -1

    def __enter__(self) -> bool:
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _still_named(self._fd, self._path)
        except BlockingIOError:
            return False
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
