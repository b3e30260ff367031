"""The documents of an image: its config and its index, from the cache or the registry, verified."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import trio

from lazyfs.cache import images
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.images import index_directory, read_file
from lazyfs.cache.scans import KeptLayerIndex
from lazyfs.core.erofs.metadata import Metadata
from lazyfs.core.index import imageindex, v1
from lazyfs.core.index.imageindex import ImageIndex
from lazyfs.core.index.layerindex import LayerHead
from lazyfs.core.oci.digests import ContentRoot, Digest
from lazyfs.core.oci.documents import MAX_CONFIG_BYTES, Descriptor, Manifest, parse_config, parse_manifest
from lazyfs.core.oci.reference import is_digest
from lazyfs.errors import HostError, ImageError, LazyfsError, NotFound, RemoteError
from lazyfs.images.heads import Heads
from lazyfs.images.resolve import Resolved
from lazyfs.sources.source import Source


@dataclass(frozen=True, slots=True)
class FoundLayer:
    """What an index has of one layer: tables, and where its windows are."""

    head: LayerHead | v1.LayerV1
    kept: KeptLayerIndex | images.WindowGroups
    windows_digest: str  # of the blob in the image's repository that `head.windows` are ranges of; empty: not there


@dataclass(frozen=True, slots=True)
class Found:
    """An index of this very image. `artifact_digest`: of the artifact it was attached as, empty if it came from the
    cache. `layers`: by number, those that a file's data lies in.
    """

    index: ImageIndex | v1.IndexV1
    namespace: Metadata
    layers: Mapping[int, FoundLayer]
    artifact_digest: str = ""


class Missing(NamedTuple):
    """The image has no index, neither here nor in its registry. `reasons`: a sentence for each that was passed over."""

    manifest_digest: Digest
    reasons: tuple[str, ...] = ()


async def load_config(cache: CacheDirectory, resolved: Resolved) -> bytes:
    """The image config's bytes, from the cache or the source; verified against the manifest."""
    path = os.path.join(index_directory(cache, resolved.manifest_digest), "config")
    wanted = resolved.manifest.config
    kept = read_file(path)
    if kept is not None and "sha256:" + hashlib.sha256(kept).hexdigest() == wanted.digest:
        return kept
    if wanted.size_bytes > MAX_CONFIG_BYTES:
        raise ImageError(f"the image config is larger than {MAX_CONFIG_BYTES >> 20} MiB")
    raw = await resolved.source.blob(wanted.digest, wanted.size_bytes)
    parse_config(raw)
    cache.write_atomically(path, raw)
    return raw


async def find_index(
    cache: CacheDirectory, resolved: Resolved, *, offline: bool = False, all_layers: bool = False
) -> Found | Missing:
    """The image's index, from the cache or attached in the registry, and then kept in the cache.

    One that is damaged, of another version or of another image is passed over, and the next one tried. `all_layers`:
    with those in which no file's data lies. Raises RemoteError if the registry cannot say what is attached just now, or
    not deliver it; HostError: disk.
    """
    finder = _Finder(cache, resolved, offline, all_layers)
    found = await finder.in_cache()
    if found is None and not offline:
        found = await finder.attached()
    return Missing(resolved.manifest_digest, tuple(finder.reasons)) if found is None else found


