"""The daemon's part in upper directories: it holds those of its mounts, and removes them when the mounts are gone."""

from __future__ import annotations

import trio

from lazyfs.cache.uppers import HeldUppers, remove, sweep

_TICK_S = 1.0
_PAUSE_MAX_S = 300.0  # the kernel logs a line each time it is asked


class StaleUppers:
    """Which upper directories are held, and which are stale. Owned by the trio thread."""

    def __init__(self, cache: str) -> None:
        self._cache = cache
        self._held = HeldUppers(cache)
        self._stale: dict[str, tuple[float, float]] = {}  # by path: when to ask the kernel, and the pause after that

    def hold(self, path: str | None) -> None:
        """Holds the upper directory of an attached mount. Raises UserError if it is none of the cache."""
        if path is not None:
            self._held.hold(path)

    def let_go(self, path: str | None) -> None:
        """Its mount has gone from this mount namespace."""
        if path is not None:
            self._held.release(path)
            self._stale[path] = (trio.current_time(), _TICK_S)

    async def run(self) -> None:
        """Removes upper directories that nobody holds: those that a killed daemon left, and each one once its mount has
        gone. If another mount namespace still uses it, it is tried again after growing pauses."""
        await trio.to_thread.run_sync(sweep, self._cache, abandon_on_cancel=True)
        while True:
            await trio.sleep(_TICK_S)
            for path, (at_s, pause_s) in list(self._stale.items()):
                if trio.current_time() < at_s:
                    continue
                if await trio.to_thread.run_sync(remove, self._cache, path, abandon_on_cancel=True):
                    self._stale.pop(path, None)
                else:
                    self._stale[path] = (trio.current_time() + pause_s, min(2 * pause_s, _PAUSE_MAX_S))

    async def finish(self) -> None:
        """Removes stale ones in the end: with the FUSE connection the overlays on it have ended, too."""
        for path in self._stale:
            await trio.to_thread.run_sync(remove, self._cache, path)
