"""The control socket of a fusemount process: <runtime>/fuse-<pid>.sock, protocol of control/messages.py."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

import trio

from lazyfs.cache.uppers import HeldUppers, sweep
from lazyfs.control import messages
from lazyfs.control.messages import Request
from lazyfs.control.server import ControlStream, serve
from lazyfs.errors import HostError, UserError
from lazyfs.system.mountinfo import mounts


class Attachments:
    """Where the file system `dev`, or overlays on it, are attached, as clients reported."""

    def __init__(self, dev: tuple[int, int], cache: str) -> None:
        self.dev = dev
        self.cache = cache
        self._reports: dict[tuple[tuple[int, int], str], bool] = {}  # whether this namespace shows it
        self._uppers = HeldUppers(cache)

    def add(self, report: messages.Attached) -> None:
        """Raises UserError for an upper directory that is not the cache's: it would be removed in the end."""
        if report.ephemeral_upper is not None:
            self._uppers.hold(report.ephemeral_upper)
        place = (report.dev, report.target)
        self._reports[place] = place in _visible()

    def places(self) -> list[tuple[tuple[int, int], str]]:
        """(device, target) of those that are still there. One in another mount namespace counts as there."""
        if any(self._reports.values()):
            visible = _visible()
            for place, shown in list(self._reports.items()):
                if shown and place not in visible:
                    del self._reports[place]
        return list(self._reports)

    def has(self, dev: tuple[int, int]) -> bool:
        return dev == self.dev or any(place[0] == dev for place in self._reports)

    def describe(self) -> list[dict[str, Any]]:
        return [{"dev": messages.format_dev(dev), "target": target} for dev, target in self.places()]

    def let_go_of_uppers(self) -> None:
        """Gives up the upper directories, and removes what nobody holds. Only once the connection has ended: an overlay
        that was unmounted lazily may live on unseen."""
        self._uppers.release_all()
        sweep(self.cache)


def _visible() -> set[tuple[tuple[int, int], str]]:
    try:
        return {(entry.dev, entry.mountpoint) for entry in mounts()}
    except OSError:
        return set()


class ControlServer:
    """Answers "ping", "list", "stats", "attached" and "stop"."""

    def __init__(
        self,
        description: Mapping[str, Any],
        counters: Callable[[], Mapping[str, Any]],
        attachments: Attachments,
        stop: trio.Event,
    ) -> None:
        self._description = description
        self._counters = counters
        self._attachments = attachments
        self._stop = stop

    async def run(
        self, runtime: str, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listens until cancelled; the socket is there once started and removed in the end. Raises
        HostError."""
        path = os.path.join(runtime, f"fuse-{os.getpid()}.sock")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of a process that had our number and was killed
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            mask = os.umask(0o177)
            try:
                listener.bind(path)
            except OSError as error:
                raise HostError(f"cannot listen at {path}: {error}", "check the runtime directory") from None
            finally:
                os.umask(mask)
            try:
                listener.listen(16)
                task_status.started()
                await serve(listener, self._handle)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(path)

    async def _handle(self, stream: ControlStream, request: Request) -> None:
        await stream.send(messages.ok(**self._answer(request)))
        if request.op == "stop":
            self._stop.set()

    def _answer(self, request: Request) -> dict[str, Any]:
        entry = {**self._description, "targets": self._attachments.describe()}
        if request.op == "list":
            return {"cache": self._attachments.cache, "mounts": [entry]}
        if request.op == "stats" and request.dev is not None and self._attachments.has(request.dev):
            return {**entry, **self._counters()}
        if request.op == "attached" and request.attached is not None:
            self._attachments.add(request.attached)
            return {}
        if request.op in ("ping", "stop"):
            return {"pid": os.getpid()}
        raise UserError(f"the process of a fuse mount does not do {request.op!r}", "ask the daemon")
