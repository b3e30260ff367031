"""Open images: namespace file, cache entries and fetchers of every image that a process serves."""

from __future__ import annotations

import collections
import functools
import logging
import os
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.images import forget_indexes, make_index_directory, namespace_path
from lazyfs.cache.layer import CachedLayer
from lazyfs.cache.locks import lock_shared
from lazyfs.core.deadlines import answer_s
from lazyfs.core.layer.plan import Cost
from lazyfs.core.oci.digests import ContentRoot, Digest
from lazyfs.core.oci.documents import ImageConfig, parse_config
from lazyfs.errors import ImageError, LazyfsError, RemoteError
from lazyfs.images.attached import Attached
from lazyfs.images.config import check_joined, load_config
from lazyfs.images.documents import Found, FoundLayer, Missing, find_index
from lazyfs.images.heads import span_table
from lazyfs.images.packs import find_packs
from lazyfs.images.resolve import Resolved, close_source, resolve
from lazyfs.serving.blob import Blob
from lazyfs.serving.device import DataDevice
from lazyfs.serving.dispatch import Dispatcher
from lazyfs.serving.fetcher import LayerFetcher
from lazyfs.serving.image import Image
from lazyfs.serving.packblob import Advances
from lazyfs.serving.play import Player
from lazyfs.serving.spansource import SpanSource
from lazyfs.serving.trace import Traces
from lazyfs.serving.windows import Windows
from lazyfs.sources.access import Access
from lazyfs.sources.source import Sources
from lazyfs.tasks import together

log = logging.getLogger("lazyfs.images")


class _Documents(NamedTuple):
    found: Found
    config: bytes


