"""Plays a startup pack: brings what it has into the cache, in the order of need, while the image is used."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Sequence

import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.images import forget_packs, namespace_path
from lazyfs.cache.profiles import load_profile
from lazyfs.core.oci.digests import ContentRoot, Digest
from lazyfs.core.starts.pack import PackHead
from lazyfs.errors import ImageError, LazyfsError, NotFound
from lazyfs.images.packs import FoundPack
from lazyfs.serving.dispatch import Dispatcher
from lazyfs.serving.foresight import LOOK_S, is_another, play_known
from lazyfs.serving.image import Image
from lazyfs.serving.packblob import Advances, PackBlob
from lazyfs.serving.packsource import PackSource
from lazyfs.serving.schedule import Rank
from lazyfs.tasks import open_nursery

log = logging.getLogger("lazyfs.fetch")

# How often a pack is asked again in all, and how often in a row when that brings nothing; and the first pause then,
# which doubles.
MAX_FAILURES = 20
MAX_TRIES = 5
PAUSE_S = 0.5
_CLOSE_S = 2.0
# An index repository may be slow to say that it has no pack: what is known here does not wait longer for it.
_SEARCH_S = 0.1
_TURN_FRAMES = 256  # that are wanted in one turn of the loop
_MAX_PACKS = 2  # that are tried: the best one may be damaged


class Player:
    """Looks for one image's pack and plays it, until all of it is here, or it is of no use, or aclose().

    It starts before the image is open if nothing of that is in the cache; else afterwards, and only if what a start
    needs is not known to be here. It never fails: what it does not bring is fetched when it is read. Owned by the trio
    thread; its task lives in `nursery`.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        decoders: trio.CapacityLimiter,
        advances: Advances,
        cache: CacheDirectory,
        manifest_digest: Digest,
        find: Callable[[], Awaitable[Sequence[FoundPack]]],
        learns: bool = False,
    ) -> None:
        """`find` gives the image's packs, the best first, whose sources stay open as long as the image's dispatcher.
        `learns`: what earlier starts on this host touched is fetched ahead, too."""
        self._cache = cache
        self._digest = manifest_digest
        self._find = find
        self._learns = learns
        self._searched = trio.Event()  # whether there is a pack is known
        self._has_pack = False
        self._played = trio.Event()  # the pack is over
        self._decoders = decoders
        self._advances = advances
        self._image: Image  # once it is opened
        self._opened = trio.Event()
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        nursery.start_soon(self._run)

    def image_opened(self, image: Image) -> None:
        """What it plays can be put somewhere from now on, until aclose()."""
        self._image = image
        self._opened.set()

    async def aclose(self) -> None:
        """Ends it. The sources may be closed once the image's dispatcher is."""
        self._scope.cancel()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_S):
            await self._ended.wait()

    async def ended(self) -> None:
        """Returns when there is no more to play."""
        await self._ended.wait()

    async def _run(self) -> None:
        try:
            with self._scope:
                if await trio.Path(namespace_path(self._cache, self._digest)).exists():
                    await self._opened.wait()
                    if await trio.to_thread.run_sync(_is_played_out, self._cache, self._image):
                        return
                async with open_nursery() as nursery:
                    if self._learns:
                        nursery.start_soon(self._play_known)
                    await self._play_packs()
        except Exception:
            log.exception("playing failed in an unforeseen way")
        finally:
            self._ended.set()

    async def _play_packs(self) -> None:
        found = (await self._find())[:_MAX_PACKS]
        self._has_pack = bool(found)
        self._searched.set()
        for one in found:
            if await self._plays(one):
                break
        self._played.set()

    async def _play_known(self) -> None:
        """What earlier starts on this host touched: all of it without a pack, else what that did not bring."""
        await self._opened.wait()
        with trio.move_on_after(_SEARCH_S):
            await self._searched.wait()
        if self._has_pack:
            await self._played.wait()
        await play_known(self._cache, self._image, own=self._has_pack)

    async def _plays(self, found: FoundPack) -> bool:
        """Plays a pack, or says that it is none."""
        try:
            await self._take(found)
        except (ImageError, NotFound) as error:
            log.warning("the startup pack %s is of no use: %s", found.digest[:19], error)
            forget_packs(self._cache, self._digest)  # it may have been replaced since it was found
            return False
        except LazyfsError as error:
            log.warning("the startup pack %s cannot be played: %s", found.digest[:19], error)
        return True

    async def _take(self, found: FoundPack) -> None:
        blob = PackBlob(found, self._advances)
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(blob.begin)
                head = await blob.head()
                if await trio.to_thread.run_sync(_has_any, self._cache, head.layers):
                    blob.shorten_beginning()
                await self._opened.wait()
                blob.opened()
                self._image.counters.append(found.source.counters)
                await self._play(self._image, blob, head)
                nursery.cancel_scope.cancel()
        finally:
            blob.close()

    async def _play(self, image: Image, blob: PackBlob, head: PackHead) -> None:
        layers = {device.content_root: device.layer for device in image.layers}
        source = await trio.to_thread.run_sync(PackSource, blob, head, layers, self._decoders)
        for device in image.layers:
            device.fetcher.add(source, image.dispatcher)
        try:
            async with open_nursery() as nursery:
                nursery.start_soon(_keep_promises, source, image.dispatcher)
                nursery.start_soon(_judge, source, image)
                await _bring(source, image.dispatcher)
                nursery.cancel_scope.cancel()
        finally:
            for device in image.layers:
                device.fetcher.drop(source)
            image.dispatcher.look_again(source, source.close())
        if source.refused:
            log.warning("%d blocks of the startup pack of %s did not verify", source.refused, image.reference)