class _Finder:
    """One search. `reasons`: why what was found is of no use."""

    def __init__(self, cache: CacheDirectory, resolved: Resolved, offline: bool, all_layers: bool) -> None:
        self.reasons: list[str] = []
        self._cache = cache
        self._resolved = resolved
        self._digest = resolved.manifest_digest
        self._offline = offline
        self._all_layers = all_layers

    async def in_cache(self) -> Found | None:
        for kept in images.kept_indexes(self._cache, self._digest):
            try:
                return await self._opened(kept.blob, attached=kept.attached)
            except LazyfsError as error:
                self._pass_over("the one in the cache", error)
        known = images.kept_v1_index(self._cache, self._digest)
        if known is not None:
            try:
                return await self._opened_v1(*known)
            except ImageError as error:
                self._pass_over("the one in the cache", error)
        return None

    async def attached(self) -> Found | None:
        """The first of the newer version, else of the older one, that is whole and of this image."""
        source = self._resolved.source
        for artifact in await _referrers(source, self._digest, imageindex.ARTIFACT_TYPE):
            try:
                blob = await _image_index(source, artifact.digest)
                found = await self._opened(blob, artifact.digest, attached=True)
                images.keep_index(self._cache, self._digest, blob, attached=True)
                return found
            except LazyfsError as error:
                self._pass_over(f"attached {artifact.digest[:19]}", error)
        for artifact in await _referrers(source, self._digest, v1.ARTIFACT_TYPE):
            try:
                blob, windows_digest = await _v1_index(source, artifact.digest)
                found = await self._opened_v1(blob, windows_digest, artifact.digest)
                images.keep_v1_index(self._cache, self._digest, blob, windows_digest)
                return found
            except LazyfsError as error:
                self._pass_over(f"attached {artifact.digest[:19]}", error)
        return None

    def _pass_over(self, which: str, error: LazyfsError) -> None:
        """Notes why; raises what says nothing about the index."""
        if isinstance(error, HostError) or (isinstance(error, RemoteError) and error.temporary):
            raise error
        self.reasons.append(f"{which}: {error.message}")

    async def _opened(self, blob: bytes, artifact_digest: str = "", *, attached: bool) -> Found:
        index = ImageIndex(blob)
        namespace = await self._namespace(index)
        numbers = _numbers(index, namespace, self._all_layers)
        source = self._resolved.source if attached and not self._offline else None
        heads = await Heads(self._cache, index, source).get(numbers)
        layers = {}
        for number, (head, kept) in heads.items():
            if head.windows and not attached and not kept.is_whole:
                raise ImageError("windows of it were evicted")
            layers[number] = FoundLayer(head, kept, index.parts[number].index_digest if attached else "")
        return Found(index, namespace, layers, artifact_digest)

    async def _opened_v1(self, blob: bytes, windows_digest: str, artifact_digest: str = "") -> Found:
        index = v1.IndexV1(blob)
        namespace = await self._namespace(index)
        kept = images.v1_windows(self._cache, self._digest)
        layers = {}
        for number in _numbers(index, namespace, self._all_layers):
            head = index.layer(number)
            if head.windows and not is_digest(windows_digest):
                raise ImageError("the index lacks the windows its spans need")
            layers[number] = FoundLayer(head, kept, windows_digest)
        return Found(index, namespace, layers, artifact_digest)

    async def _namespace(self, index: ImageIndex | v1.IndexV1) -> Metadata:
        """The namespace, which is a file in the cache from now on. ImageError unless the index is of this very image:
        manifest, layers and sizes agree."""
        ours = [(layer.digest, layer.size_bytes) for layer in self._resolved.manifest.layers]
        if index.manifest_digest != self._digest or ours != [
            (layer.blob_digest, layer.blob_bytes) for layer in index.layers
        ]:
            raise ImageError("the index belongs to another image")

        def read() -> Metadata:
            path = images.namespace_path(self._cache, self._digest)
            namespace = read_file(path)
            if namespace is not None and hashlib.sha256(namespace).hexdigest() == index.namespace_sha256:
                return Metadata(namespace)
            namespace = index.namespace()
            reader = Metadata(namespace)
            images.make_index_directory(self._cache, self._digest)
            self._cache.write_atomically(path, namespace)
            return reader

        return await trio.to_thread.run_sync(read)


def _numbers(index: ImageIndex | v1.IndexV1, namespace: Metadata, all_layers: bool) -> list[int]:
    """Of each layer that is a device of the namespace its first number; or those of all."""
    first: dict[ContentRoot, int] = {}
    for number, layer in enumerate(index.layers):
        first.setdefault(layer.content_root, number)
    try:
        used = [first[ContentRoot(device.tag.decode("ascii", "replace"))] for device in namespace.devices]
    except KeyError:
        raise ImageError("the namespace in the index names a layer the image does not have") from None
    return list(range(len(index.layers))) if all_layers else used


async def _image_index(source: Source, digest: str) -> bytes:
    """The image's index of an artifact. Further layers than the first are the indexes of layers, and what later
    versions add. Raises ImageError, RemoteError, NotFound."""
    raw, media_type = await source.manifest(digest)
    artifact = parse_manifest(raw, media_type)
    if (
        not isinstance(artifact, Manifest)
        or not artifact.layers
        or artifact.layers[0].media_type != imageindex.IMAGE_MEDIA_TYPE
    ):
        raise ImageError("it is no index of a version that lazyfs knows")
    first = artifact.layers[0]
    if first.size_bytes > imageindex.MAX_IMAGE_INDEX_BYTES:
        raise ImageError(f"it is larger than {imageindex.MAX_IMAGE_INDEX_BYTES >> 20} MiB")
    return await source.blob(first.digest, first.size_bytes)


async def _v1_index(source: Source, digest: str) -> tuple[bytes, str]:
    """The index blob of an artifact of version 1, and the digest of its windows blob. As _image_index."""
    raw, media_type = await source.manifest(digest)
    artifact = parse_manifest(raw, media_type)
    if (
        not isinstance(artifact, Manifest)
        or not artifact.layers
        or artifact.layers[0].media_type != v1.INDEX_MEDIA_TYPE
    ):
        raise ImageError("it is no index of a version that lazyfs knows")
    tables = artifact.layers[0]
    if tables.size_bytes > v1.MAX_INDEX_BYTES:
        raise ImageError(f"it is larger than {v1.MAX_INDEX_BYTES >> 20} MiB")
    windows = [one.digest for one in artifact.layers[1:] if one.media_type == v1.WINDOWS_MEDIA_TYPE]
    return await source.blob(tables.digest, tables.size_bytes), windows[0] if windows else ""


async def _referrers(source: Source, manifest_digest: str, artifact_type: str) -> list[Descriptor]:
    """What is attached; nothing if the registry does not say (some forbid the question)."""
    try:
        return await source.referrers(manifest_digest, artifact_type)
    except RemoteError as error:
        if error.temporary:
            raise
    except (ImageError, NotFound):
        pass
    return []
