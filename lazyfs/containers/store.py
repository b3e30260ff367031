"""Containers as records on disk. Only this module reads and writes them.

    DIRECTORY/NAME/container.json   the record: what it was made of, and whether its files are to be kept
                  /...              its bundle (bundle.py)

A process holds a container by locking its directory (flock). A name is taken while a process holds it, and as long as
its files are kept. Any other directory was left by a killed process: its name is free, and whoever claims the name next
deletes the remains.

    root: /var/lib/lazyfs/containers     others: ${XDG_STATE_HOME:-~/.local/state}/lazyfs/containers
"""

from __future__ import annotations

import fcntl
import os
import time

from lazyfs.containers.bundle import BUNDLE_CONFIG, delete_bundle
from lazyfs.core import lightjson
from lazyfs.errors import HostError, UserError
from lazyfs.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from lazyfs.containers.bundle import MountedImage

VERSION = 1
RECORD = "container.json"
_MAX_RECORD_BYTES = 64 << 10
_MAX_NAME_CHARACTERS = 63  # of a host name


class Container(NamedTuple):
    """A container as its record has it."""

    name: str
    directory: str
    image: str  # canonical reference
    manifest_digest: str
    platform: str  # OS/ARCH[/VARIANT] of the image
    created_s: float  # since the epoch
    keep: bool  # what it wrote stays when it ends


class Listed(NamedTuple):
    """A name in the store. `container`: None if its process died before it was recorded, or if its record cannot be
    read. `held`: a process has it."""

    name: str
    container: Container | None
    held: bool


class Claim:
    """A name, and the directory that goes with it, held by this process until `release`. A context manager."""

    def __init__(self, name: str, directory: str, lock_fd: int) -> None:
        self.name = name
        self.directory = directory
        self._lock_fd = lock_fd

    def record(self, image: MountedImage, keep: bool) -> Container:
        """Writes the record. Without it the directory counts as remains."""
        config = image.config
        platform = "/".join(part for part in (config.os, config.architecture, config.variant) if part)
        container = Container(
            self.name, self.directory, image.reference, image.manifest_digest, platform, time.time(), keep
        )
        fields = container._asdict()
        del fields["directory"]  # wherever it lies
        temporary = os.path.join(self.directory, f"{RECORD}.new")
        try:
            with open(temporary, "w", encoding="ascii") as file:
                file.write(lightjson.dumps({"version": VERSION, **fields}))
            os.rename(temporary, os.path.join(self.directory, RECORD))
        except OSError as error:
            raise HostError(f"cannot record the container {self.name}: {error.strerror}", "check the disk") from None
        return container

    def clear(self, keep_itself: bool = False) -> None:
        """Deletes all files, and the directory unless `keep_itself`. Raises HostError: something is mounted in it."""
        for name in (RECORD, f"{RECORD}.new"):
            try:  # noqa: SIM105 - contextlib takes 2 ms to import
                os.unlink(os.path.join(self.directory, name))
            except OSError:
                pass  # there is none
        delete_bundle(self.directory, keep_itself)

    def release(self) -> None:
        """Idempotent."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class ContainerStore:
    """The containers below one directory. Cheap to open; any number of processes may use it at once."""

    def __init__(self, directory: str | None = None) -> None:
        self.directory = default_directory() if directory is None else directory

    def create(self, name: str | None = None) -> Claim:
        """Claims `name`, or a new one. Its directory (0700) may have remains: `clear` them once nothing is mounted in
        it. Raises UserError: the name is taken, or not valid; HostError."""
        name = f"lazyfs-{os.urandom(4).hex()}" if name is None else checked_name(name)
        directory = os.path.join(self.directory, name)
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            # Nobody else claims meanwhile: a new directory is never seen without its lock.
            alone_fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(alone_fd, fcntl.LOCK_EX)
                try:  # noqa: SIM105
                    os.mkdir(directory, 0o700)
                except FileExistsError:
                    pass  # remains, or taken
                lock_fd = _locked(directory)
            finally:
                os.close(alone_fd)
        except OSError as error:
            raise HostError(f"cannot make {directory}: {error.strerror}") from None
        if lock_fd is None:
            raise UserError(f"a container {name} is running: {directory}", "choose another name")
        if _is_kept(directory):
            os.close(lock_fd)
            raise UserError(f"there is a container {name} already: {directory}", "choose another name")
        return Claim(name, directory, lock_fd)

    def open(self, name: str) -> Claim:
        """Claims a container that is there and that nobody holds. Raises UserError."""
        directory = os.path.join(self.directory, checked_name(name))
        try:
            lock_fd = _locked(directory)
        except OSError:
            raise UserError(f"there is no container {name}", f"look into {self.directory}") from None
        if lock_fd is None:
            raise UserError(f"the container {name} is in use", "end it first")
        return Claim(name, directory, lock_fd)

    def remove(self, name: str) -> None:
        """Deletes a container that nobody holds, with all that it wrote. Raises UserError, HostError."""
        with self.open(name) as claim:
            claim.clear()

    def listing(self) -> list[Listed]:
        """All names, sorted, including those of killed processes."""
        found = []
        for name in sorted(self._names()):
            directory = os.path.join(self.directory, name)
            try:
                lock_fd = _locked(directory)
            except OSError:
                continue  # removed just now
            if lock_fd is not None:
                os.close(lock_fd)
            try:
                record = read_record(directory)
            except HostError:
                record = None
            found.append(Listed(name, record, lock_fd is None))
        return found

    def _names(self) -> list[str]:
        try:
            return [name for name in os.listdir(self.directory) if _is_name(name)]
        except OSError:
            return []


def default_directory() -> str:
    """Where containers lie, if nothing else is said."""
    if os.geteuid() == 0:
        return "/var/lib/lazyfs/containers"
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "lazyfs", "containers")


def checked_name(name: str) -> str:
    if not _is_name(name):
        raise UserError(
            f"the name {name[:80]!r} cannot be a container's", "use letters, digits, and _ . + - inside"
        )
    return name


def _is_name(text: str) -> bool:
    """What runc accepts, and what is a file name and (with its length) a host name."""
    inside = text.replace("_", "").replace(".", "").replace("+", "").replace("-", "")
    return text.isascii() and inside.isalnum() and text[0].isalnum() and len(text) <= _MAX_NAME_CHARACTERS


def read_record(directory: str) -> Container | None:
    """The record of the container in `directory`; None if there is none. HostError: it cannot be read or understood."""
    try:
        with open(os.path.join(directory, RECORD), "rb") as file:
            said = lightjson.loads(file.read(_MAX_RECORD_BYTES).decode())
        if said["version"] != VERSION:
            raise HostError(f"the container in {directory} is of another version of lazyfs", "use that one")
        return Container(
            name=str(said["name"]),
            directory=directory,
            image=str(said["image"]),
            manifest_digest=str(said["manifest_digest"]),
            platform=str(said["platform"]),
            created_s=float(said["created_s"]),
            keep=said["keep"] is True,
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError(f"cannot read the record in {directory}: {error.strerror}", "check the disk") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise HostError(f"the record in {directory} is damaged", f"remove it: rm -r {directory}") from None


def _is_kept(directory: str) -> bool:
    """Whether the files are to be kept. A record that is not understood keeps them; so does a bundle without a record,
    because older versions wrote none."""
    try:
        container = read_record(directory)
    except HostError:
        return True
    return os.path.exists(os.path.join(directory, BUNDLE_CONFIG)) if container is None else container.keep


def _locked(directory: str) -> int | None:
    """A descriptor that holds the container's lock; None if another has it. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.stat(directory)):  # else it was removed meanwhile
            return fd
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None
