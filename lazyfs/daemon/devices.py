"""The layer devices of a daemon. They outlive the opening of their image: a read of a released device opens it again.

A daemon cannot find out which private mount namespaces still use a root that vanished from mountinfo, so any device may
be read again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import trio

from lazyfs.cache.layer import LayerClosed
from lazyfs.core.deadlines import answer_s
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.daemon.state import ReleasedLayer
from lazyfs.errors import ImageError, RemoteError, Unsupported
from lazyfs.fuse.device import Device
from lazyfs.fuse.devices import node_of
from lazyfs.images.documents import Missing
from lazyfs.serving.device import DataDevice
from lazyfs.serving.image import Image
from lazyfs.serving.store import ImageStore


class DeviceTable:
    """All devices by node id, for the FUSE server. Only the trio thread changes it; reader threads look up single keys,
    which is atomic."""

    def __init__(self, store: ImageStore) -> None:
        self._store = store
        self._open: dict[int, OpenDevice] = {}
        self._released: dict[int, ReleasedLayer] = {}

    def by_name(self, content_root: bytes) -> Device | None:
        return self.by_node(node_of(content_root))

    def by_node(self, nodeid: int) -> Device | None:
        device = self._open.get(nodeid)
        if device is None and (released := self._released.get(nodeid)) is not None:
            return ReleasedDevice(self, released)
        return device

    def names(self) -> list[str]:
        return [device.content_root for device in list(self._open.values())]

    def released(self) -> list[ReleasedLayer]:
        """All layers that were ever released, for the state."""
        return list(self._released.values())

    def add(self, image: Image) -> None:
        """The devices of an image that was opened. Raises Unsupported."""
        for layer in image.layers:
            known = self._open.setdefault(node_of(layer.content_root), OpenDevice(self, layer))
            if known.content_root != layer.content_root:
                raise Unsupported("two layers have the same node id", "mount the image with backend=fuse")

    def release(self, layers: Iterable[ReleasedLayer], used: Collection[ContentRoot]) -> None:
        """Called before the image of these layers is closed. `used`: content roots that other open images have, too."""
        for layer in layers:
            if layer.content_root not in used:
                node = node_of(layer.content_root)
                self._released[node] = layer  # first: a reader thread must find one of the two
                self._open.pop(node, None)

    def remember(self, layers: Iterable[ReleasedLayer]) -> None:
        """Adds devices that a predecessor released, or whose image it had open and this process has not."""
        for layer in layers:
            self._released.setdefault(node_of(layer.content_root), layer)

    async def revive(self, content_root: ContentRoot) -> DataDevice:
        """Opens the image of a released device. The image then stays open as long as the daemon lives."""
        node = node_of(content_root)
        if node not in self._open:
            old = self._released[node]
            image = await self._store.open(
                old.image, old.access, old.timeout_s, make_index=False, known=old.manifest_digest
            )
            if isinstance(image, Missing):
                raise ImageError("the index of a mounted image is gone", "mount the image again")
            if node in self._open:
                await self._store.close(image)  # another read was faster
            else:
                self.add(image)
        return self._open[node].data


class ReleasedDevice:
    """Stands for a released device; the first read opens its image again."""

    def __init__(self, table: DeviceTable, released: ReleasedLayer) -> None:
        self._table = table
        self._timeout_s = released.timeout_s
        self.content_root = released.content_root
        self.size_bytes = released.size_bytes

    def read_cached(self, address: int, size: int) -> bytes | memoryview | None:
        return None

    async def read(self, address: int, size: int) -> bytes:
        try:
            with trio.fail_after(answer_s(self._timeout_s)):
                device = await self._table.revive(self.content_root)
                return await device.read(address, size)
        except trio.TooSlowError:
            raise RemoteError(f"the image did not open within {answer_s(self._timeout_s):g} s") from None


class OpenDevice:
    """A device whose image is open. If the image is released during a read, the read opens it again."""

    def __init__(self, table: DeviceTable, data: DataDevice) -> None:
        self._table = table
        self.data = data
        self.content_root = data.content_root
        self.size_bytes = data.size_bytes

    def read_cached(self, address: int, size: int) -> bytes | memoryview | None:
        try:
            return self.data.read_cached(address, size)
        except LayerClosed:
            return None

    async def read(self, address: int, size: int) -> bytes:
        try:
            return await self.data.read(address, size)
        except LayerClosed:
            device = self._table.by_node(node_of(self.content_root))
            if device is None or (isinstance(device, OpenDevice) and device.data is self.data):
                raise
            return await device.read(address, size)
