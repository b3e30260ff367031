"""What a test must not leave behind: mounts, processes, runtime directories, temporary files.

Only this test session's own traces are looked at, so that another session on the host does no harm: mounts
below its directories, processes that carry its mark in their environment, the runtime directories of its
caches, and the temporary directory that it and its processes have to themselves.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lazyfs.control import rundir

# Set for the whole session and inherited by every process it starts, however often that daemonises.
MARK = "LAZYFS_TEST_SESSION"
RUNTIME_ROOT = Path("/run/lazyfs")
# A daemon drains and unmounts before it ends; far longer than that takes.
DEADLINE_S = 15.0

_keys: set[str] = set()
_temporary: list[Path] = []


@dataclass(frozen=True)
class Traces:
    """What there is at one moment; `since` subtracts an earlier moment."""

    mounts: frozenset[str]
    processes: frozenset[tuple[int, str]]
    files: frozenset[Path]

    def since(self, before: Traces) -> Traces:
        return Traces(
            self.mounts - before.mounts, self.processes - before.processes, self.files - before.files
        )

    def __bool__(self) -> bool:
        return bool(self.mounts or self.processes or self.files)

    def describe(self) -> str:
        lines = [f"mount {mount}" for mount in sorted(self.mounts)]
        lines += [f"process {pid}: {command}" for pid, command in sorted(self.processes)]
        return "\n".join([*lines, *(f"file {path}" for path in sorted(self.files))])


def watch_temporary(directory: Path) -> None:
    """Whatever is below this directory was made by the session."""
    _temporary.append(directory)


def watch(cache: Path) -> None:
    """The runtime directory of this cache's daemon belongs to the session, also when the cache is gone."""
    _keys.add(rundir.key_of(str(cache)))


def traces(base: Path) -> Traces:
    """Mounts below `base`, this session's daemons, and lazyfs' files outside `base`."""
    temporary = {path for directory in _temporary for path in directory.iterdir()}
    return Traces(mounts(base), _daemons(), frozenset(temporary | _runtime_directories(base)))


def _runtime_directories(base: Path) -> set[Path]:
    """Those of watched caches, and those that link to a cache below `base`."""
    found = set()
    for path in RUNTIME_ROOT.iterdir() if RUNTIME_ROOT.is_dir() else ():
        with contextlib.suppress(OSError):
            if path.name in _keys or (path / "cache").readlink().is_relative_to(base):
                found.add(path)
    return found


def wait_until_gone(base: Path, before: Traces, deadline_s: float = DEADLINE_S) -> Traces:
    """Wait for mounts and processes that are new since `before` to go. Returns what did not."""
    deadline = time.monotonic() + deadline_s
    while (left := traces(base).since(before)) and (rest := deadline - time.monotonic()) > 0:
        if left.processes:
            _wait_for_exit(next(iter(left.processes))[0], rest)
        elif left.mounts:
            _wait_for_mount_change(lambda: bool(mounts(base) - before.mounts), rest)
        else:
            break
    return left


def remove(left: Traces) -> None:
    """Clean up after a test that failed to, so that the next one starts clean."""
    for pid, _ in left.processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    for mount in sorted(left.mounts, reverse=True):
        os.spawnlp(os.P_WAIT, "umount", "umount", "-l", "--", mount.split(" ", 1)[1])


def mounts(base: Path) -> frozenset[str]:
    """The string "TYPE MOUNTPOINT" of each mount below `base` (proc(5), mountinfo)."""
    found = set()
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        mountpoint, kind = before.split()[4], after.split()[0]
        if Path(mountpoint).is_relative_to(base):
            found.add(f"{kind} {mountpoint}")
    return frozenset(found)


def _daemons() -> frozenset[tuple[int, str]]:
    """Processes of this session that outlived their parent, or that run lazyfs."""
    mark = f"{MARK}={os.environ.get(MARK)}".encode()
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            if mark not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if command and (parent == 1 or "lazyfs" in command.partition(" -c ")[0]):
                found.add((int(entry.name), command))
    return frozenset(found)


def _wait_for_exit(pid: int, timeout_s: float) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([descriptor], [], [], timeout_s)
    finally:
        os.close(descriptor)


def _wait_for_mount_change(still_there: Callable[[], bool], timeout_s: float) -> None:
    """Wait for the mount table to change (proc(5): mountinfo polls as POLLERR | POLLPRI)."""
    with open("/proc/self/mountinfo", "rb") as table:
        poll = select.poll()
        poll.register(table, select.POLLPRI)
        if still_there():
            poll.poll(timeout_s * 1000)
