"""Reads files of a mounted image from the host, never following the image's symlinks out of it.

Every path goes through openat2(2) with RESOLVE_IN_ROOT. Files are opened by O_PATH first and checked, so that opening a
FIFO cannot block and no device is touched (CVE-2024-9676 and its kin).
"""

from __future__ import annotations

import errno
import os
import stat

from lazyfs.containers.accounts import MAX_ACCOUNT_FILE_BYTES
from lazyfs.errors import HostError, ImageError
from lazyfs.system.syscalls import SyscallError, openat2_in_root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

_MAX_SYMLINKS = 40  # as the kernel: path_resolution(7)
_MAX_PATH_BYTES = 4096
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EXDEV)


class ImageRoot:
    """A root file system mounted at `path`, seen from the host. A context manager: it holds a descriptor."""

    def __init__(self, path: str) -> None:
        """Raises HostError if `path` is not a directory."""
        try:
            self._fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"cannot open the root file system {path}: {error.strerror}") from None

    def __enter__(self) -> ImageRoot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def read_account_file(self, path: str) -> bytes:
        """The bytes of /etc/passwd or /etc/group; b"" if there is none or it is not a regular file.

        Raises ImageError if it is larger than MAX_ACCOUNT_FILE_BYTES, HostError if it cannot be read.
        """
        with self._opened(path) as fd:
            if fd is None or not stat.S_ISREG(os.fstat(fd).st_mode):
                return b""
            try:
                with open(f"/proc/self/fd/{fd}", "rb", buffering=0) as file:
                    content = bytearray()
                    while chunk := file.read(MAX_ACCOUNT_FILE_BYTES + 1 - len(content)):
                        content += chunk
            except OSError as error:
                raise HostError(
                    f"cannot read the image's {path}: {error.strerror}",
                    "see the log of the lazyfs daemon; `lazyfs stats` counts failed fetches",
                ) from None
        if len(content) > MAX_ACCOUNT_FILE_BYTES:
            raise ImageError(f"the image's {path} is larger than {MAX_ACCOUNT_FILE_BYTES} bytes")
        return bytes(content)

    def status(self, path: str) -> os.stat_result | None:
        """What `path` is, symlinks followed inside the image; None if it does not exist."""
        with self._opened(path) as fd:
            return None if fd is None else os.fstat(fd)

    def is_empty(self, path: str) -> bool:
        """Whether the directory `path` has no entries."""
        with self._opened(path) as fd:
            if fd is None:
                return True
            listing_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                with os.scandir(listing_fd) as entries:
                    return next(entries, None) is None
            finally:
                os.close(listing_fd)

    def is_read_only(self) -> bool:
        """Whether the mount of the root, or its file system, refuses writes."""
        return bool(os.fstatvfs(self._fd).f_flag & os.ST_RDONLY)

    def canonical(self, path: str) -> str:
        """The absolute path without symlinks that `path` means inside the image. Parts that do not exist are
        kept as written. Raises ImageError for more than 40 symlinks, or a path over 4096 bytes."""
        done: list[str] = []
        todo = path.split("/")[::-1]
        links = 0
        while todo:
            name = todo.pop()
            if name in ("", "."):
                continue
            if name == "..":
                del done[-1:]
                continue
            here = "/".join([*done, name])
            if len(os.fsencode(here)) > _MAX_PATH_BYTES:
                raise ImageError(f"the path {path[:80]!r} is too long inside the image")
            target = self._readlink(here)
            if target is None:
                done.append(name)
                continue
            links += 1
            if links > _MAX_SYMLINKS:
                raise ImageError(f"the path {path[:80]!r} has too many symbolic links inside the image")
            if target.startswith("/"):
                done.clear()
            todo += target.split("/")[::-1]
        return "/" + "/".join(done)

    def _readlink(self, path: str) -> str | None:
        with self._opened(path, os.O_NOFOLLOW) as fd:
            if fd is None or not stat.S_ISLNK(os.fstat(fd).st_mode):
                return None
            return os.readlink("", dir_fd=fd)

    def _opened(self, path: str, flags: int = 0) -> _Opened:
        try:
            return _Opened(openat2_in_root(self._fd, path, os.O_PATH | flags))
        except SyscallError as error:
            if error.errno in _ABSENT:
                return _Opened(None)
            raise


class _Opened:
    """A descriptor, or None if there is no such path, that is closed at the end of a `with`."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def __enter__(self) -> int | None:
        return self._fd

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None:
            os.close(self._fd)
