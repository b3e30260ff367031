"""The worker of the kernel backend: serves all images of one cache directory. Started by the keeper.

It owns no mount: the keeper holds the FUSE connection, its detached mount and, for each image, the EROFS
mount, so that a worker may die at any moment. Its successor reads what it served (roots.py); everything else
is in the cache.

An image is let go some seconds after its last mount has vanished from mountinfo; the kernel counts what
private mount namespaces still use. When no image is left the daemon lets go of everything and ends with the
FUSE connection.
"""

from __future__ import annotations

from lazyfs.system import startup

# isort: split

import contextlib
import functools
import logging
import os
import select
import signal
import socket
import sys
from typing import Any

import trio

from lazyfs.cache.directory import BlockCache
from lazyfs.cache.layer import CachedLayer, LayerClosed
from lazyfs.control import messages
from lazyfs.control.messages import Attached, Request
from lazyfs.control.server import ControlStream, serve
from lazyfs.daemon.devices import Awake, Sleeper
from lazyfs.daemon.keeper import parse_arguments
from lazyfs.daemon.keeperlink import EXIT_ENDED, EXIT_SUCCESSOR, KeeperLink
from lazyfs.daemon.roots import Released, Remembered, Root, hold_name, is_shown, load_state, root_entry, save_state
from lazyfs.daemon.stale import StaleUppers
from lazyfs.errors import HostError, ImageError, LazyfsError, RemoteError, Unsupported, UserError
from lazyfs.fuse import tuning
from lazyfs.fuse.device import Device
from lazyfs.fuse.devices import DeviceServer, node_of
from lazyfs.images.documents import Missing
from lazyfs.serving.device import LayerHandle
from lazyfs.serving.image import Image
from lazyfs.serving.store import ImageStore
from lazyfs.sources.source import preload
from lazyfs.system.detached import clone_mount, erofs_mount_detached
from lazyfs.system.mountinfo import MountEntry, mounts
from lazyfs.tasks import beside

log = logging.getLogger("lazyfs.daemon")

DEFAULT_LINGER_S = 5.0
_TICK_S = 1.0
_START_S = 2.0  # in which the first image is open, usually
# Measured, a cached file of 500 MB, page cache cold: 1.5 GB/s with the kernel's 128 KiB, 2.1 GB/s with this, no more
# with 4 MiB.
_READ_AHEAD_KIB = 1024
_REASSURE_S = 10.0
# While it drains, a worker takes no new requests, cached or not; what waits longer for its registry is for
# the successor to fetch, to whom the kernel sends it again.
_DRAIN_S = 3.0
_RESTORE_S = 3.0  # opening what is in the cache takes milliseconds; without it, reads open the image
_OPENING_DEADLINES = 4  # an image is opened by a few requests, each within timeout=


