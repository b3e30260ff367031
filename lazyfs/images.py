"""From a reference to an opened image: manifest, index, namespace file and layers, all in the cache.

<cache>/indexes/<manifest digest, hex>/manifest   the image manifest, verbatim
                                      /config     the image config, verbatim
                                      /index      the index blob (core/index.py)
                                      /windows    digest of the windows blob in the registry, may be empty
                                      /groups/    windows fetched or built so far, one file a group
                                      /namespace.erofs
                                      /lock       as for layers (cache.py)
<cache>/refs/<sha256 of reference and platform>   manifest digest the reference led to when last asked
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import platform as host
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import trio

from lazyfs.cache import BlockCache, lock_shared
from lazyfs.core.erofsread import ErofsReader
from lazyfs.core.index import ARTIFACT_TYPE, INDEX_MEDIA_TYPE, MAX_INDEX_BYTES, WINDOWS_MEDIA_TYPE, Index
from lazyfs.core.oci import (
    Descriptor,
    Manifest,
    host_platform,
    parse_config,
    parse_manifest,
    select_platform,
)
from lazyfs.core.reference import Reference, is_digest, parse_reference
from lazyfs.core.spans import WINDOWS_PER_GROUP, SpanTable
from lazyfs.credentials import auth_files_of
from lazyfs.errors import HostError, ImageError, LazyfsError, RemoteError, UserError
from lazyfs.fetch import FetchLimits, LayerFetcher, LayerHandle, Origin, Windows
from lazyfs.process import resident_bytes
from lazyfs.source import Source, SourceOptions, Sources, open_source

_MAX_CONFIG_BYTES = 8 << 20
_OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """How to reach and open an image. `timeout_s` bounds each read; None for platform means this host's."""

    offline: bool = False
    insecure: bool = False
    timeout_s: float = 30.0
    platform: str | None = None
    ca_files: tuple[str, ...] = ()
    auth_files: tuple[str, ...] | None = None
    environ: Mapping[str, str] | None = None  # of the user the image is opened for; None: this process's

    def source_options(self) -> SourceOptions:
        auth_files = self.auth_files
        if auth_files is None and self.environ is not None:
            auth_files = auth_files_of(self.environ)
        # Half of it, so that a connection that fell silent costs a read time, but does not fail it.
        patience_s = self.timeout_s / 2
        return SourceOptions(
            self.insecure, self.ca_files, auth_files, environ=self.environ, patience_s=patience_s
        )


class NeedsIndexError(Exception):
    """The image has no index, neither here nor in its registry. Carries the manifest digest."""

    def __init__(self, manifest_digest: str) -> None:
        super().__init__(manifest_digest)
        self.manifest_digest = manifest_digest


@dataclass(slots=True)
class Resolved:
    """An image manifest that a reference led to. `source` belongs to the holder, who closes it."""

    reference: Reference
    manifest_digest: str
    manifest_bytes: bytes
    manifest: Manifest
    source: Source


def index_directory(cache: BlockCache, manifest_digest: str) -> str:
    """Where everything about one image manifest is kept."""
    return os.path.join(cache.path, "indexes", manifest_digest.removeprefix("sha256:"))


def make_index_directory(cache: BlockCache, manifest_digest: str) -> str:
    """Makes that place, or notes that it is in use; returns it. HostError: disk."""
    directory = index_directory(cache, manifest_digest)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with open(os.path.join(directory, "lock"), "ab"):  # first: without it the directory counts as rubbish
            os.utime(os.path.join(directory, "lock"))
        os.makedirs(os.path.join(directory, "groups"), mode=0o700, exist_ok=True)
    except OSError as error:
        raise HostError(f"cannot write to the cache: {error.strerror}", "check the disk") from None
    return directory


async def resolve(
    cache: BlockCache,
    text: str,
    options: ImageOptions,
    known: str | None = None,
    sources: Sources | None = None,
) -> Resolved:
    """Finds the manifest a reference means, with as few requests as possible: none for a digest that is here.

    `known`: the manifest's digest, if it was resolved before (a daemon that takes up its predecessor's
    mounts). `sources`: where connections are shared. Raises LazyfsError; UserError if `offline` and
    the reference was never seen.
    """
    reference = parse_reference(text)
    wanted = options.platform or host_platform(host.machine())
    key = hashlib.sha256(f"{reference} {wanted}".encode()).hexdigest()
    note = os.path.join(cache.path, "refs", key)
    source = (sources.open if sources else open_source)(reference, options.source_options())
    try:
        if known is None and (options.offline or _digest_of(reference)):
            known = (_read(note) or b"").decode("ascii", "replace")
        if known and is_digest(known):
            found = _read(os.path.join(index_directory(cache, known), "manifest"))
            if found is not None and "sha256:" + hashlib.sha256(found).hexdigest() == known:
                return Resolved(reference, known, found, _image_manifest(found), source)
        if options.offline:
            raise UserError(f"{reference} is not in the cache", "mount it once without 'offline'")
        digest, raw = await _ask(source, reference, wanted)
        manifest = _image_manifest(raw)
        directory = make_index_directory(cache, digest)
        for path, content in ((os.path.join(directory, "manifest"), raw), (note, digest.encode())):
            if _read(path) != content:
                cache.write_atomically(path, content)
        return Resolved(reference, digest, raw, manifest, source)
    except BaseException:
        await _close_source(source)
        raise


