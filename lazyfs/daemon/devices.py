"""Devices that outlive their image's being open: a read of one that was let go opens the image again.

Nothing tells a daemon which private mount namespaces still use a root that vanished from mountinfo, so any device may
be read again.
"""

from __future__ import annotations

from typing import Protocol

import trio

from lazyfs.cache.layer import LayerClosed
from lazyfs.core.deadlines import answer_s
from lazyfs.daemon.roots import Released
from lazyfs.errors import RemoteError
from lazyfs.fuse.device import Device
from lazyfs.fuse.devices import node_of
from lazyfs.serving.device import LayerHandle


class Reviver(Protocol):
    """Who knows the images: the daemon."""

    async def revive(self, content_root: str) -> LayerHandle:
        """Opens the image of a device that was let go."""

    def by_node(self, nodeid: int) -> Device | None: ...


class Sleeper:
    """Stands for a device that was let go; the first read opens its image again."""

    def __init__(self, daemon: Reviver, released: Released) -> None:
        self._daemon = daemon
        self._timeout_s = released.timeout_s
        self.content_root = released.content_root
        self.size_bytes = released.size_bytes

    def read_cached(self, address: int, size: int) -> bytes | memoryview | None:
        return None

    async def read(self, address: int, size: int) -> bytes:
        try:
            with trio.fail_after(answer_s(self._timeout_s)):
                handle = await self._daemon.revive(self.content_root)
                return await handle.read(address, size)
        except trio.TooSlowError:
            raise RemoteError(f"the image did not open within {answer_s(self._timeout_s):g} s") from None


class Awake:
    """A device whose image is open. Should that be let go during a read, the read opens it again."""

    def __init__(self, daemon: Reviver, handle: LayerHandle) -> None:
        self._daemon = daemon
        self.handle = handle
        self.content_root = handle.content_root
        self.size_bytes = handle.size_bytes

    def read_cached(self, address: int, size: int) -> bytes | memoryview | None:
        try:
            return self.handle.read_cached(address, size)
        except LayerClosed:
            return None

    async def read(self, address: int, size: int) -> bytes:
        try:
            return await self.handle.read(address, size)
        except LayerClosed:
            device = self._daemon.by_node(node_of(self.content_root))
            if device is None or (isinstance(device, Awake) and device.handle is self.handle):
                raise
            return await device.read(address, size)
