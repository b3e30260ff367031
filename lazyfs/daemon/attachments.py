"""Where the file system of a fuse process is attached, and how the process answers clients (control/messages.py)."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import trio

from lazyfs.cache.uppers import HeldUppers, sweep
from lazyfs.control import replies, requests
from lazyfs.control.requests import Attached, Profile, Request, Stats
from lazyfs.control.server import ControlStream, Handlers, Reply, answered
from lazyfs.errors import UserError
from lazyfs.system.mountinfo import mounts

Place = tuple[tuple[int, int], str]  # device and target


class _Report(NamedTuple):
    attached: Attached
    was_visible: bool  # in this mount namespace


class Attachments:
    """Where the file system `dev`, or overlays on it, are attached, as clients reported."""

    def __init__(self, dev: tuple[int, int], cache: str) -> None:
        self.dev = dev
        self.cache = cache
        self._reports: dict[Place, _Report] = {}
        self._uppers = HeldUppers(cache)

    def add(self, attached: Attached) -> None:
        """Raises UserError for an upper directory outside the cache, because it would be removed in the end."""
        if attached.ephemeral_upper is not None:
            self._uppers.hold(attached.ephemeral_upper)
        place = (attached.dev, attached.target)
        self._reports[place] = _Report(attached, place in _visible())

    def targets(self) -> list[Attached]:
        """Those that are still attached. One in another mount namespace counts as attached."""
        if any(report.was_visible for report in self._reports.values()):
            visible = _visible()
            for place, report in list(self._reports.items()):
                if report.was_visible and place not in visible:
                    del self._reports[place]
        return [report.attached for report in self._reports.values()]

    def places(self) -> list[Place]:
        return [(target.dev, target.target) for target in self.targets()]

    def has(self, dev: tuple[int, int]) -> bool:
        """Whether it is the device of the file system, or of an overlay on it that is still attached: the kernel soon
        gives the number of one that has gone to another mount."""
        return dev == self.dev or any(target.dev == dev for target in self.targets())

    def let_go_of_uppers(self) -> None:
        """Releases the upper directories, and removes those that nobody holds. Call it only once the connection has
        ended: an overlay that was unmounted lazily may live on unseen."""
        self._uppers.release_all()
        sweep(self.cache)


def _visible() -> set[Place]:
    try:
        return {(entry.dev, entry.mountpoint) for entry in mounts()}
    except OSError:
        return set()


class FuseRequests:
    """The handlers of a fuse process. `entry`: what it serves, without targets; `counters`: what "stats" adds;
    `end_trace`: as that of an image (serving/image.py); `stop`: set when a client asks the process to end."""

    def __init__(
        self,
        entry: replies.Entry,
        counters: Callable[[], Mapping[str, Any]],
        end_trace: Callable[[], Awaitable[int]],
        attachments: Attachments,
        stop: trio.Event,
    ) -> None:
        self._described = entry
        self._counters = counters
        self._end_trace = end_trace
        self._attachments = attachments
        self._stop = stop

    def handlers(self) -> Handlers:
        return {
            requests.Attached: self._attached,
            requests.Stats: self._stats,
            requests.Profile: self._profile,
            requests.List: self._list,
            requests.Ping: self._ping,
            requests.Stop: self._stop_serving,
        }

    def _entry(self) -> dict[str, Any]:
        return self._described._replace(targets=self._attachments.targets()).to_json()

    async def _attached(self, stream: ControlStream, request: Attached) -> Reply:
        self._attachments.add(request)
        stream.release(self._attachments.dev)
        return answered()

    def _check(self, dev: tuple[int, int]) -> None:
        if not self._attachments.has(dev):
            raise UserError("this process does not serve that mount")

    async def _profile(self, _: ControlStream, request: Profile) -> Reply:
        self._check(request.dev)
        return answered(manifest_digest=self._described.manifest_digest, blocks=await self._end_trace())

    async def _stats(self, _: ControlStream, request: Stats) -> Reply:
        self._check(request.dev)
        return answered(**self._entry(), **self._counters())

    async def _list(self, _: ControlStream, __: Request) -> Reply:
        return answered(cache=self._attachments.cache, mounts=[self._entry()])

    async def _ping(self, _: ControlStream, __: Request) -> Reply:
        return answered(pid=os.getpid(), mounts=1)

    async def _stop_serving(self, _: ControlStream, __: Request) -> Reply:
        return answered(pid=os.getpid(), mounts=1)._replace(then=self._stop.set)