async def _ask(source: Source, reference: Reference, platform: str) -> tuple[str, bytes]:
    name = _digest_of(reference) or getattr(reference, "tag", None) or getattr(reference, "ref", None) or ""
    for _ in range(4):  # image indexes may nest; real ones are one deep
        raw, media_type = await source.manifest(name)
        parsed = parse_manifest(raw, media_type)
        if isinstance(parsed, Manifest):
            return "sha256:" + hashlib.sha256(raw).hexdigest(), raw
        name = select_platform(parsed, platform).digest
    raise ImageError(f"{reference}: image indexes are nested too deep")


def _digest_of(reference: Reference) -> str | None:
    digest = getattr(reference, "digest", None)
    return digest if isinstance(digest, str) else None


def _image_manifest(raw: bytes) -> Manifest:
    declared = json.loads(raw).get("mediaType") or _OCI_MANIFEST
    parsed = parse_manifest(raw, declared)
    if not isinstance(parsed, Manifest):
        raise ImageError("the manifest in the cache is not that of an image", "remove it: lazyfs cache prune")
    return parsed


async def load_config(cache: BlockCache, resolved: Resolved) -> bytes:
    """The image config's bytes, from the cache or the source; verified against the manifest."""
    path = os.path.join(index_directory(cache, resolved.manifest_digest), "config")
    wanted = resolved.manifest.config
    kept = _read(path)
    if kept is not None and "sha256:" + hashlib.sha256(kept).hexdigest() == wanted.digest:
        return kept
    if wanted.size_bytes > _MAX_CONFIG_BYTES:
        raise ImageError(f"the image config is larger than {_MAX_CONFIG_BYTES >> 20} MiB")
    raw = await resolved.source.blob(wanted.digest, wanted.size_bytes)
    parse_config(raw)
    cache.write_atomically(path, raw)
    return raw


async def load_index(cache: BlockCache, resolved: Resolved, *, offline: bool = False) -> tuple[Index, str]:
    """The image's index and the digest of its windows blob, from the cache or attached in the registry.

    An attached index that is damaged, of another version or of another image is passed over, with the next
    one tried. Raises NeedsIndexError if none is left.
    """
    directory = index_directory(cache, resolved.manifest_digest)
    blob = _read(os.path.join(directory, "index"))
    if blob is not None:
        with contextlib.suppress(ImageError):
            windows_digest = (_read(os.path.join(directory, "windows")) or b"").decode("ascii", "replace")
            return checked_index(blob, resolved, windows_digest), windows_digest
    if not offline:
        source = resolved.source
        for found in await _referrers(source, resolved.manifest_digest):
            try:
                raw, media_type = await source.manifest(found.digest)
                artifact = parse_manifest(raw, media_type)
                if not isinstance(artifact, Manifest) or not artifact.layers:
                    continue
                tables = artifact.layers[0]
                if tables.media_type != INDEX_MEDIA_TYPE or tables.size_bytes > MAX_INDEX_BYTES:
                    continue
                windows = [one.digest for one in artifact.layers[1:] if one.media_type == WINDOWS_MEDIA_TYPE]
                blob = await source.blob(tables.digest, tables.size_bytes)
                index = checked_index(blob, resolved, windows[0] if windows else "")
            except ImageError:
                continue
            except RemoteError as error:
                if error.temporary:
                    raise
                continue
            keep_index(cache, resolved.manifest_digest, blob, windows[0] if windows else "")
            return index, windows[0] if windows else ""
    raise NeedsIndexError(resolved.manifest_digest)


async def _referrers(source: Source, manifest_digest: str) -> list[Descriptor]:
    """What is attached; nothing if the registry does not say (some forbid the question)."""
    try:
        return await source.referrers(manifest_digest, ARTIFACT_TYPE)
    except RemoteError as error:
        if error.temporary:
            raise
    except ImageError:
        pass
    return []


