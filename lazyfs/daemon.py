"""The worker of the kernel backend: serves all images of one cache directory. Started by the keeper.

It owns no mount of its own: the keeper holds the FUSE connection, its detached mount and, for each image, the
EROFS mount, so that a worker may die at any moment. What a successor has to know (which images, from where) is
in <runtime>/state.json; everything else is in the cache.

An image is let go some seconds after its last mount has vanished from mountinfo; the kernel counts what
private mount namespaces still use. When the last image is gone the whole daemon lets go and ends with the FUSE
connection.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import select
import shutil
import signal
import socket
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import trio

from lazyfs import control
from lazyfs.cache import BlockCache
from lazyfs.concurrency import beside
from lazyfs.control import Attached, Request, RequestOptions
from lazyfs.controlserver import ControlStream, serve
from lazyfs.credentials import auth_files_of
from lazyfs.detached import clone_mount, erofs_mount_detached
from lazyfs.errors import HostError, LazyfsError, UserError
from lazyfs.fetch import LayerHandle
from lazyfs.fuse.devices import Device, DeviceServer, node_of
from lazyfs.images import Image, ImageOptions, ImageStore, NeedsIndexError
from lazyfs.keeperlink import EXIT_ENDED, EXIT_SUCCESSOR, KeeperLink
from lazyfs.mountinfo import mounts

log = logging.getLogger("lazyfs.daemon")

DEFAULT_LINGER_S = 5.0
_DRAIN_S = 40.0  # a read in flight has its own deadline, by default 30 s
_TICK_S = 1.0
_REASSURE_S = 10.0


@dataclass(slots=True)
class Root:
    """An image that is mounted, or about to be."""

    image: Image
    options: RequestOptions
    home: dict[str, str]
    mount_fd: int  # detached EROFS mount
    dev: tuple[int, int]
    targets: list[Attached] = field(default_factory=list)
    pending: int = 0  # clients between our answer and their "attached"
    idle_since: float | None = None  # trio time

    def hold_name(self) -> str:
        return f"image:{self.image.manifest_digest}"


class _Released(NamedTuple):
    """A device that was let go, and where to find its image."""

    content_root: str
    size_bytes: int
    manifest_digest: str
    image: str
    options: RequestOptions
    home: dict[str, str]


class _Sleeper:
    """Stands for a device that was let go: a private mount namespace may still read it, then it is opened again."""

    def __init__(self, daemon: Daemon, nodeid: int, released: _Released) -> None:
        self._daemon = daemon
        self._nodeid = nodeid
        self.content_root = released.content_root
        self.size_bytes = released.size_bytes

    def read_cached(self, address: int, size: int) -> bytes | None:
        return None

    async def read(self, address: int, size: int) -> bytes:
        device = await self._daemon.revive(self._nodeid)
        return await device.read(address, size)


class Daemon:
    """Everything one worker process does. Its state belongs to the trio thread, but for `_nodes`, which reader
    threads look things up in (a dict: single look-ups are atomic)."""

    def __init__(self, link: KeeperLink, cache: BlockCache, runtime: str, linger_s: float, nursery: trio.Nursery) -> None:
        self.link = link
        self.runtime = runtime
        self.linger_s = linger_s
        self.store = ImageStore(cache, nursery)
        self.roots: dict[str, Root] = {}
        self.status: int | None = None  # exit status, once decided
        self.decided = trio.Event()
        self.decided_again = trio.Event()  # a signal after everything was let go
        self._nodes: dict[int, LayerHandle] = {}
        self._released: dict[int, _Released] = {}
        self._opening = trio.Lock()
        self._uppers: list[str] = []
        self._mountinfo = open("/proc/self/mountinfo", "rb")  # noqa: SIM115 - polled as long as the process lives
        self._changes = select.poll()
        self._changes.register(self._mountinfo, select.POLLPRI | select.POLLERR)
        self._idle_since: float | None = trio.current_time()
        self._clients = 0

    # -- Devices, for the FUSE server --------------------------------------------------------------------

    def by_name(self, content_root: bytes) -> Device | None:
        """Any thread."""
        return self.by_node(node_of(content_root))

    def by_node(self, nodeid: int) -> Device | None:
        """Any thread."""
        handle = self._nodes.get(nodeid)
        if handle is None and (released := self._released.get(nodeid)) is not None:
            return _Sleeper(self, nodeid, released)
        return handle

    def names(self) -> list[str]:
        """Any thread."""
        return [handle.content_root for handle in list(self._nodes.values())]

    async def revive(self, nodeid: int) -> LayerHandle:
        """Opens the image of a device that was let go. It then stays open as long as the daemon lives."""
        async with self._opening:
            if nodeid not in self._nodes:
                released = self._released[nodeid]
                options = _image_options(released.options, released.home)
                self._add_nodes(await self.store.open(released.image, options, released.manifest_digest))
            return self._nodes[nodeid]

    def _add_nodes(self, image: Image) -> None:
        for handle in image.layers:
            known = self._nodes.setdefault(node_of(handle.content_root), handle)
            if known.content_root != handle.content_root:
                raise HostError("two layers have the same number", "report this as a bug")

    # -- requests ----------------------------------------------------------------------------------------

    async def handle(self, stream: ControlStream, request: Request) -> None:
        self._clients += 1
        try:
            if request.op == "mount":
                await self._mount(stream, request)
            elif request.op == "attached" and request.attached is not None:
                self._attach_known(request.attached)
                await stream.send(control.ok())
            elif request.op == "stats" and request.dev is not None:
                await stream.send(control.ok(backend="kernel", **self.store.statistics(self._root_of(request.dev).image)))
            elif request.op == "list":
                await stream.send(control.ok(cache=self.store.cache.path, mounts=[self._entry(r) for r in self.roots.values()]))
            elif request.op == "ping":
                await stream.send(control.ok(pid=os.getpid(), mounts=len(self.roots)))
            elif request.op in ("upgrade", "stop"):
                if request.op == "stop" and self.roots:
                    raise UserError(f"{len(self.roots)} images are still mounted", "unmount them first: lazyfs ls")
                await stream.send(control.ok())
                self.decide(EXIT_SUCCESSOR if request.op == "upgrade" else EXIT_ENDED)
            else:
                raise UserError(f"this daemon does not do {request.op!r}")
        finally:
            self._clients -= 1

    async def _mount(self, stream: ControlStream, request: Request) -> None:
        options = _image_options(request.options, request.home)
        try:
            image = await beside(
                functools.partial(_reassure, stream, request.image),
                functools.partial(self.store.open, request.image, options),
            )
        except NeedsIndexError as error:
            await stream.send(control.needs_index(error.manifest_digest))
            return
        async with self._opening:
            root = self.roots.get(image.manifest_digest)
            joined = root is not None
            if root is None:
                try:
                    root = await self._mount_root(image, request)
                except BaseException:
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + 3):
                        await self.store.close(image)
                    raise
            else:
                await self.store.close(image)
            root.pending += 1
        try:
            clone_fd = clone_mount(root.mount_fd)
            try:
                answer = control.ok(
                    manifest_digest=image.manifest_digest, image=image.reference, joined=joined, dev=control.format_dev(root.dev)
                )
                await stream.send(answer, (clone_fd,))
            finally:
                os.close(clone_fd)
            line = await stream.line()
            if line is not None:
                root.targets.append(control.parse_attached(control.decode(line).get("attached")))
                self._save()
                await stream.send(control.ok())
        finally:
            root.pending -= 1

    async def _mount_root(self, image: Image, request: Request) -> Root:
        self._add_nodes(image)
        base = f"/proc/self/fd/{self.link.mount_fd}"
        paths = [f"{base}/{handle.content_root}" for handle in image.layers]
        # By way of the runtime directory: the kernel takes 255 bytes, and a cache may lie deep.
        namespace = os.path.join(self._cache_link(), os.path.relpath(image.namespace_path, self.store.cache.path))
        mount_fd = await trio.to_thread.run_sync(erofs_mount_detached, namespace, paths)
        root = Root(image, request.options, dict(request.home), mount_fd, _dev_of(mount_fd))
        self.link.hold(root.hold_name(), mount_fd)
        self.roots[image.manifest_digest] = root
        self._save()
        return root

    def _cache_link(self) -> str:
        link = os.path.join(self.runtime, "cache")
        if not os.path.islink(link):
            os.symlink(self.store.cache.path, link)
        return link

    def _attach_known(self, attached: Attached) -> None:
        """A client that lost its connection before it could report: the device tells which image it is."""
        root = next((root for root in self.roots.values() if root.dev in (attached.image_dev, attached.dev)), None)
        if root is None:
            raise UserError("the daemon does not serve that mount", "mount it again")
        root.targets.append(attached)
        self._save()

    def _root_of(self, dev: tuple[int, int]) -> Root:
        for root in self.roots.values():
            if root.dev == dev or any(target.dev == dev for target in root.targets):
                return root
        raise UserError("this daemon does not serve that mount")

    def _entry(self, root: Root) -> dict[str, Any]:
        return {
            "dev": control.format_dev(root.dev),
            "image": root.image.reference,
            "manifest_digest": root.image.manifest_digest,
            "backend": "kernel",
            "platform": root.options.platform,
            "targets": [_attached_json(target) for target in root.targets],
        }

    def decide(self, status: int) -> None:
        """The worker shall end, and how; `_end_when_decided` sees to it."""
        if self.status is not None:
            self.decided_again.set()
        self.status = status if self.status is None else self.status
        self.decided.set()

    def forget(self) -> None:
        """A daemon that lets go has no images of its own any more; what is still read is revived."""
        for root in self.roots.values():
            self._release_nodes(root)
        self.roots.clear()
        self._save()

    # -- life --------------------------------------------------------------------------------------------

    async def restore(self) -> None:
        """Takes up what the predecessor served: from its state file, the keeper's descriptors and the cache."""
        try:
            with open(os.path.join(self.runtime, "state.json"), "rb") as file:
                state = json.load(file)
        except (FileNotFoundError, ValueError):
            return
        for entry in state["released"]:
            options = control.parse_options(entry["options"])
            node = node_of(entry["content_root"])
            self._released[node] = _Released(**{**entry, "options": options})
        for entry in state["images"]:
            name = f"image:{entry['manifest_digest']}"
            options = control.parse_options(entry["options"])
            held = self.link.held.get(name)
            try:
                image = await self.store.open(entry["image"], _image_options(options, entry["home"]), entry["manifest_digest"])
            except (LazyfsError, NeedsIndexError) as error:
                log.error("cannot take up %s again, its uncached data gives EIO: %s", entry["image"], error)
                continue
            if held is None:
                log.error("the keeper does not hold the mount of %s any more", entry["image"])
                await self.store.close(image)
                continue
            self._add_nodes(image)
            targets = [control.parse_attached(one) for one in entry["targets"]]
            self.roots[image.manifest_digest] = Root(image, options, entry["home"], held, _dev_of(held), targets)

    def _save(self) -> None:
        state = {
            "images": [
                {
                    "image": root.image.reference,
                    "manifest_digest": root.image.manifest_digest,
                    "options": root.options._asdict(),
                    "home": root.home,
                    "targets": [_attached_json(target) for target in root.targets],
                }
                for root in self.roots.values()
            ],
            "released": [
                {**one._asdict(), "options": one.options._asdict()} for one in self._released.values()
            ],
        }
        path = os.path.join(self.runtime, "state.json")
        with open(path + ".new", "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            json.dump(state, file)
        os.replace(path + ".new", path)

    async def watch(self) -> None:
        """Lets go of images nobody mounts any more, and of everything when there is nothing left."""
        first = True
        while self.status is None:
            if first or self._changes.poll(0):
                first = False
                self._mountinfo.seek(0)
                self._mountinfo.read()
                self._look_at_mounts()
            await self._let_go_of_idle()
            busy = self.roots or self._clients
            self._idle_since = None if busy else self._idle_since or trio.current_time()
            if self._idle_since is not None and trio.current_time() - self._idle_since >= self.linger_s:
                self.decide(EXIT_ENDED)
            await trio.sleep(_TICK_S)

    def _look_at_mounts(self) -> None:
        seen = {entry.dev for entry in mounts()}
        changed = False
        for root in self.roots.values():
            gone = [target for target in root.targets if target.dev not in seen]
            for target in gone:
                root.targets.remove(target)
                changed = True
                if target.ephemeral_upper is not None:
                    self._uppers.append(target.ephemeral_upper)
            alive = root.dev in seen or root.targets or root.pending
            root.idle_since = None if alive else root.idle_since or trio.current_time()
        if changed:
            self._save()

    async def _let_go_of_idle(self) -> None:
        for upper in self._uppers:
            await trio.to_thread.run_sync(remove_upper, upper, self.store.cache.path)
        self._uppers.clear()
        now = trio.current_time()
        for root in list(self.roots.values()):
            if not root.targets and not root.pending and root.idle_since is None:
                root.idle_since = now  # its client went away before it attached anything
            if root.idle_since is not None and not root.pending and now - root.idle_since >= self.linger_s:
                async with self._opening:
                    if root.pending:
                        continue
                    del self.roots[root.image.manifest_digest]
                    self._release_nodes(root)
                    self._save()
                    self.link.drop(root.hold_name())
                    await self.store.close(root.image)

    def _release_nodes(self, root: Root) -> None:
        """Forgets the devices only this image uses; `revive` opens one again if somebody still reads it."""
        used = {id(handle) for other in self.roots.values() for handle in other.image.layers}
        for handle in root.image.layers:
            if id(handle) not in used:
                node = node_of(handle.content_root)
                self._nodes.pop(node, None)
                self._released[node] = _Released(
                    handle.content_root,
                    handle.size_bytes,
                    root.image.manifest_digest,
                    root.image.reference,
                    root.options,
                    root.home,
                )


async def _reassure(stream: ControlStream, image: str) -> None:
    """Tells a waiting client every few seconds that it is not forgotten; it gives up on a silent daemon."""
    while True:
        await trio.sleep(_REASSURE_S)
        await stream.send(control.progress(f"still opening {image}"))


def _attached_json(target: Attached) -> dict[str, Any]:
    image_dev = control.format_dev(target.image_dev) if target.image_dev else None
    return {
        "dev": control.format_dev(target.dev),
        "target": target.target,
        "ephemeral_upper": target.ephemeral_upper,
        "image_dev": image_dev,
    }


def _image_options(options: RequestOptions, home: dict[str, str] | Any) -> ImageOptions:
    auth_files = options.auth_files if options.auth_files is not None else auth_files_of(home)
    return ImageOptions(
        options.offline, options.insecure, options.timeout_s, options.platform, options.ca_files, auth_files
    )


def _dev_of(fd: int) -> tuple[int, int]:
    device = os.fstat(fd).st_dev
    return os.major(device), os.minor(device)


def remove_upper(upper: str, cache_path: str) -> None:
    """Removes an ephemeral upper directory; only ever something directly below <cache>/uppers."""
    base = os.path.join(cache_path, "uppers")
    if os.path.dirname(os.path.normpath(upper)) == base:
        shutil.rmtree(upper, ignore_errors=True)


async def run(cache_path: str, runtime: str, linger_s: float) -> int:
    """The worker's main task; returns its exit status."""
    link = KeeperLink.from_environment()
    cache = BlockCache(cache_path)
    async with trio.open_nursery() as nursery:
        daemon = Daemon(link, cache, runtime, linger_s, nursery)
        await daemon.restore()
        server = DeviceServer(link.fuse_fd, daemon, link.mount_fd, log=log.error)
        nursery.start_soon(_until_signalled, daemon)
        nursery.start_soon(_end_when_decided, daemon, server)
        if link.listen_fd is not None:
            nursery.start_soon(serve, socket.socket(fileno=os.dup(link.listen_fd)), daemon.handle)
            nursery.start_soon(daemon.watch)
        ended = await server.run()
        nursery.cancel_scope.cancel()
    return EXIT_ENDED if ended else EXIT_SUCCESSOR


async def _end_when_decided(daemon: Daemon, server: DeviceServer) -> None:
    """Status 0: let everything go, and serve until the kernel ends the connection. Else drain for a successor."""
    await daemon.decided.wait()
    if daemon.status == EXIT_ENDED:
        server.release_mount()
        daemon.forget()
        daemon.link.let_go()
        await daemon.decided_again.wait()
    await server.drain(_DRAIN_S)


async def _until_signalled(daemon: Daemon) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            daemon.decide(EXIT_SUCCESSOR)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the worker: `python -m lazyfs.daemon --cache DIR --runtime DIR [--linger S]`."""
    parser = argparse.ArgumentParser(prog="lazyfs.daemon", description="Started by lazyfs.keeper.")
    parser.add_argument("--cache", required=True)
    parser.add_argument("--runtime", required=True)
    parser.add_argument("--linger", type=float, default=DEFAULT_LINGER_S)
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s daemon[%(process)d] %(levelname)s %(message)s")
    logging.raiseExceptions = False  # a full disk under the log is no reason to end
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return trio.run(run, parsed.cache, parsed.runtime, parsed.linger)
    except LazyfsError as error:
        log.critical("%s", error)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