class Daemon:
    """Everything one worker process does. Its state belongs to the trio thread; reader threads only look
    things up in `_nodes` and `_released` (single look-ups in a dict are atomic)."""

    def __init__(
        self, link: KeeperLink, cache: BlockCache, runtime: str, linger_s: float, nursery: trio.Nursery
    ) -> None:
        self.link = link
        self.runtime = runtime
        self.store = ImageStore(cache, nursery)
        self.roots: dict[str, Root] = {}  # by manifest digest
        self.ending = trio.Event()
        self.status = EXIT_ENDED  # of the process; meaningful once `ending` is set
        self.interrupted = trio.Event()  # a signal came, perhaps after everything was let go
        self._linger_s = linger_s
        self._nodes: dict[int, Awake] = {}
        self._released: dict[int, Released] = {}
        self._opening = trio.Lock()
        self.uppers = StaleUppers(cache.path)
        self._clients = 0

    # -- devices, for the FUSE server (reader threads) ---------------------------------------------------

    def by_name(self, content_root: bytes) -> Device | None:
        return self.by_node(node_of(content_root))

    def by_node(self, nodeid: int) -> Device | None:
        device = self._nodes.get(nodeid)
        if device is None and (released := self._released.get(nodeid)) is not None:
            return Sleeper(self, released)
        return device

    def names(self) -> list[str]:
        return [device.content_root for device in list(self._nodes.values())]

    async def revive(self, content_root: str) -> LayerHandle:
        """Opens the image of a device that was let go. It then stays open as long as the daemon lives."""
        node = node_of(content_root)
        if node not in self._nodes:
            old = self._released[node]
            image = await self.store.open(
                old.image, old.access, old.timeout_s, make_index=False, known=old.manifest_digest
            )
            if isinstance(image, Missing):
                raise ImageError("the index of a mounted image is gone", "mount the image again")
            if node in self._nodes:
                await self.store.close(image)  # another read was faster
            else:
                self._add_nodes(image)
        return self._nodes[node].handle

    def _add_nodes(self, image: Image) -> None:
        for handle in image.layers:
            known = self._nodes.setdefault(node_of(handle.content_root), Awake(self, handle))
            if known.content_root != handle.content_root:
                raise Unsupported("two layers have the same node id", "mount the image with backend=fuse")

    def _release_nodes(self, root: Root) -> None:
        """Forgets the devices that only this root uses."""
        others = [one for one in self.roots.values() if one is not root]
        used = {handle.content_root for other in others for handle in other.image.layers}
        for handle in root.image.layers:
            if handle.content_root not in used:
                image = root.image
                node = node_of(handle.content_root)
                self._nodes.pop(node, None)
                self._released[node] = Released(
                    handle.content_root,
                    handle.size_bytes,
                    image.manifest_digest,
                    image.reference,
                    root.access,
                    root.timeout_s,
                )

    # -- requests ----------------------------------------------------------------------------------------

    async def handle(self, stream: ControlStream, request: Request) -> None:
        """Answers one request of a client. LazyfsErrors become error replies in the caller."""
        self._clients += 1
        try:
            if request.op == "mount":
                await self._mount(stream, request)
                return
            await stream.send(messages.ok(**self._answer(request)))
            if request.op in ("upgrade", "stop"):
                self.end(EXIT_SUCCESSOR if request.op == "upgrade" else EXIT_ENDED)
        finally:
            self._clients -= 1

    def _answer(self, request: Request) -> dict[str, Any]:
        if request.op == "attached" and request.attached is not None:
            self._attach(self._root_of(request.attached.image_dev or request.attached.dev), request.attached)
            return {}
        if request.op == "stats" and request.dev is not None:
            root = self._root_of(request.dev)
            layers = {"layers": len(root.image.layers), "layers_read_directly": len(root.direct)}
            return {**root_entry(root), **root.image.statistics(), **layers}
        if request.op == "list":
            return {"cache": self.store.cache.path, "mounts": [root_entry(root) for root in self.roots.values()]}
        if request.op == "stop":
            self._look_at_mounts()  # what only lingers does not count
            if used := sum(root.idle_since is None for root in self.roots.values()):
                raise UserError(f"{used} images are still mounted", "unmount them first: lazyfs ls")
        if request.op == "upgrade" and self.link.keeper_gone():
            raise HostError(
                "the keeper of this daemon was killed, so nobody would start a successor",
                "what is mounted lives on; unmount it all, and the next mount starts both anew",
            )
        if request.op in ("ping", "upgrade", "stop"):
            return {"pid": os.getpid(), "mounts": len(self.roots)}
        raise UserError(f"this daemon does not do {request.op!r}")

    async def _mount(self, stream: ControlStream, request: Request) -> None:
        image = await self._open(stream, request)
        if isinstance(image, Missing):
            await stream.send(messages.needs_index(image.manifest_digest, image.reasons))
            return
        async with self._opening:
            root = self.roots.get(image.manifest_digest)
            joined = root is not None
            if root is None:
                root = await self._mount_root(image, request)
            root.pending += 1
        try:
            if joined:
                await self.store.close(image)  # the root counts as its one user
            clone_fd = clone_mount(self.link.held[root.hold_name])
            try:
                answer = messages.ok(
                    manifest_digest=image.manifest_digest,
                    image=image.reference,
                    joined=joined,
                    dev=messages.format_dev(root.dev),
                )
                await stream.send(answer, (clone_fd,))
            finally:
                os.close(clone_fd)
            line = await stream.line()
            if line is not None:
                self._attach(root, messages.parse_attached(messages.decode(line).get("attached")))
                await stream.send(messages.ok())
        finally:
            root.pending -= 1

    async def _open(self, stream: ControlStream, request: Request) -> Image | Missing:
        """Opens the image for a client, as long as it waits. Raises LazyfsError."""
        opened: list[Image | Missing] = []
        limit_s = _OPENING_DEADLINES * request.timeout_s

        async def opening() -> None:
            make_index = not request.push_index  # else the client makes it, who pushes it
            opened.append(
                await self.store.open(request.image, request.access, request.timeout_s, make_index=make_index)
            )

        try:
            with trio.fail_after(limit_s):
                await beside(opening, background=functools.partial(_reassure, stream, request.image))
        except BaseException as error:
            if opened and not isinstance(opened[0], Missing):  # at the very moment when the client went away
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 3):
                    await self.store.close(opened[0])
            if isinstance(error, trio.TooSlowError):
                message = f"{request.image} could not be opened within {limit_s:g} s"
                raise RemoteError(message, "see how the registry is doing, or raise timeout=") from None
            raise
        return opened[0]

    async def _mount_root(self, image: Image, request: Request) -> Root:
        try:
            self._add_nodes(image)
            direct = frozenset(one.content_root for one in image.layers if one.layer.is_sealed())
            devices = [
                one.layer.open_data_path()
                if one.content_root in direct
                else f"/proc/self/fd/{self.link.mount_fd}/{one.content_root}"
                for one in image.layers
            ]
            # By way of the runtime directory: the kernel takes 255 bytes, and a cache may lie deep.
            inside = image.namespace_path.removeprefix(self.store.cache.path).lstrip("/")
            namespace = f"{self._cache_link()}/{inside}"
            before = tuning.erofs_devices()
            mount_fd = await trio.to_thread.run_sync(erofs_mount_detached, namespace, devices)
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 3):
                await self.store.close(image)
            raise
        root = Root(image, request.access, request.timeout_s, _dev_of(mount_fd), direct)
        new = tuning.erofs_devices() - before
        root.backing_device = new.pop() if len(new) == 1 else None
        self._widen_read_ahead(root)
        self.link.hold(root.hold_name, mount_fd)
        self.roots[image.manifest_digest] = root
        self._save()
        return root

    def _cache_link(self) -> str:
        link = os.path.join(self.runtime, "cache")
        if not os.path.islink(link):
            os.symlink(self.store.cache.path, link)
        return link

    def _attach(self, root: Root, attached: Attached) -> None:
        self.uppers.hold(attached.ephemeral_upper)
        root.targets.append(attached)
        self._save()

    def _root_of(self, dev: tuple[int, int]) -> Root:
        for root in self.roots.values():
            if root.dev == dev or any(target.dev == dev for target in root.targets):
                return root
        raise UserError("this daemon does not serve that mount")

    # -- life --------------------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Takes up what the predecessor served: with the keeper's descriptors, from the cache."""
        remembered, released = load_state(self.link)
        self._released = {node_of(one.content_root): one for one in released}
        async with trio.open_nursery() as nursery:
            for old in remembered:
                nursery.start_soon(self._restore, old)
        kept = {root.hold_name for root in self.roots.values()}
        for name in [one for one in self.link.held if one.startswith(hold_name("")) and one not in kept]:
            self.link.drop(name)  # the predecessor died between that and saving its state

    async def _restore(self, old: Remembered) -> None:
        """One image. Not by the network: until this is done nobody is served."""
        access = old.access._replace(offline=True)
        try:
            with trio.fail_after(_RESTORE_S):
                image = await self.store.open(
                    old.image, access, old.timeout_s, make_index=False, known=old.manifest_digest
                )
            if isinstance(image, Missing):
                raise ImageError("its index is gone")
            self._add_nodes(image)
            mount_fd = self.link.held[hold_name(old.manifest_digest)]
        except (LazyfsError, KeyError, trio.TooSlowError) as error:
            log.error("cannot take up %s again; its next read tries to: %r", old.image, error)
            for one in old.as_released():
                self._released.setdefault(node_of(one.content_root), one)
            return
        for target in old.targets:
            with contextlib.suppress(UserError):
                self.uppers.hold(target.ephemeral_upper)
        root = Root(image, old.access, old.timeout_s, _dev_of(mount_fd), old.direct, old.targets)
        self.roots[image.manifest_digest] = root

    def _save(self) -> None:
        save_state(self.link, list(self.roots.values()), list(self._released.values()))

    def is_idle(self) -> bool:
        """Nothing is mounted, and nobody asks for anything."""
        return not self.roots and not self._clients

    def end(self, status: int) -> None:
        """The worker shall end with this exit status; `_end` sees to it."""
        if not self.ending.is_set():
            self.status = status
            self.ending.set()

    async def watch(self) -> None:
        """Lets go of images that nobody mounts any more, and of everything when there is nothing left."""
        with open("/proc/self/mountinfo", "rb") as mountinfo:  # noqa: ASYNC230 - made by the kernel, in memory
            changes = select.poll()
            changes.register(mountinfo, select.POLLPRI | select.POLLERR)
            idle_since: float | None = trio.current_time()
            self._look_at_mounts()
            while not self.ending.is_set():
                if changes.poll(0):
                    self._look_at_mounts()
                await self._let_go_of_idle()
                for root in self.roots.values():
                    self._widen_read_ahead(root)
                now = trio.current_time()
                idle_since = (idle_since or now) if self.is_idle() else None
                if idle_since is not None and now - idle_since >= self._linger_s:
                    self.end(EXIT_ENDED)
                    return
                await trio.sleep(_TICK_S)

    def _widen_read_ahead(self, root: Root) -> None:
        """While something has to be fetched, the kernel reads ahead little, for what it takes is paid for. An
        image that is here as a whole is read like a local one."""
        if root.backing_device and all(handle.layer.is_complete() for handle in root.image.layers):
            tuning.set_erofs_read_ahead(root.backing_device, _READ_AHEAD_KIB)
            root.backing_device = None

    async def settle(self) -> None:
        """Seals layers that can be: the next mount of their image lets the kernel read them by itself."""
        settled: set[CachedLayer] = set()
        while True:
            await trio.sleep(_TICK_S)
            layers = {handle.layer for root in self.roots.values() for handle in root.image.layers}
            settled &= layers
            for layer in layers - settled:
                try:
                    if layer.is_complete() and await trio.to_thread.run_sync(layer.seal, abandon_on_cancel=True):
                        settled.add(layer)
                except LayerClosed:
                    pass
                except HostError as error:
                    log.error("%s", error)
                    settled.add(layer)  # not again and again

    def _look_at_mounts(self) -> None:
        seen: dict[tuple[int, int], list[MountEntry]] = {}
        for entry in mounts():
            seen.setdefault(entry.dev, []).append(entry)
        changed = False
        for root in self.roots.values():
            for target in [target for target in root.targets if not is_shown(target, seen.get(target.dev, []))]:
                root.targets.remove(target)
                changed = True
                self.uppers.let_go(target.ephemeral_upper)
            alive = root.dev in seen or root.targets or root.pending
            root.idle_since = None if alive else root.idle_since or trio.current_time()
        if changed:
            self._save()

    async def _let_go_of_idle(self) -> None:
        now = trio.current_time()
        for root in list(self.roots.values()):
            if root.idle_since is None and not root.targets and not root.pending:
                root.idle_since = now  # its client went away before it attached anything
            if root.idle_since is None or now - root.idle_since < self._linger_s:
                continue
            async with self._opening:
                if root.pending:
                    root.idle_since = None
                    continue
                del self.roots[root.image.manifest_digest]
                self._release_nodes(root)
                self._save()
                self.link.drop(root.hold_name)
                await self.store.close(root.image)

    def let_go(self, server: DeviceServer) -> None:
        """The last act of a daemon that nobody needs: from now on the kernel alone decides how long the FUSE
        connection lives. What a private mount namespace still reads is revived."""
        server.release_mount()
        for root in self.roots.values():
            self._release_nodes(root)
        self.roots.clear()
        self.link.let_go()
        self._save()


