"""What a daemon looks at every second: mounts that have gone, images that nobody needs, layers that are complete."""

from __future__ import annotations

import logging
import os
import select
from collections.abc import Callable, Sequence

import trio

from lazyfs.cache.layer import CachedLayer, LayerClosed
from lazyfs.control.requests import Attached
from lazyfs.daemon.handover import EXIT_ENDED
from lazyfs.daemon.life import Life
from lazyfs.daemon.roots import Roots
from lazyfs.errors import HostError
from lazyfs.system.mountinfo import MountEntry, mounts

log = logging.getLogger("lazyfs.daemon")

_TICK_S = 1.0


class Watch:
    """Ends the daemon once nothing is mounted, and nobody (`is_busy`) waits for an answer, for `linger_s`."""

    def __init__(self, roots: Roots, life: Life, linger_s: float, is_busy: Callable[[], bool]) -> None:
        self._roots = roots
        self._life = life
        self._linger_s = linger_s
        self._is_busy = is_busy

    def is_idle(self) -> bool:
        """Nothing is mounted, and nobody asks for anything."""
        return not len(self._roots) and not self._is_busy()

    def used(self) -> int:
        """How many images are in use now; those that only linger do not count."""
        self._look_at_mounts()
        return sum(root.idle_since is None for root in self._roots)

    async def run(self) -> None:
        """Lets go of images that nobody mounts any more; returns when the daemon is to end."""
        with open("/proc/self/mountinfo", "rb") as mountinfo:  # noqa: ASYNC230 - made by the kernel, in memory
            changes = select.poll()
            changes.register(mountinfo, select.POLLPRI | select.POLLERR)
            idle_since: float | None = trio.current_time()
            self._look_at_mounts()
            while not self._life.ending.is_set():
                # A target may be gone before it is reported: then nothing of mountinfo changes any more.
                if changes.poll(0) or self._roots.reported:
                    self._look_at_mounts()
                await self._let_go_of_idle()
                for root in self._roots:
                    root.widen_read_ahead()
                now = trio.current_time()
                idle_since = (idle_since or now) if self.is_idle() else None
                if idle_since is not None and now - idle_since >= self._linger_s:
                    self._life.end(EXIT_ENDED)
                    return
                await trio.sleep(_TICK_S)

    def _look_at_mounts(self) -> None:
        self._roots.reported = False
        seen: dict[tuple[int, int], list[MountEntry]] = {}
        for entry in mounts():
            seen.setdefault(entry.dev, []).append(entry)
        for root in self._roots:
            gone = [target for target in root.targets if not is_shown(target, seen.get(target.dev, []))]
            self._roots.drop_targets(root, gone)
            alive = root.dev in seen or root.is_claimed
            root.idle_since = None if alive else root.idle_since or trio.current_time()

    async def _let_go_of_idle(self) -> None:
        now = trio.current_time()
        for root in self._roots:
            if root.idle_since is None and not root.is_claimed:
                root.idle_since = now  # its client went away before it attached anything
            if root.idle_since is None or now - root.idle_since < self._linger_s:
                continue
            if not await self._roots.let_go(root):
                root.idle_since = None

    async def seal(self) -> None:
        """Seals complete layers: the next mount of their image lets the kernel read them directly."""
        sealed: set[CachedLayer] = set()
        while True:
            await trio.sleep(_TICK_S)
            layers = {device.layer for root in self._roots for device in root.image.layers}
            sealed &= layers
            for layer in layers - sealed:
                try:
                    if layer.is_complete() and await trio.to_thread.run_sync(layer.seal, abandon_on_cancel=True):
                        sealed.add(layer)
                except LayerClosed:
                    pass
                except HostError as error:
                    log.error("%s", error)
                    sealed.add(layer)  # not again and again


def is_shown(target: Attached, entries: Sequence[MountEntry]) -> bool:
    """Whether the mount is among `entries`, those of its device number. The kernel soon gives the number of an overlay
    that has gone to another one, so for overlays the upper directory decides."""
    if target.ephemeral_upper is None:
        return bool(entries)
    name = os.path.basename(target.ephemeral_upper)
    return any(name in option for entry in entries for option in entry.super_options)
