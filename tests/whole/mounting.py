"""Mounting real images by the real command, for the tests of the whole system."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lazyfs.control import rundir
from lazyfs.system.mountinfo import MountEntry, mount_at
from tests import leaks
from tests.conftest import ROOT, Lazyfs, stop_daemon, unmount

BACKENDS = ("kernel", "fuse")
DEADLINE_S = 20.0
# For daemons whose end a test waits for.
LINGER_S = 0.2


class Host:
    """One cache directory with its mounts, all below `directory`: what a machine with lazyfs has."""

    def __init__(self, lazyfs: Lazyfs, directory: Path, backend: str) -> None:
        self.lazyfs = lazyfs
        self.backend = backend
        self.cache = directory / "cache"
        self.cache.mkdir(mode=0o700)
        leaks.watch(self.cache)
        self.options = f"cache={self.cache},backend={backend}"
        self._directory = directory
        self._targets: list[Path] = []

    def target(self) -> Path:
        """A new mount point."""
        target = self._directory / f"target-{len(self._targets)}"
        target.mkdir()
        self._targets.append(target)
        return target

    def mount(self, image: str, *more: str, options: str = "") -> Path:
        """Mounts at a new target. `more`: further arguments of the command."""
        target = self.target()
        self.lazyfs("mount", "-o", ",".join(filter(None, (self.options, options))), *more, image, target)
        return target

    def refused(self, image: str, *more: str, options: str = "") -> tuple[int, str]:
        """Exit code and message of a mount that fails. It leaves nothing mounted."""
        target = self.target()
        words = ("mount", "-o", ",".join(filter(None, (self.options, options))), *more, image, target)
        result = self.lazyfs(*words, check=False)
        assert result.returncode != 0 and mount_at(str(target)) is None
        return result.returncode, result.stderr

    def umount(self, target: Path) -> None:
        self.lazyfs("umount", "--wait", target)

    def json(self, *words: object) -> Any:
        """What the command prints with --json."""
        return json.loads(self.lazyfs(*words, "--json").stdout)

    @property
    def runtime(self) -> Path:
        return leaks.RUNTIME_ROOT / rundir.key_of(str(self.cache))

    @property
    def socket(self) -> Path:
        return self.runtime / rundir.SOCKET_NAME

    def daemon_pid(self) -> int:
        return int(self.lazyfs("daemon", "--ping", "--cache", self.cache).stdout.split("pid")[1].split()[0])

    def forget(self) -> None:
        """Unmounts everything and ends all processes: what is left is the cache."""
        for target in self._targets:
            unmount(target)
        running = processes(self.cache)
        stop_daemon(self.cache)
        for pid in running:
            wait_for_exit(pid)

    def close(self) -> None:
        for target in self._targets:
            unmount(target)
        stop_daemon(self.cache)


@contextlib.contextmanager
def host(lazyfs: Lazyfs, directory: Path, backend: str) -> Iterator[Host]:
    made = Host(lazyfs, directory, backend)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def foreground_daemon(cache: Path, linger_s: float = LINGER_S) -> Iterator[subprocess.Popen[bytes]]:
    """`lazyfs daemon`, as a service manager runs it; when this returns it listens, and its worker has started."""
    leaks.watch(cache)
    command = [sys.executable, "-m", "lazyfs.commands.main", "daemon", "--cache", str(cache), "--linger", str(linger_s)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, cwd=ROOT)
    try:
        socket = leaks.RUNTIME_ROOT / rundir.key_of(str(cache)) / rundir.SOCKET_NAME
        wait_until(lambda: socket.exists() and bool(processes(cache, b"lazyfs.daemon")))
        yield process
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def processes(cache: Path, module: bytes = b"lazyfs.") -> list[int]:
    """Keeper, daemon and fuse processes of a cache, or those of one module."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if os.fsencode(cache) in words and any(word.startswith(module) for word in words):
                found.append(int(entry.name))
    return sorted(found)


def wait_for_exit(pid: int) -> None:
    """Until the process has ended. AssertionError after the deadline."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], DEADLINE_S)[0], f"process {pid} does not end"
    finally:
        os.close(descriptor)


def wait_until(condition: Callable[[], object]) -> None:
    """For conditions that the kernel announces to nobody. AssertionError after the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.01)


def entry_at(target: Path) -> MountEntry:
    entry = mount_at(str(target))
    assert entry is not None
    return entry
