"""What all ways of starting a container have in common: a runner brings an image to a host and makes containers.

One class for each way, in `eager` and `lazy`. To add one: derive from Runner, and name it in `modes`.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.containers import overlay, plain_bundle

KILL_DEADLINE_S = 30.0
# An image is in several repositories, each with what one kind of host finds there. Layers are in the registry once.
PLAIN, INDEXED, PACKED, FORMER = "plain", "indexed", "packed", "before"
_numbers = itertools.count()


def unique(prefix: str) -> str:
    """A name that no other container or directory of this process has."""
    return f"{prefix}-{next(_numbers)}"


class Container(ABC):
    """A container that was created and not started yet."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def command(self) -> list[str]:
        """Starts it, passes its output on, and ends when it ends, with its exit code."""

    @abstractmethod
    def kill_command(self) -> list[str]:
        """Kills all of its processes."""

    @abstractmethod
    def remove(self) -> None:
        """Delete what was made for it. After `kill`."""

    def start(self) -> subprocess.Popen[bytes]:
        """Standard output is a pipe that the caller must read; standard error goes to `log`."""
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )
        return self._process

    def kill(self) -> None:
        """Kill the container, if it runs, and wait for its end."""
        if self._process is None:
            return
        if self._process.poll() is None:
            subprocess.run(self.kill_command(), check=False, capture_output=True, timeout=KILL_DEADLINE_S)
        try:
            self._process.wait(KILL_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None


class RuncContainer(Container):
    """A container of runc from a bundle; `undo` takes its root away."""

    def __init__(self, bundle: Path, undo: Callable[[], None]) -> None:
        super().__init__(bundle.with_name(f"{bundle.name}.log"))
        self.bundle = bundle
        self.name = unique("hellobench")
        self._undo = undo

    @property
    def command(self) -> list[str]:
        return ["runc", "run", "--bundle", str(self.bundle), self.name]

    def kill_command(self) -> list[str]:
        return ["runc", "kill", self.name, "KILL"]

    def remove(self) -> None:
        self._undo()


@dataclass(frozen=True)
class Counters:
    """What a host has fetched and used since it was cold. None: this kind of host does not tell."""

    bytes_fetched: int | None = None
    requests: int | None = None
    bytes_read: int | None = None
    daemon_cpu_s: float | None = None
    daemon_memory_bytes: int | None = None

    def since(self, before: Counters) -> Counters:
        """What was added since; the memory is what it is now."""

        def added(now: float | None, then: float | None) -> Any:
            return None if now is None else now - (then or 0)

        return Counters(
            added(self.bytes_fetched, before.bytes_fetched),
            added(self.requests, before.requests),
            added(self.bytes_read, before.bytes_read),
            added(self.daemon_cpu_s, before.daemon_cpu_s),
            self.daemon_memory_bytes,
        )


class Runner(ABC):
    """One way to start containers. A new one for each cold host; `directory` is empty, and its own.

    pull, create and the container's start are timed by the caller. What they need that is not part of them (a
    service that runs on every host, the registry) is ready before.
    """

    mode: str
    # Which of the registry's repositories it pulls from; in an indexed one the index is part of the push.
    repository = PLAIN
    indexed = False
    # Whether its daemon is at rest only some seconds after it was started.
    daemon_rests = False
    # Whether the host has something of another image when its clock starts.
    shares = False
    # Whether the host knows what an earlier start of the image read, and has nothing else of it.
    profiled = False

    def __init__(self, directory: Path, template: Path) -> None:
        self.directory = directory
        # A bundle whose config.json all containers get that are started by runc.
        self.template = template
        directory.mkdir()

    @abstractmethod
    def services(self) -> AbstractContextManager[object]:
        """The host's services running; at the end nothing of the host is left running or mounted."""

    @abstractmethod
    def pull(self, reference: str) -> None:
        """Make the image available on the host, as the system's command for it does."""

    @abstractmethod
    def create(self, reference: str) -> Container:
        """Make a container of an image that is available: a writable root and a configuration."""

    def counters(self) -> Counters:
        return Counters()


def overlay_container(lower: Path, directory: Path, template: Path) -> RuncContainer:
    """A container on an overlay over a directory, with the configuration of `template`; all in `directory`."""
    with contextlib.ExitStack() as stack:
        merged = stack.enter_context(overlay(lower, directory))
        bundle = plain_bundle(template, directory / "bundle", merged)
        return RuncContainer(bundle, stack.pop_all().close)
