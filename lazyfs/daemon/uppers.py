"""The daemon's part in upper directories: holds those of its mounts, removes them when these have gone."""

from __future__ import annotations

import trio

from lazyfs.cache.uppers import HeldUppers, remove, sweep

_TICK_S = 1.0
_PAUSE_MAX_S = 300.0  # each time we ask, the kernel logs a line


class StaleUppers:
    """Which upper directories are held, and which are to go. Owned by the trio thread."""

    def __init__(self, cache: str) -> None:
        self._cache = cache
        self._held = HeldUppers(cache)
        self._stale: dict[str, tuple[float, float]] = {}  # by path: when to ask the kernel, and the pause after that

    def hold(self, path: str | None) -> None:
        """For a mount that was attached. Raises UserError if it is no upper directory of the cache."""
        if path is not None:
            self._held.hold(path)

    def let_go(self, path: str | None) -> None:
        """Its mount has gone from our namespace."""
        if path is not None:
            self._held.release(path)
            self._stale[path] = (trio.current_time(), _TICK_S)

    async def run(self) -> None:
        """Removes what nobody holds: what a daemon that was killed left, and each one once its mount has gone. Another
        mount namespace may go on using it: we ask again after pauses that grow."""
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
        """The last act of a daemon whose connection has ended: so have the overlays on it."""
        for path in self._stale:
            await trio.to_thread.run_sync(remove, self._cache, path)
