"""``-o foreground``: the mount command stays until its mount is gone, and a signal unmounts it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from types import FrameType

from lazyfs.errors import UserError
from lazyfs.mounting import unmount
from lazyfs.mounting.attach import Mounted


def hold(mount: Callable[[Callable[[Mounted], None]], Mounted]) -> None:
    """Calls `mount` and returns when somebody has unmounted the result. `mount` passes the result to its argument as
    soon as it is attached (mount.mount, `on_attached`). SIGTERM and SIGINT, at any time, unmount it, lazily, so that
    busy files do not keep the command from ending; then SIGINT raises KeyboardInterrupt, SIGTERM SystemExit(0)."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    mounted: Mounted | None = None

    def remember(attached: Mounted) -> None:
        nonlocal mounted
        mounted = attached

    previous = signal.signal(signal.SIGTERM, end)
    try:
        mounted = mount(remember)
        unmount.wait_until_unmounted(mounted.target, mounted.dev)
    except (KeyboardInterrupt, SystemExit):
        if mounted is not None:
            with contextlib.suppress(UserError):  # gone at the same moment
                unmount.umount(mounted.target, lazy=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