async def _reassure(stream: ControlStream, image: str) -> None:
    """Tells a waiting client every few seconds that it is not forgotten; it gives up on a silent daemon."""
    while True:
        await trio.sleep(_REASSURE_S)
        await stream.send(messages.progress(f"still opening {image}"))


def _dev_of(fd: int) -> tuple[int, int]:
    device = os.fstat(fd).st_dev
    return os.major(device), os.minor(device)


async def run(cache_path: str, runtime: str, linger_s: float) -> int:
    """The worker's main task; returns its exit status."""
    link = KeeperLink.from_environment()
    async with trio.open_nursery() as nursery:
        daemon = Daemon(link, BlockCache(cache_path), runtime, linger_s, nursery)
        await daemon.restore()
        server = DeviceServer(link.fuse_fd, daemon, link.mount_fd, log=log.error)
        nursery.start_soon(_until_signalled, daemon)
        nursery.start_soon(_finish_start, daemon)
        nursery.start_soon(_end, daemon, server)
        if link.listen_fd is not None:
            nursery.start_soon(serve, socket.socket(fileno=os.dup(link.listen_fd)), daemon.handle)
            nursery.start_soon(daemon.watch)
            nursery.start_soon(daemon.settle)
            nursery.start_soon(daemon.uppers.run)
        try:
            ended = await server.run()
            if ended:
                await daemon.uppers.finish()
        finally:
            await daemon.store.aclose()
        nursery.cancel_scope.cancel()
    return EXIT_ENDED if ended else EXIT_SUCCESSOR


