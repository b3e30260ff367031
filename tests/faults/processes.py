"""The processes behind the mounts of one cache directory: found by their command lines, and killed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

DEADLINE_S = 30.0


def _processes(module: str, cache: Path) -> list[int]:
    wanted = b"\0".join([b"-m", module.encode(), b"--cache", str(cache).encode(), b""])
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def keepers(cache: Path) -> list[int]:
    return _processes("lazyfs.daemon.keeper", cache)


def workers(cache: Path) -> list[int]:
    return _processes("lazyfs.daemon", cache)


def fuse_processes(cache: Path) -> list[int]:
    return _processes("lazyfs.daemon.fuseworker", cache)


def the_worker(cache: Path) -> int:
    """The one daemon of the cache; waits while a successor is being started."""
    return wait_for(lambda: workers(cache), "a worker")[0]


def wait_for_successor(cache: Path, before: int) -> None:
    wait_for(lambda: [pid for pid in workers(cache) if pid != before], "a successor")


def wait_for(look: Callable[[], list[int]], what: str) -> list[int]:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := look()):
        assert time.monotonic() < deadline, f"{what} did not appear"
        time.sleep(0.005)
    return found


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Sends the signal and waits until the process has ended."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            os.kill(pid, number)
            assert select.select([descriptor], [], [], DEADLINE_S)[0], f"process {pid} does not end"
        finally:
            os.close(descriptor)


def end_daemon(cache: Path) -> None:
    """At once, instead of some seconds after the last mount has gone."""
    for pid in keepers(cache):
        kill(pid, signal.SIGTERM)
    for pid in workers(cache):  # of a keeper that was killed
        kill(pid, signal.SIGKILL)
    for pid in fuse_processes(cache):
        kill(pid, signal.SIGKILL)


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def state_file(keeper: int) -> Path:
    """What the worker tells its successor, in the memory of the keeper. Waits while a new state replaces another."""
    held = Path(f"/proc/{keeper}/fd")

    def look() -> list[int]:
        found = [one for one in os.listdir(held) if os.readlink(held / one).startswith("/memfd:lazyfs-state")]
        return [int(one) for one in found] if len(found) == 1 else []

    return held / str(wait_for(look, "a state")[0])


def status(pid: int, key: str) -> int:
    """A number of /proc/PID/status: "Threads", "VmRSS" and "VmHWM" in KiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0])
    raise KeyError(key)