def checked_index(blob: bytes, resolved: Resolved, windows_digest: str) -> Index:
    """The index, if it is one of this very image: manifest, layers and sizes agree. Else ImageError."""
    index = Index(blob)
    if any(layer.window_groups for layer in index.layers) and not is_digest(windows_digest):
        raise ImageError("the index lacks the windows its spans need")
    ours = [(layer.digest, layer.size_bytes) for layer in resolved.manifest.layers]
    if index.manifest_digest != resolved.manifest_digest or ours != [
        (layer.blob_digest, layer.blob_bytes) for layer in index.layers
    ]:
        raise ImageError("the index belongs to another image")
    return index


def has_index(cache: BlockCache, manifest_digest: str) -> bool:
    """Whether an index of that image is in the cache."""
    return os.path.exists(os.path.join(index_directory(cache, manifest_digest), "index"))


def keep_index(cache: BlockCache, manifest_digest: str, blob: bytes, windows_digest: str) -> None:
    """Files an index in the cache; the index itself last, since its presence says that all is there."""
    directory = make_index_directory(cache, manifest_digest)
    cache.write_atomically(os.path.join(directory, "windows"), windows_digest.encode())
    cache.write_atomically(os.path.join(directory, "index"), blob)


@dataclass(slots=True)
class Image:
    """An opened image. Close it through the ImageStore that opened it."""

    reference: str
    manifest_digest: str
    config: bytes
    namespace_path: str
    layers: tuple[LayerHandle, ...]  # in the order of the namespace's device table
    source: Source
    lock_fd: int
    users: int = 1

    def statistics(self) -> dict[str, Any]:
        """What `lazyfs stats` shows: transfers of the image's source, blocks and reads of its layers, and the
        memory of the whole process."""
        counters = self.source.counters
        return {
            "bytes_fetched": counters.bytes_fetched,
            "requests": counters.requests,
            "retries": counters.retries,
            "blocks_present": sum(handle.layer.present_blocks() for handle in self.layers),
            "blocks_total": sum(handle.layer.table.count for handle in self.layers),
            "cache_hits": sum(handle.hits for handle in self.layers),
            "cache_misses": sum(handle.misses for handle in self.layers),
            "memory_bytes": resident_bytes(),
        }


