"""How a daemon answers its clients (control/messages.py)."""

from __future__ import annotations

import functools
import os

import trio

from lazyfs.control import replies, requests
from lazyfs.control.messages import format_dev
from lazyfs.control.requests import Attached, Hold, Mount, Profile, Release, Request, Stats
from lazyfs.control.server import ControlStream, Handlers, Reply, answered
from lazyfs.daemon.handover import EXIT_ENDED, EXIT_SUCCESSOR
from lazyfs.daemon.keeperlink import KeeperLink
from lazyfs.daemon.life import Life
from lazyfs.daemon.roots import Root, Roots
from lazyfs.daemon.watch import Watch
from lazyfs.errors import HostError, RemoteError, UserError
from lazyfs.images.documents import Missing
from lazyfs.serving.image import Image
from lazyfs.serving.store import ImageStore
from lazyfs.tasks import beside

_REASSURE_S = 10.0
_OPENING_DEADLINES = 4  # an image is opened by a few requests, each within timeout=


class Requests:
    """The handlers. They own no state."""

    def __init__(self, store: ImageStore, roots: Roots, watch: Watch, link: KeeperLink, life: Life) -> None:
        self._store = store
        self._roots = roots
        self._watch = watch
        self._link = link
        self._life = life

    def handlers(self) -> Handlers:
        return {
            requests.Mount: self._mount,
            requests.Attached: self._attached,
            requests.Hold: self._hold,
            requests.Release: self._release,
            requests.Stats: self._stats,
            requests.Profile: self._profile,
            requests.List: self._list,
            requests.Ping: self._ping,
            requests.Upgrade: self._upgrade,
            requests.Stop: self._stop,
        }

    async def _mount(self, stream: ControlStream, request: Mount) -> Reply:
        image = await self._open(stream, request)
        if isinstance(image, Missing):
            return Reply(replies.needs_index(image.manifest_digest, image.reasons))
        lease = await self._roots.acquire(image, request)
        root = lease.root
        stream.keep(root.dev, lease.end)
        answer = replies.ok(
            manifest_digest=root.image.manifest_digest,
            image=root.image.reference,
            index_place=root.image.index_place,
            stale=root.image.stale,
            joined=lease.joined,
            dev=format_dev(root.dev),
        )
        return Reply(answer, (self._roots.clone(root),))

    async def _open(self, stream: ControlStream, request: Mount) -> Image | Missing:
        """Opens the image for a client; ends when the client goes away. Raises LazyfsError."""
        opened: list[Image | Missing] = []
        limit_s = _OPENING_DEADLINES * request.timeout_s

        async def opening() -> None:
            make_index = not request.push_index  # else the client makes it, because it pushes it
            opened.append(
                await self._store.open(
                    request.image, request.access, request.timeout_s, make_index=make_index, play=True
                )
            )

        try:
            with trio.fail_after(limit_s):
                await beside(opening, background=functools.partial(_reassure, stream, request.image))
        except BaseException as error:
            if opened and not isinstance(opened[0], Missing):  # opened just when the client went away
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 3):
                    await self._store.close(opened[0])
            if isinstance(error, trio.TooSlowError):
                message = f"{request.image} could not be opened within {limit_s:g} s"
                raise RemoteError(message, "see how the registry is doing, or raise timeout=") from None
            raise
        return opened[0]

    async def _attached(self, stream: ControlStream, request: Attached) -> Reply:
        self._roots.attach(request)
        stream.release(request.image_dev or request.dev)  # its lease, if it came by this connection
        return answered()

    async def _hold(self, _: ControlStream, request: Hold) -> Reply:
        self._roots.hold(request.name, request.dev)
        return answered()

    async def _release(self, _: ControlStream, request: Release) -> Reply:
        self._roots.release(request.name)
        return answered()

    async def _stats(self, _: ControlStream, request: Stats) -> Reply:
        root = self._roots.of(request.dev)
        layers = {"layers": len(root.image.layers), "layers_read_directly": len(root.direct)}
        return answered(**_entry(root).to_json(), **root.image.statistics(), **layers)

    async def _profile(self, _: ControlStream, request: Profile) -> Reply:
        image = self._roots.of(request.dev).image
        return answered(manifest_digest=image.manifest_digest, blocks=await image.end_trace())

    async def _list(self, _: ControlStream, __: Request) -> Reply:
        return answered(cache=self._store.cache.path, mounts=[_entry(root).to_json() for root in self._roots])

    async def _ping(self, _: ControlStream, __: Request) -> Reply:
        return self._alive()

    def _alive(self) -> Reply:
        return answered(pid=os.getpid(), mounts=len(self._roots))

    async def _upgrade(self, _: ControlStream, __: Request) -> Reply:
        if self._link.keeper_gone():
            raise HostError(
                "the keeper of this daemon was killed, so nobody would start a successor",
                "what is mounted lives on; unmount it all, and the next mount starts both anew",
            )
        return self._alive()._replace(then=lambda: self._life.end(EXIT_SUCCESSOR))

    async def _stop(self, _: ControlStream, __: Request) -> Reply:
        if used := self._watch.used():
            raise UserError(f"{used} images are still mounted", "unmount them first: lazyfs ls")
        return self._alive()._replace(then=lambda: self._life.end(EXIT_ENDED))


async def _reassure(stream: ControlStream, image: str) -> None:
    """Tells a waiting client every few seconds that it is not forgotten; it gives up on a silent daemon."""
    while True:
        await trio.sleep(_REASSURE_S)
        await stream.send(replies.progress(f"still opening {image}"))


def _entry(root: Root) -> replies.Entry:
    return replies.Entry(
        dev=root.dev,
        image=root.image.reference,
        manifest_digest=root.image.manifest_digest,
        backend="kernel",
        platform=root.access.platform,
        pid=os.getpid(),
        targets=root.targets,
        holds=sorted(root.holds),
    )
