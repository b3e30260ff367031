"""The images that a daemon has mounted, and who holds them.

Three kinds of holders: a mount in mountinfo (or a target that was not looked up there yet); the lease of a client that
has not attached anything yet, which ends with its connection; and a hold by name, which outlives the worker. An image
without holders is let go after a while (watch.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import trio

from lazyfs.control.requests import Attached, Mount
from lazyfs.core.oci.digests import ContentRoot, Digest
from lazyfs.daemon.devices import DeviceTable
from lazyfs.daemon.keeperlink import KeeperLink
from lazyfs.daemon.state import SavedRoot
from lazyfs.daemon.uppers import StaleUppers
from lazyfs.errors import ImageError, LazyfsError, UserError
from lazyfs.fuse import tuning
from lazyfs.images.documents import Missing
from lazyfs.serving.image import Image
from lazyfs.serving.store import ImageStore
from lazyfs.sources.access import Access
from lazyfs.system.detached import clone_mount, erofs_mount_detached
from lazyfs.system.devices import dev_of

log = logging.getLogger("lazyfs.daemon")

_RESTORE_S = 3.0  # opening from the cache takes milliseconds; if it fails, reads open the image
_CLOSE_S = 3.0
_HELD_AS = "image:"  # a descriptor's name at the keeper, less the manifest digest
# A cached file is read at 2.1 GB/s, with the kernel's 128 KiB at 1.5 GB/s.
_READ_AHEAD_KIB = 1024


@dataclass(slots=True)
class Root:
    """An image that is mounted. The keeper holds its EROFS mount, whose device is `dev`."""

    image: Image
    access: Access
    timeout_s: float  # the shortest that any of its mounts asked for
    dev: tuple[int, int]
    direct: frozenset[ContentRoot]  # content roots of the layers whose data the kernel reads by itself
    targets: list[Attached] = field(default_factory=list)
    holds: set[str] = field(default_factory=set)  # names
    leases: int = 0
    idle_since: float | None = None  # trio time
    backing_device: str | None = None  # whose read-ahead is to be widened once all blocks are here (tuning.py)

    @property
    def is_claimed(self) -> bool:
        """Whether anybody holds it, apart from mounts that nobody reported."""
        return bool(self.targets or self.holds or self.leases)

    @property
    def held_as(self) -> str:
        """The name of the EROFS mount's descriptor at the keeper."""
        return _held_as(self.image.manifest_digest)

    def widen_read_ahead(self) -> None:
        """Widens the kernel's read-ahead once the whole image is cached. Until then it stays small, because every byte
        of read-ahead may cost a transfer."""
        if self.backing_device and all(device.layer.is_complete() for device in self.image.layers):
            tuning.set_erofs_read_ahead(self.backing_device, _READ_AHEAD_KIB)
            self.backing_device = None

    def saved(self) -> SavedRoot:
        return SavedRoot(
            self.image.reference,
            self.image.manifest_digest,
            self.access,
            self.timeout_s,
            list(self.targets),
            sorted(self.holds),
            self.direct,
            [(device.content_root, device.size_bytes) for device in self.image.layers],
        )


def _held_as(manifest_digest: Digest) -> str:
    return f"{_HELD_AS}{manifest_digest}"


class Lease:
    """A client's claim on a root, until `end`."""

    def __init__(self, root: Root, joined: bool) -> None:
        self.root = root
        self.joined = joined  # the root was there before
        self._ended = False
        root.leases += 1

    def end(self) -> None:
        """Idempotent."""
        if not self._ended:
            self._ended = True
            self.root.leases -= 1


