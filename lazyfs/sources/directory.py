"""A directory, read and written by name.

Symbolic links below it are followed by reading, wherever they lead: build tools make layouts of them, and what a layout
holds is checked against its digest before anybody sees it. Writing follows none.
"""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import suppress

from lazyfs.errors import HostError, ImageError, NotFound, UserError


class Directory:
    """All methods block and may be called from any thread. Names are relative, with "/" between their parts; the caller
    vouches for them. `what` names the directory in messages. `close()` it.

    Reading raises NotFound (no such file), ImageError (not a regular file, or shorter than needed) and HostError.
    """

    def __init__(self, path: str, what: str) -> None:
        """Raises UserError if it cannot be opened."""
        self._what = what
        try:
            self._fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{what}: cannot open the directory: {error.strerror}") from None

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, name: str, start: int = 0, end: int | None = None, max_bytes: int = 1 << 62) -> bytes:
        """The bytes [start, end) of a file, None = to its end; ImageError if they are more than `max_bytes`."""
        file = self._open(name)
        try:
            size = os.fstat(file).st_size
            stop = size if end is None else end
            if stop > size:
                raise ImageError(f"{self._what}: {name} has {size} bytes, {stop} are needed")
            if stop - start > max_bytes:
                raise ImageError(f"{self._what}: {name} is larger than {max_bytes} bytes")
            pieces: list[bytes] = []
            while start < stop:
                piece = os.pread(file, stop - start, start)
                if not piece:
                    raise ImageError(f"{self._what}: {name} became shorter while it was read")
                pieces.append(piece)
                start += len(piece)
        except OSError as error:
            raise HostError(f"{self._what}: cannot read {name}: {error.strerror}", "check the disk") from None
        finally:
            os.close(file)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def write(self, name: str, data: bytes) -> None:
        """Publishes a whole file: written beside its place, synced, then renamed. Folders are made. HostError: disk."""
        folder, _, last = name.rpartition("/")
        at = self._dup()
        temporary = f".lazyfs-{os.urandom(8).hex()}"
        try:
            for part in folder.split("/") if folder else ():
                with suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=at)
                at = _enter(at, part)
            file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=at)
            try:
                with open(file, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(file)
                os.rename(temporary, last, src_dir_fd=at, dst_dir_fd=at)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=at)
                raise
        except OSError as error:
            raise HostError(
                f"{self._what}: cannot write {name}: {error.strerror}", "check space and rights"
            ) from None
        finally:
            os.close(at)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there. HostError: rights."""
        folder, _, last = name.rpartition("/")
        at = self._dup()
        try:
            for part in folder.split("/") if folder else ():
                at = _enter(at, part)
            os.unlink(last, dir_fd=at)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise HostError(f"{self._what}: cannot remove {name}: {error.strerror}", "check the rights") from None
        finally:
            os.close(at)

    def try_lock(self) -> int | None:
        """Keeps others away who do the same, until the descriptor is closed; None if somebody else has it. On a file
        system without locks it keeps away nobody."""
        at = self._dup()
        try:
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
        except OSError as error:
            raise HostError(f"{self._what}: cannot open the directory: {error.strerror}", "check the rights") from None
        finally:
            os.close(at)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError:
            pass
        return fd

    def _open(self, name: str) -> int:
        at = path = -1
        try:
            at = self._dup()
            path = os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=at)  # opens nothing yet: no FIFO, no device
            if not stat.S_ISREG(os.fstat(path).st_mode):
                raise ImageError(f"{self._what}: {name} is not a regular file")
            return os.open(f"/proc/self/fd/{path}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(f"{self._what}: {name} is missing", "was all of it copied?") from None
        except OSError as error:
            raise HostError(f"{self._what}: cannot open {name}: {error.strerror}", "check its rights") from None
        finally:
            for fd in (path, at):
                if fd >= 0:
                    os.close(fd)

    def _dup(self) -> int:
        if self._fd < 0:
            raise HostError(f"{self._what} has been closed", "open it again")
        return os.dup(self._fd)


def _enter(at: int, name: str) -> int:
    """Opens the directory `name` in `at`, and closes `at`, but not on OSError."""
    below = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    os.close(at)
    return below
