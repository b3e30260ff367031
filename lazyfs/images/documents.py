"""An image's index, from the cache, the registry or an index repository, verified."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import trio

from lazyfs.cache import images
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.images import read_file
from lazyfs.cache.scans import KeptLayerIndex
from lazyfs.core.erofs.metadata import Metadata
from lazyfs.core.index import imageindex, v1
from lazyfs.core.index.imageindex import ImageIndex
from lazyfs.core.index.layerindex import LayerHead
from lazyfs.core.oci.digests import ContentRoot, Digest, is_digest
from lazyfs.core.oci.documents import (
    Descriptor,
    Manifest,
    parse_manifest,
)
from lazyfs.core.oci.reference import parse_reference
from lazyfs.core.oci.referrers import listed_blob
from lazyfs.errors import HostError, ImageError, LazyfsError, RemoteError
from lazyfs.images.attached import Attached, of_type
from lazyfs.images.elsewhere import IndexRepository, delivery_for
from lazyfs.images.heads import Heads, check_fits
from lazyfs.images.resolve import Resolved, close_source
from lazyfs.sources.source import Source
from lazyfs.tasks import beside

_MAX_ARTIFACTS = 8  # of an index repository that are looked at; the same image indexed twice gives the same one


@dataclass(frozen=True, slots=True)
class FoundLayer:
    """What an index has of one layer: tables, and where its windows are."""

    head: LayerHead | v1.LayerV1
    kept: KeptLayerIndex | images.WindowGroups
    windows_digest: Digest | None  # of the blob at `Found.source` that `head.windows` are ranges of; None: not there


@dataclass(frozen=True, slots=True)
class Found:
    """An index of this very image.

    `layers`: by number, those that a file's data lies in. `source`: who has the rest of it, to be closed by the holder;
    it is the image's own unless `place` names an index repository. `place` is None if the index was made here, "" if it
    is attached to the image. `artifact_digest`: of the artifact, empty if the index came from the cache.
    """

    index: ImageIndex | v1.IndexV1
    namespace: Metadata
    layers: Mapping[int, FoundLayer]
    source: Source
    place: str | None
    artifact_digest: str = ""


class Missing(NamedTuple):
    """The image has no index, neither here, nor in its registry, nor in an index repository. `reasons`: a sentence for
    each index, or index repository, that was passed over. `damaged`: one was found, but is of no use."""

    manifest_digest: Digest
    reasons: tuple[str, ...] = ()
    damaged: bool = False


async def find_index(
    cache: CacheDirectory,
    resolved: Resolved,
    *,
    offline: bool = False,
    all_layers: bool = False,
    attached: Attached | None = None,
) -> Found | Missing:
    """The image's index: from the cache, or attached in the registry, or in the first index repository that has one;
    and then kept in the cache.

    One that is damaged, of another version or of another image is passed over, and the next one tried; so are index
    repositories that fail. `all_layers`: with those in which no file's data lies. `attached`: what is attached to this
    image, if others look for it, too; its owner closes it when what was found is used no more. Raises RemoteError if
    the registry cannot say what is attached just now, or not deliver it; HostError: disk.
    """
    search = _IndexSearch(cache, resolved, offline, all_layers)
    found = await search.in_cache()
    if found is None and not offline:
        found = await (search.attached() if attached is None else search.search(attached))
    if found is None:
        return Missing(resolved.manifest_digest, tuple(search.reasons), search.damaged)
    return found


class _IndexSearch:
    """One search. `reasons`: why what was found is of no use."""

    def __init__(self, cache: CacheDirectory, resolved: Resolved, offline: bool, all_layers: bool) -> None:
        self.reasons: list[str] = []
        self.damaged = False
        self._cache = cache
        self._resolved = resolved
        self._digest = resolved.manifest_digest
        self._offline = offline
        self._all_layers = all_layers

    async def in_cache(self) -> Found | None:
        for kept in images.kept_indexes(self._cache, self._digest):
            if kept.place:
                if (found := await self._kept_of(kept.place, kept.blob)) is not None:
                    return found
                continue
            try:
                return await self._opened(ImageIndex(kept.blob), self._resolved.source, kept.place)
            except LazyfsError as error:
                self._pass_over("the one in the cache", error)
        known = images.kept_v1_index(self._cache, self._digest)
        if known is not None:
            try:
                return await self._opened_v1(*known)
            except ImageError as error:
                self._pass_over("the one in the cache", error)
        return None

    async def _kept_of(self, place: str, blob: bytes) -> Found | None:
        """The index in the cache that an index repository has; what was evicted of it is fetched from there in time, or
        it is passed over."""
        which = f"the one in the cache, of {place}"
        source: Source | None = None
        found: Found | None = None
        delivery = delivery_for(self._resolved)
        try:
            with delivery.scope:
                index = ImageIndex(blob)
                delivery.expect(sum(part.head_bytes for part in index.parts))
                source = self._resolved.open_beside(parse_reference(place))
                found = await self._opened(index, source, place)
                return found
            self.reasons.append(f"{which}: what it lacks comes too slowly")
        except LazyfsError as error:
            self.damaged = self.damaged or isinstance(error, ImageError)
            self.reasons.append(f"{which}: {error.message}")
        finally:
            if found is None and source is not None:
                await close_source(source)
        return None

    async def attached(self) -> Found | None:
        """As search(); nothing stays open but what was found."""
        attached = Attached(self._cache, self._resolved)
        found: Found | None = None
        try:
            found = await self.search(attached)
            return found
        finally:
            await attached.aclose(found.source if found is not None else None)

    async def search(self, attached: Attached) -> Found | None:
        """The first of the newer version that is whole and of this image, in the image's own repository or else an
        index repository, all of which are asked at once; else one of the older version."""
        search = functools.partial(self._search, attached)
        if not attached.repositories:
            return await search()
        return await beside(search, background=attached.ask_repositories)

    async def _search(self, attached: Attached) -> Found | None:
        found = await self._in_own_repository(attached)
        for one in attached.repositories:
            found = found or await self._in_index_repository(one)
        return found or await self._of_version_1(attached)

    async def _in_own_repository(self, attached: Attached) -> Found | None:
        for artifact in of_type(await attached.own(), imageindex.ARTIFACT_TYPE):
            try:
                return await self._taken(self._resolved.source, "", artifact)
            except LazyfsError as error:
                self._pass_over(f"attached {artifact.digest[:19]}", error)
        return None

    async def _in_index_repository(self, repository: IndexRepository) -> Found | None:
        artifacts = of_type(await repository.answer(), imageindex.ARTIFACT_TYPE)
        which = f"index repository {repository.place}"
        if repository.problem:
            self.reasons.append(f"{which}: {repository.problem}")
        if repository.source is None:
            return None
        delivery = repository.delivery()
        with delivery.scope:
            for artifact in artifacts[:_MAX_ARTIFACTS]:
                try:
                    return await self._taken(repository.source, repository.place, artifact, delivery.expect)
                except LazyfsError as error:
                    self.damaged = self.damaged or isinstance(error, ImageError)
                    self.reasons.append(f"{which}: {artifact.digest[:19]}: {error.message}")
        if delivery.scope.cancelled_caught:
            self.reasons.append(f"{which}: what it has comes too slowly")
        return None

    async def _taken(
        self, source: Source, place: str, artifact: Descriptor, expect: Callable[[int], None] = lambda size_bytes: None
    ) -> Found:
        """The index that is attached at `source`, kept in the cache from now on. `expect` is told how many bytes come
        next."""
        first = await _image_index(source, artifact)
        expect(first.size_bytes)
        blob = await source.blob(first.digest, first.size_bytes)
        index = ImageIndex(blob)
        expect(sum(part.head_bytes for part in index.parts))
        found = await self._opened(index, source, place, artifact.digest)
        images.keep_index(self._cache, self._digest, blob, place)
        return found

    async def _of_version_1(self, attached: Attached) -> Found | None:
        source = self._resolved.source
        for artifact in of_type(await attached.own(), v1.ARTIFACT_TYPE):
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
        self.damaged = True
        self.reasons.append(f"{which}: {error.message}")

    async def _opened(self, index: ImageIndex, source: Source, place: str | None, artifact_digest: str = "") -> Found:
        """`source`: who has it if `place` is not None."""
        namespace = await self._namespace(index)
        numbers = _numbers(index, namespace, self._all_layers)
        remote = None if place is None or self._offline else source
        heads = await Heads(self._cache, index, remote).get(numbers)
        if place and artifact_digest:  # so it is passed over if it is of no use; later that would fail the mount
            await trio.to_thread.run_sync(check_fits, namespace, [head for head, _ in heads.values()])
        layers = {}
        for number, (head, kept) in heads.items():
            if head.windows and place is None and not kept.is_whole:
                raise ImageError("windows of it were evicted")
            layers[number] = FoundLayer(head, kept, None if place is None else index.parts[number].index_digest)
        return Found(index, namespace, layers, source, place, artifact_digest)

    async def _opened_v1(self, blob: bytes, windows_digest: str, artifact_digest: str = "") -> Found:
        index = v1.IndexV1(blob)
        namespace = await self._namespace(index)
        kept = images.v1_windows(self._cache, self._digest)
        layers = {}
        for number in _numbers(index, namespace, self._all_layers):
            head = index.layer(number)
            if head.windows and not is_digest(windows_digest):
                raise ImageError("the index lacks the windows its spans need")
            layers[number] = FoundLayer(head, kept, Digest(windows_digest) if head.windows else None)
        return Found(index, namespace, layers, self._resolved.source, "", artifact_digest)

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


async def _image_index(source: Source, artifact: Descriptor) -> Descriptor:
    """The blob that is the image's index of an artifact, which its entry in the list names, or else its manifest.
    Further layers than the first are the indexes of layers, and what later versions add. Raises ImageError,
    RemoteError, NotFound."""
    listed = listed_blob(artifact, imageindex.IMAGE_MEDIA_TYPE)
    if listed is not None and listed.size_bytes <= imageindex.MAX_IMAGE_INDEX_BYTES:
        return listed
    blobs = await _blobs(source, artifact.digest, imageindex.IMAGE_MEDIA_TYPE, imageindex.MAX_IMAGE_INDEX_BYTES)
    return blobs[0]


async def _v1_index(source: Source, digest: str) -> tuple[bytes, str]:
    """The index blob of an artifact of version 1, and the digest of its windows blob. As _image_index."""
    tables, *others = await _blobs(source, digest, v1.INDEX_MEDIA_TYPE, v1.MAX_INDEX_BYTES)
    windows = [one.digest for one in others if one.media_type == v1.WINDOWS_MEDIA_TYPE]
    return await source.blob(tables.digest, tables.size_bytes), windows[0] if windows else ""


async def _blobs(source: Source, digest: str, media_type: str, most_bytes: int) -> tuple[Descriptor, ...]:
    """What an artifact consists of, whose first blob must be of this type and size."""
    raw, declared = await source.manifest(digest)
    artifact = parse_manifest(raw, declared)
    if not isinstance(artifact, Manifest) or not artifact.layers or artifact.layers[0].media_type != media_type:
        raise ImageError("it is no index of a version that lazyfs knows")
    if artifact.layers[0].size_bytes > most_bytes:
        raise ImageError(f"it is larger than {most_bytes >> 20} MiB")
    return artifact.layers