class Roots:
    """The table of mounted images, by manifest digest. Owned by the trio thread. It calls `changed` when what a
    successor must know has changed."""

    def __init__(
        self,
        store: ImageStore,
        devices: DeviceTable,
        link: KeeperLink,
        uppers: StaleUppers,
        runtime: str,
        changed: Callable[[], None],
    ) -> None:
        self._store = store
        self._devices = devices
        self._link = link
        self._uppers = uppers
        self._runtime = runtime
        self._changed = changed
        self._roots: dict[str, Root] = {}
        self.reported = False  # a target was reported since somebody looked whether it is there
        self._changing = trio.Lock()  # held while an image is being mounted or let go

    def __len__(self) -> int:
        return len(self._roots)

    def __iter__(self) -> Iterator[Root]:
        """Iterates over a copy, as the table may change meanwhile."""
        return iter(list(self._roots.values()))

    def of(self, dev: tuple[int, int]) -> Root:
        """The root with this device, or with a target that has it. Raises UserError."""
        for root in self._roots.values():
            if root.dev == dev or any(target.dev == dev for target in root.targets):
                return root
        raise UserError("this daemon does not serve that mount")

    # -- holders -----------------------------------------------------------------------------------------

    async def acquire(self, image: Image, request: Mount) -> Lease:
        """A lease of `image`, which is mounted first if it is not. Takes over the caller's use of the image: one that
        is mounted is opened, too, so that nobody closes it while this waits. Raises LazyfsError."""
        async with self._changing:
            root = self._roots.get(image.manifest_digest)
            joined = root is not None
            if root is None:
                root = await self._mount(image, request.access, request.timeout_s, request.traced)
            lease = Lease(root, joined)
        try:
            if joined:
                root.timeout_s = min(root.timeout_s, request.timeout_s)
                await self._store.close(image)  # the root is the image's only user
        except BaseException:
            lease.end()
            raise
        return lease

    def clone(self, root: Root) -> int:
        """A descriptor of a detached clone of its mount; the caller owns it."""
        return clone_mount(self._link.held[root.held_as])

    def attach(self, target: Attached) -> None:
        """A client has attached a mount of a root. Raises UserError."""
        root = self.of(target.image_dev or target.dev)
        self._uppers.hold(target.ephemeral_upper)
        root.targets.append(target)
        self.reported = True
        self._changed()

    def drop_targets(self, root: Root, gone: list[Attached]) -> None:
        """Forgets targets whose mounts have vanished from mountinfo."""
        for target in gone:
            root.targets.remove(target)
            self._uppers.let_go(target.ephemeral_upper)
        if gone:
            self._changed()

    def hold(self, name: str, dev: tuple[int, int]) -> None:
        """Holds a root under a name, until `release`. Raises UserError if there is no such root."""
        chosen = self.of(dev)
        for root in self._roots.values():
            root.holds.discard(name)
        chosen.holds.add(name)
        self._changed()

    def release(self, name: str) -> None:
        """Ends a hold. Raises UserError if there is none of that name."""
        holding = [root for root in self._roots.values() if name in root.holds]
        if not holding:
            raise UserError(f"nothing is held as {name!r}")
        for root in holding:
            root.holds.remove(name)
        self._changed()

    # -- mounting and letting go ---------------------------------------------------------------------------

    async def _mount(self, image: Image, access: Access, timeout_s: float, traced: bool) -> Root:
        try:
            self._devices.add(image)
            direct = frozenset(one.content_root for one in image.layers if not traced and one.layer.is_sealed())
            devices = [
                one.layer.open_data_path()
                if one.content_root in direct
                else f"/proc/self/fd/{self._link.mount_fd}/{one.content_root}"
                for one in image.layers
            ]
            # Through a link in the runtime directory: the kernel takes 255 bytes, and a cache may lie deep.
            inside = image.namespace_path.removeprefix(self._store.cache.path).lstrip("/")
            namespace = f"{self._cache_link()}/{inside}"
            before = tuning.erofs_devices()
            mount_fd = await trio.to_thread.run_sync(erofs_mount_detached, namespace, devices)
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_S):
                await self._store.close(image)
            raise
        root = Root(image, access, timeout_s, dev_of(mount_fd), direct)
        # Nothing leads from a mount to its entry in /sys/class/bdi, as those have numbers of their own, not st_dev. If
        # more than one appeared meanwhile, read-ahead stays small, as in a cold start, of which a trace shall tell.
        new = tuning.erofs_devices() - before
        root.backing_device = new.pop() if len(new) == 1 and not traced else None
        root.widen_read_ahead()
        self._link.hold(root.held_as, mount_fd)
        self._roots[image.manifest_digest] = root
        image.begin_trace(direct, access=access, recorded=traced)
        self._changed()
        return root

    def _cache_link(self) -> str:
        link = os.path.join(self._runtime, "cache")
        if not os.path.islink(link):
            os.symlink(self._store.cache.path, link)
        return link

    async def let_go(self, root: Root) -> bool:
        """Unmounts a root unless somebody holds it by now; returns whether it is gone."""
        async with self._changing:
            if root.is_claimed:
                return False
            del self._roots[root.image.manifest_digest]
            self._release_devices(root)
            self._changed()
            self._link.drop(root.held_as)
            self._store.traces.leave(root.image.manifest_digest)
            await self._store.close(root.image)
        return True

    def forget_all(self) -> None:
        """Empties the table; the keeper closes the mounts. The images stay open. A device that is still read is
        revived."""
        for root in list(self._roots.values()):
            self._release_devices(root)
        self._roots.clear()

    def _release_devices(self, root: Root) -> None:
        others = [one for one in self._roots.values() if one is not root]
        used = {device.content_root for other in others for device in other.image.layers}
        self._devices.release(root.saved().released(), used)

    # -- after a predecessor -------------------------------------------------------------------------------

    async def restore(self, saved: Sequence[SavedRoot]) -> None:
        """Takes over what the predecessor served, from the keeper's descriptors and the cache."""
        async with trio.open_nursery() as nursery:
            for one in saved:
                nursery.start_soon(self._restore, one)
        held = {root.held_as for root in self._roots.values()}
        for name in [one for one in self._link.held if one.startswith(_HELD_AS) and one not in held]:
            self._link.drop(name)  # the predecessor died after it mounted and before it saved its state

    async def _restore(self, old: SavedRoot) -> None:
        """Takes over one image, without the network, because nobody is served until this is done."""
        access = old.access._replace(pull="never")
        try:
            with trio.fail_after(_RESTORE_S):
                image = await self._store.open(
                    old.image, access, old.timeout_s, make_index=False, known=old.manifest_digest
                )
            if isinstance(image, Missing):
                raise ImageError("its index is gone")
            self._devices.add(image)
            dev = dev_of(self._link.held[_held_as(old.manifest_digest)])
        except (LazyfsError, KeyError, trio.TooSlowError) as error:
            log.error("cannot take up %s again; its next read tries to: %r", old.image, error)
            self._devices.remember(old.released())
            return
        for target in old.targets:
            with contextlib.suppress(UserError):
                self._uppers.hold(target.ephemeral_upper)
        root = Root(image, old.access, old.timeout_s, dev, old.direct, list(old.targets), set(old.holds))
        self._roots[image.manifest_digest] = root