async def _keep_promises(source: PackSource, dispatcher: Dispatcher) -> None:
    """Sends readers elsewhere for whom the pack takes too long."""
    while True:
        dispatcher.look_again(source, await source.late())


async def _judge(source: PackSource, image: Image) -> None:
    """Ends it if the start mostly reads what the pack has not: the rest would be fetched in vain."""
    numbers = {device.content_root: number for number, device in enumerate(image.layers)}
    known = {(numbers[root], block) for root, block in source.blocks()}
    while True:
        await trio.sleep(LOOK_S)
        if is_another(known, image.traces.touched(image.manifest_digest)):
            break
    log.info("%s: this start is another one than its startup pack is of", image.reference)
    image.dispatcher.look_again(source, source.close())


async def _bring(source: PackSource, dispatcher: Dispatcher) -> None:
    """Wants what the pack has and the cache has not, and again what a broken request did not bring."""
    failures = tries = 0  # in all, and since something came
    while lacking := await trio.to_thread.run_sync(source.lacking):
        published = source.published
        for number, frame in enumerate(lacking):
            dispatcher.want(source, source.part(frame), Rank.PACK)
            if number % _TURN_FRAMES == _TURN_FRAMES - 1:
                await trio.lowlevel.checkpoint()  # a hostile pack may have a frame for each block
        while not source.failed and source.awaits(lacking):
            await source.rested()
        if source.is_over:
            return
        if source.failed:
            failures += 1
            tries = tries + 1 if source.published == published else 0
            if tries > MAX_TRIES or failures > MAX_FAILURES:
                return
            if tries:
                await trio.sleep(PAUSE_S * 2 ** (tries - 1))
            source.go_on()


def _has_any(cache: CacheDirectory, layers: Sequence[ContentRoot]) -> bool:
    return any(os.path.exists(cache.layer_path(root)) for root in layers)


def _is_played_out(cache: CacheDirectory, image: Image) -> bool:
    """Whether starts of the image need nothing that is not here, as far as is known. Blocks the thread."""
    layers = {device.content_root: device.layer for device in image.layers}
    if all(layer.is_complete() for layer in layers.values()):
        return True
    profile = load_profile(cache, image.manifest_digest)
    if profile is None:
        return False
    known = [layers.get(root) for root in profile.layers]
    for touch in profile.touches:
        layer = known[touch.layer]
        if layer is not None and touch.block < layer.table.count and not layer.has(touch.block):
            return False
    return True