class ImageStore:
    """All images and layers a process has open; each layer once. Owned by the trio thread, lives in
    `nursery`.
    """

    def __init__(self, cache: BlockCache, nursery: trio.Nursery) -> None:
        self.cache = cache
        self.images: dict[str, Image] = {}  # by manifest digest
        self.handles: dict[str, LayerHandle] = {}  # by content root
        self._nursery = nursery
        self._limits = FetchLimits()
        self._sources = Sources()
        # By manifest digest, so that a slow registry holds up nobody but those who want the same image.
        self._opening: collections.defaultdict[str, trio.Lock] = collections.defaultdict(trio.Lock)
        self._changing = trio.Lock()  # of `images` and `handles`; held across local work only

    async def open(self, text: str, options: ImageOptions, known: str | None = None) -> Image:
        """Opens an image, or returns it with one more user if it is open already. `known` as for resolve().

        Raises LazyfsError or NeedsIndexError.
        """
        resolved = await self._resolve(text, options, known)
        try:
            async with self._opening[resolved.manifest_digest]:  # a joined mount finds the first one's image
                image = self.images.get(resolved.manifest_digest)
                if image is None:
                    return await self._open(resolved, options)
                image.users += 1  # no checkpoint since it was found
        except BaseException:
            await _close_source(resolved.source)
            raise
        await _close_source(resolved.source)
        return image

    async def _resolve(self, text: str, options: ImageOptions, known: str | None) -> Resolved:
        """As resolve(). While its registry is away, a reference means what is open under it."""
        try:
            return await resolve(self.cache, text, options, known, self._sources)
        except RemoteError as error:
            if not error.temporary:
                raise
            try:
                offline = replace(options, offline=True)
                resolved = await resolve(self.cache, text, offline, known, self._sources)
            except LazyfsError:
                raise error from None
            if resolved.manifest_digest not in self.images:
                await _close_source(resolved.source)
                raise
            return resolved

    async def _open(self, resolved: Resolved, options: ImageOptions) -> Image:
        results: dict[str, bytes] = {}
        failures: list[LazyfsError] = []

        async def config() -> None:
            try:
                results["config"] = await load_config(self.cache, resolved)
            except LazyfsError as error:
                failures.append(error)

        missing: NeedsIndexError | None = None
        index, windows_digest = None, ""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(config)
            try:
                index, windows_digest = await load_index(self.cache, resolved, offline=options.offline)
            except NeedsIndexError as error:
                missing = error
            except LazyfsError as error:
                failures.append(error)
        if failures:
            raise failures[0]
        if missing is not None or index is None:
            raise missing or NeedsIndexError(resolved.manifest_digest)
        async with self._changing:
            try:
                image = await trio.to_thread.run_sync(
                    self._assemble, resolved, index, windows_digest, results["config"], options
                )
            except ImageError:  # the next mount shall look for another index than this
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(index_directory(self.cache, resolved.manifest_digest), "index"))
                raise
            self.images[resolved.manifest_digest] = image
            return image

    def _assemble(
        self, resolved: Resolved, index: Index, windows_digest: str, config: bytes, options: ImageOptions
    ) -> Image:
        """Everything that needs no network: namespace file, cache entries, handles. In a worker thread."""
        lock_fd = self._lock(resolved.manifest_digest)
        fresh: dict[str, LayerHandle] = {}
        try:
            namespace_path = os.path.join(
                index_directory(self.cache, resolved.manifest_digest), "namespace.erofs"
            )
            namespace = self._namespace(namespace_path, index)
            layers = [
                self._layer(resolved, index, windows_digest, device.tag.decode("ascii", "replace"), fresh)
                for device in ErofsReader(namespace).devices
            ]
            sizes = [device.size_bytes for device in ErofsReader(namespace).devices]
            if sizes != [handle.size_bytes for handle, _ in layers]:
                raise ImageError("the namespace in the index does not fit its block tables")
        except BaseException:
            for handle in fresh.values():
                handle.layer.close()
            os.close(lock_fd)
            raise
        self.handles.update(fresh)
        for handle, origin in layers:
            handle.fetcher.add_origin(origin)
            handle.timeout_s = options.timeout_s
        return Image(
            reference=str(resolved.reference),
            manifest_digest=resolved.manifest_digest,
            config=config,
            namespace_path=namespace_path,
            layers=tuple(handle for handle, _ in layers),
            source=resolved.source,
            lock_fd=lock_fd,
        )

    def _lock(self, manifest_digest: str) -> int:
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

    def _namespace(self, path: str, index: Index) -> bytes:
        namespace = _read(path)
        if namespace is None or hashlib.sha256(namespace).hexdigest() != index.namespace_sha256:
            namespace = index.namespace()
            # Once, before the kernel sees it (measured: 0.13 s for 11,700 inodes).
            ErofsReader(namespace).check()
            self.cache.write_atomically(path, namespace)
        return namespace

    def _layer(
        self,
        resolved: Resolved,
        index: Index,
        windows_digest: str,
        content_root: str,
        fresh: dict[str, LayerHandle],
    ) -> tuple[LayerHandle, Origin]:
        """The handle of one device, from `fresh` if it was not open before, and where to fetch it."""
        numbers = [number for number, one in enumerate(index.layers) if one.content_root == content_root]
        if not numbers:
            raise ImageError("the namespace in the index names a layer the image does not have")
        record = index.layers[numbers[0]]
        handle = self.handles.get(content_root) or fresh.get(content_root)
        if handle is None:
            layer = self.cache.create_layer(content_root, index.table(numbers[0]))
            handle = LayerHandle(layer, LayerFetcher(layer, self._limits, self._nursery))
            fresh[content_root] = handle
        spans = SpanTable(record.compression, record.blob_bytes, record.tar_bytes, index.spans(numbers[0]))
        if spans.tar_bytes < handle.layer.table.tar_bytes:
            raise ImageError("the index's tables disagree about a layer's length")
        if spans.windows > WINDOWS_PER_GROUP * len(record.window_groups):
            raise ImageError("the index lacks windows that its spans need")
        remote = (resolved.source, windows_digest) if windows_digest else None
        groups = os.path.join(index_directory(self.cache, resolved.manifest_digest), "groups")
        return handle, Origin(
            resolved.source, record.blob_digest, spans, Windows(record.window_groups, groups, remote)
        )

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
            kept = {handle.content_root for other in self.images.values() for handle in other.layers}
            gone = []
            for handle in image.layers:
                gone += handle.fetcher.remove_origins(image.source)
                if handle.content_root not in kept and handle.content_root in self.handles:
                    del self.handles[handle.content_root]
                    handle.layer.close()
            os.close(image.lock_fd)
        try:
            for origin in gone:
                await origin.stop()
        finally:
            await _close_source(image.source)


async def _close_source(source: Source) -> None:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
        await source.aclose()


def _read(path: str) -> bytes | None:
    """A small file of the cache; None if there is none. HostError: disk."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}", "check the disk") from None