class ImageStore:
    """All images and layers that a process has open, each layer once. Owned by the trio thread; its tasks run in
    `nursery`."""

    def __init__(self, cache: CacheDirectory, nursery: trio.Nursery) -> None:
        self.cache = cache
        self.images: dict[Digest, Image] = {}  # by manifest digest
        self.devices: dict[ContentRoot, DataDevice] = {}  # by content root
        self._nursery = nursery
        self._players: dict[Digest, Player] = {}  # of the images, by manifest digest
        self._decoders = trio.CapacityLimiter(os.cpu_count() or 1)
        self._advances = Advances()
        self._sources = Sources()
        self.traces = Traces(cache, nursery)
        # By manifest digest, so that a slow registry delays only those who open the same image.
        self._opening: collections.defaultdict[Digest, trio.Lock] = collections.defaultdict(trio.Lock)
        self._changing = trio.Lock()  # of `images` and `devices`; held across local work only

    async def open(
        self,
        text: str,
        access: Access,
        timeout_s: float,
        *,
        make_index: bool = True,
        play: bool = False,
        known: str | None = None,
    ) -> Image | Missing:
        """Opens an image, or returns it with one more user if it is open already.

        `timeout_s`: how long a read of it may take. `make_index`: a missing index is made if that is quickly done.
        `play`: it is opened for a start, so its startup pack is played. `known` as for resolve(). Raises LazyfsError.
        """
        resolved = await self._resolve(text, access, timeout_s, known)
        try:
            async with self._opening[resolved.manifest_digest]:  # a joined mount finds the first one's image
                image = self.images.get(resolved.manifest_digest)
                if image is None:
                    opened = await self._open_new(resolved, timeout_s, make_index, play and not resolved.access.offline)
                    if isinstance(opened, Missing):
                        await close_source(resolved.source)
                    return opened
                check_joined(resolved, image.config)
                image.promise(timeout_s)
                image.users += 1  # no checkpoint since it was found
        except BaseException:
            await close_source(resolved.source)
            raise
        await close_source(resolved.source)
        return image

    async def _resolve(self, text: str, access: Access, timeout_s: float, known: str | None) -> Resolved:
        """As resolve(). While the registry is unreachable, a reference means what it meant here last."""
        patience_s = answer_s(timeout_s)
        try:
            return await resolve(self.cache, text, access, known, self._sources, patience_s)
        except RemoteError as error:
            if not error.temporary:
                raise
            try:
                resolved = await resolve(
                    self.cache, text, access._replace(pull="never"), known, self._sources, patience_s
                )
            except LazyfsError:
                raise error from None
            log.warning("%s is taken as it was here last: %s", text, error.message)
            resolved.stale = error.message
            return resolved

    async def _open_new(self, resolved: Resolved, timeout_s: float, make_index: bool, play: bool) -> Image | Missing:
        if not play:
            return await self._open_one(resolved, None, timeout_s, make_index)
        attached = Attached(self.cache, resolved)
        find = functools.partial(find_packs, attached)
        player = Player(
            self._nursery,
            self._decoders,
            self._advances,
            self.cache,
            resolved.manifest_digest,
            find,
            resolved.access.learns,
        )
        opened: Image | Missing | None = None
        try:
            opened = await self._open_one(resolved, attached, timeout_s, make_index)
        finally:
            if isinstance(opened, Image):
                opened.attached = attached
                self._players[opened.manifest_digest] = player
                player.image_opened(opened)
            else:
                await player.aclose()
                await attached.aclose()
        return opened

    async def _open_one(
        self, resolved: Resolved, attached: Attached | None, timeout_s: float, make_index: bool
    ) -> Image | Missing:
        found = await self._documents(resolved, attached, make_index)
        return found if isinstance(found, Missing) else await self._open(resolved, found, timeout_s)

    async def _documents(
        self, resolved: Resolved, attached: Attached | None, make_index: bool
    ) -> _Documents | Missing:
        """The image's index, made if need be, and its config."""
        offline = resolved.access.offline
        configs: list[bytes] = []
        indexes: list[Found | Missing] = []

        async def config() -> None:
            configs.append(await load_config(self.cache, resolved))

        async def index() -> None:
            indexes.append(await find_index(self.cache, resolved, offline=offline, attached=attached))

        try:
            await together(config, index)
        except BaseException:
            for one in indexes:
                if isinstance(one, Found):
                    await close_source(one.source)
            raise
        found = indexes[0]
        if isinstance(found, Missing) and make_index and not offline:
            found = await self._make_index(resolved, configs[0], found)
        return found if isinstance(found, Missing) else _Documents(found, configs[0])

    async def _make_index(self, resolved: Resolved, config: bytes, missing: Missing) -> Found | Missing:
        """Makes a missing index if nearly all layers of the image were read before."""

        def load() -> Callable[[CacheDirectory, Resolved, ImageConfig], Awaitable[bool]]:
            from lazyfs.indexing.small import make_small_index  # here, in a thread: takes 30 ms, and is rarely wanted

            return make_small_index

        make = await trio.to_thread.run_sync(load)
        if not await make(self.cache, resolved, parse_config(config)):
            return missing
        return await find_index(self.cache, resolved, offline=True)

    async def _open(self, resolved: Resolved, documents: _Documents, timeout_s: float) -> Image:
        try:
            async with self._changing:
                image = await trio.to_thread.run_sync(self._assemble, resolved, documents, timeout_s)
                self.images[resolved.manifest_digest] = image
                return image
        except BaseException as error:
            if isinstance(error, ImageError):  # the next mount shall look for another index than this
                forget_indexes(self.cache, resolved.manifest_digest)
                for layer in documents.found.layers.values():
                    layer.kept.forget()
            await close_source(documents.found.source)
            raise

    def _assemble(self, resolved: Resolved, documents: _Documents, timeout_s: float) -> Image:
        """Opens all that needs no network: namespace file, cache entries, devices. Runs in a worker thread."""
        lock_fd = self._lock(resolved.manifest_digest)
        fresh: dict[ContentRoot, DataDevice] = {}
        try:
            found = documents.found
            by_root = {layer.head.record.content_root: layer for layer in found.layers.values()}
            devices = found.namespace.devices
            cost = Cost()
            roots = [ContentRoot(device.tag.decode()) for device in devices]
            layers = [self._layer(resolved, found, by_root[root], fresh, timeout_s, cost) for root in roots]
            sizes = [device.size_bytes for device in devices]
            if sizes != [device.size_bytes for device, _ in layers]:
                raise ImageError("the namespace in the index does not fit its block tables")
        except BaseException:
            for device in fresh.values():
                device.layer.close()
            os.close(lock_fd)
            raise
        self.devices.update(fresh)
        dispatcher = Dispatcher(self._nursery)
        for device, blob in layers:
            fetcher = device.fetcher
            source = SpanSource(blob, fetcher.fragments, self._decoders, fetcher.sources)
            fetcher.add(source, dispatcher)
        image = Image(
            reference=str(resolved.reference),
            manifest_digest=resolved.manifest_digest,
            config=documents.config,
            namespace_path=namespace_path(self.cache, resolved.manifest_digest),
            layers=tuple(device for device, _ in layers),
            source=resolved.source,
            index_source=found.source,
            index_place=found.place,
            dispatcher=dispatcher,
            lock_fd=lock_fd,
            stale=resolved.stale,
            kept=tuple(layer.kept for layer in found.layers.values()),
            traces=self.traces,
        )
        image.promise(timeout_s)
        return image

    def _lock(self, manifest_digest: Digest) -> int:
        """Takes the image's directory against eviction, making it anew if it has just been evicted."""
        while True:
            path = os.path.join(make_index_directory(self.cache, manifest_digest), "lock")
            try:
                lock_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            if lock_shared(lock_fd, path):
                return lock_fd
            os.close(lock_fd)

    def _layer(
        self,
        resolved: Resolved,
        found: Found,
        layer: FoundLayer,
        fresh: dict[ContentRoot, DataDevice],
        timeout_s: float,
        cost: Cost,
    ) -> tuple[DataDevice, Blob]:
        """The data device of one layer, from `fresh` if it was not open before, and where to fetch it."""
        record = layer.head.record
        content_root = record.content_root
        device = self.devices.get(content_root) or fresh.get(content_root)
        if device is None:
            cached = self._cached(content_root) or self.cache.create_layer(content_root, layer.head.table())
            device = DataDevice(cached, LayerFetcher(cached))
            fresh[content_root] = device
        spans = span_table(layer.head, device.layer.table.tar_bytes)
        remote = (found.source, layer.windows_digest) if layer.windows_digest else None
        windows = Windows(layer.head.windows, layer.kept, remote)
        return device, Blob(resolved.source, record.blob_digest, spans, windows, timeout_s, cost)

    def _cached(self, content_root: ContentRoot) -> CachedLayer | None:
        """The layer if it is in the cache and whole: then no table has to be read from the index."""
        try:
            return self.cache.open_layer(content_root)
        except ImageError:
            return None  # create_layer() sets it aside

    async def aclose(self) -> None:
        """Closes the connections of all sources. The last act."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
            await self._sources.aclose()

    async def close(self, image: Image) -> None:
        """One user less; with the last one the image's source and the layers nobody else uses are closed."""
        async with self._changing:
            image.users -= 1
            if image.users:
                return
            del self.images[image.manifest_digest]
            self.traces.leave(image.manifest_digest)
            player = self._players.pop(image.manifest_digest, None)
            if player is not None:
                await player.aclose()
            kept = {device.content_root for other in self.images.values() for device in other.layers}
            for device in image.layers:
                device.fetcher.remove(image.dispatcher)
                device.release(image.manifest_digest)
                if device.content_root not in kept and device.content_root in self.devices:
                    del self.devices[device.content_root]
                    device.layer.close()
            os.close(image.lock_fd)
            for index in image.kept:
                index.close()
        try:
            await image.dispatcher.aclose()
        finally:
            await close_source(image.source)
            await close_source(image.index_source)
            if image.attached is not None:
                await image.attached.aclose()