async def _end(daemon: Daemon, server: DeviceServer) -> None:
    """Nobody needs us: let everything go, and serve on until the kernel ends the connection. A successor is
    wanted: answer what was read, and make way."""
    await daemon.ending.wait()
    if daemon.status == EXIT_ENDED and not daemon.interrupted.is_set():
        daemon.let_go(server)
        await daemon.interrupted.wait()
    await server.drain(_DRAIN_S)


async def _finish_start(daemon: Daemon) -> None:
    """A daemon that a service manager started has time now, which its first mount will not have."""
    await trio.sleep(_START_S)
    if daemon.is_idle():
        try:
            preload()  # in this thread, which imports it otherwise: two at once may see modules that are not whole yet
        except ImportError as error:  # whoever needs it will hear of it; others are served
            log.error("the HTTP client cannot be loaded: %s", error)
    startup.finish()


async def _until_signalled(daemon: Daemon) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            daemon.interrupted.set()
            daemon.end(EXIT_SUCCESSOR)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the worker: `python -m lazyfs.daemon --cache DIR --runtime DIR [--linger S]`."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    form = "%(asctime)s daemon[%(process)d] %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form)
    logging.raiseExceptions = False  # a full disk under the log is no reason to end
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return trio.run(run, options["cache"], options["runtime"], float(options.get("linger", DEFAULT_LINGER_S)))
    except LazyfsError as error:
        log.critical("%s", error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
