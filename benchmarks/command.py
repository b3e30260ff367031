"""Drives the installed `lazyfs` command as a user does."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.host import run

PROGRAM = Path(sys.executable).with_name("lazyfs")
# A daemon ends by itself some seconds after its last mount is gone.
DAEMON_END_DEADLINE_S = 20.0
SOUND_DEADLINE_S = 60.0
DAEMON_LINGER_S = 600
DAEMON_READY_DEADLINE_S = 20.0
DAEMON_REST_S = 4.0  # it imports what its first mount needs when it has been idle for two seconds


class Lazyfs:
    """The command with one cache directory, given by the same option everywhere."""

    def __init__(self, cache: Path, backend: str = "kernel", program: Path = PROGRAM) -> None:
        self.program = program
        self.cache = cache
        self.backend = backend
        cache.mkdir(mode=0o700, exist_ok=True)

    def options(self, *more: str) -> str:
        return ",".join([f"cache={self.cache}", f"backend={self.backend}", *more])

    def mount(self, image: str, target: Path, *options: str) -> float:
        """Seconds from the command to a root whose directory can be read."""
        target.mkdir(exist_ok=True)
        started = time.perf_counter()
        run(self.program, "mount", "-o", self.options(*options), image, target)
        os.listdir(target)
        return time.perf_counter() - started

    @contextlib.contextmanager
    def mounted(self, image: str, target: Path, *options: str) -> Iterator[Path]:
        self.mount(image, target, *options)
        try:
            yield target
        finally:
            self.umount(target)

    @contextlib.contextmanager
    def daemon(self, rest_s: float = DAEMON_REST_S) -> Iterator[None]:
        """With the cache's daemon running, as a service manager runs it, and at rest after `rest_s` seconds."""
        command = [str(self.program), "daemon", "--cache", str(self.cache), "--linger", str(DAEMON_LINGER_S)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._wait_for_answer(process)
            time.sleep(rest_s)
            yield
        finally:
            process.terminate()
            process.wait(DAEMON_END_DEADLINE_S)

    def _wait_for_answer(self, process: subprocess.Popen[bytes]) -> None:
        ping = [str(self.program), "daemon", "--ping", "--cache", str(self.cache)]
        deadline = time.monotonic() + DAEMON_READY_DEADLINE_S
        while subprocess.run(ping, capture_output=True, timeout=DAEMON_READY_DEADLINE_S).returncode != 0:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the daemon did not start")
            time.sleep(0.05)

    def umount(self, target: Path) -> None:
        run(self.program, "umount", target)

    def stats(self, target: Path) -> dict[str, Any]:
        """The daemon's counters: bytes_fetched, requests, memory_bytes and so on."""
        counters: dict[str, Any] = json.loads(run(self.program, "stats", "--json", target))
        return counters

    def run_container(self, image: str, *command: str) -> str:
        """Standard output of a command in a new container that is removed afterwards."""
        return run(self.program, "run", "--rm", "-o", self.options(), image, *command)

    def daemons(self) -> dict[int, str]:
        """The processes that serve this cache, with their command lines."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit():
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if os.fsencode(self.cache) in words and any(w.startswith(b"lazyfs.") for w in words):
                        found[int(entry.name)] = b" ".join(words).decode(errors="replace").strip()
        return found

    def wait_until_ended(self) -> None:
        """Wait until the cache has no daemon, as it ends after the last mount."""
        deadline = time.monotonic() + DAEMON_END_DEADLINE_S
        while running := self.daemons():
            if time.monotonic() > deadline:
                raise RuntimeError(f"still running long after the last umount: {running}")
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(next(iter(running)))
                select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
                os.close(descriptor)

    def wait_until_sound(self) -> None:
        """Wait until the daemon has noted that all layers of the cache are whole and compared (docs/FORMATS.md)."""
        deadline = time.monotonic() + SOUND_DEADLINE_S
        layers = list((self.cache / "layers").iterdir())
        while not all((layer / "sound").exists() for layer in layers):
            if time.monotonic() > deadline:
                raise RuntimeError("the cached layers are not sealed")
            time.sleep(0.1)

    def memory_bytes(self) -> int:
        """Memory of all processes that serve this cache: proportional set size (proc(5), smaps_rollup)."""
        total = 0
        for pid in self.daemons():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) * 1024
        return total


def index(image: str, cache: Path, *options: str, program: Path = PROGRAM) -> tuple[float, float]:
    """Builds the index of an image from its registry and attaches it there. Returns the seconds that building
    took, as the command reports them, and those of the whole command. It keeps a copy in `cache`, which should
    not be one that a mount is measured with."""
    started = time.perf_counter()
    report = json.loads(run(program, "index", "-o", ",".join([f"cache={cache}", *options]), image, "--push", "--json"))
    return float(report["seconds"]), time.perf_counter() - started
