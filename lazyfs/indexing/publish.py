"""Attaching an index to its image: an OCI artifact whose `subject` is the image manifest.

Works on any source that takes pushes: the image's own registry or layout directory, or a new layout.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import AsyncIterator, Mapping

import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.images import forget_lacking, keep_index
from lazyfs.core.index.imageindex import ARTIFACT_TYPE, IMAGE_MEDIA_TYPE
from lazyfs.core.index.layerindex import LAYER_MEDIA_TYPE
from lazyfs.core.oci.digests import Digest, sha256_digest
from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.oci.indexrepository import index_repository, place_of
from lazyfs.core.oci.reference import DirectoryReference
from lazyfs.core.oci.referrers import build_artifact, first_blob
from lazyfs.errors import HostError, LazyfsError
from lazyfs.images.resolve import Resolved, close_source
from lazyfs.indexing.assemble import BuiltIndex
from lazyfs.sources.access import Access
from lazyfs.sources.source import Source, open_source
from lazyfs.tasks import open_nursery, together

_PUSHES_AT_ONCE = 8
_CONFIG = b"{}"  # of an artifact (image-spec manifest.md)


@contextlib.asynccontextmanager
async def place_to_push(resolved: Resolved, repository: str = "") -> AsyncIterator[tuple[Source, str]]:
    """The image's own repository, or an index repository, whose directory is made if need be: source and place."""
    if not repository:
        yield resolved.source, ""
        return
    reference = index_repository(repository, resolved.reference)
    if isinstance(reference, DirectoryReference):
        make_layout(reference.path)
    source = resolved.open_beside(reference)
    try:
        yield source, place_of(reference)
    finally:
        await close_source(source)


class IndexPush:
    """Attaches one index to its image. The indexes of layers are there before the image's is: they can be on their way
    while that is made."""

    def __init__(
        self, cache: CacheDirectory, resolved: Resolved, source: Source, place: str, nursery: trio.Nursery
    ) -> None:
        self._cache = cache
        self._resolved = resolved
        self._source = source
        self._place = place
        self._nursery = nursery
        self._pushing = trio.Lock()
        self._pushed: set[Digest] = set()

    def begin(self, layers: Mapping[Digest, bytes]) -> None:
        """Begins to push indexes of layers. What cannot be pushed, `finish` pushes again, and says why that fails."""
        self._nursery.start_soon(self._begin, layers)

    async def _begin(self, layers: Mapping[Digest, bytes]) -> None:
        with contextlib.suppress(LazyfsError):
            await self._push(layers)

    async def finish(self, built: BuiltIndex) -> Digest:
        """As attach_index; waits for what was begun, and notes the index in the cache."""
        await together(
            functools.partial(self._source.push_blob, built.index), functools.partial(self._push, built.layers)
        )
        digest = await _attach(self._source, self._resolved, built)
        keep_index(self._cache, self._resolved.manifest_digest, built.index, self._place)
        if self._place:
            forget_lacking(self._cache, self._resolved.manifest_digest, self._place)
        return digest

    async def _push(self, layers: Mapping[Digest, bytes]) -> None:
        async with self._pushing:
            missing = {digest: blob for digest, blob in layers.items() if digest not in self._pushed}
            if missing:
                await _push_layers(self._source, missing)
                self._pushed.update(missing)


@contextlib.asynccontextmanager
async def index_push(
    cache: CacheDirectory, resolved: Resolved, repository: str = ""
) -> AsyncIterator[IndexPush]:
    """To attach an index where its image comes from, or in an index repository (core/oci/indexrepository.py)."""
    async with place_to_push(resolved, repository) as (source, place), open_nursery() as nursery:
        yield IndexPush(cache, resolved, source, place, nursery)


async def push_index(cache: CacheDirectory, resolved: Resolved, built: BuiltIndex, repository: str = "") -> Digest:
    """Attaches an index by an IndexPush."""
    async with index_push(cache, resolved, repository) as push:
        return await push.finish(built)


async def attach_index(source: Source, resolved: Resolved, built: BuiltIndex) -> Digest:
    """Pushes those blobs that are not there, then the artifact manifest; returns its digest. Safe to repeat: nothing
    doubles."""
    await together(
        functools.partial(source.push_blob, built.index), functools.partial(_push_layers, source, built.layers)
    )
    return await _attach(source, resolved, built)


async def _push_layers(source: Source, layers: Mapping[Digest, bytes]) -> None:
    """With the config of an artifact, at once: each push takes several round trips."""
    pushes = [functools.partial(source.push_blob, blob) for blob in (*layers.values(), _CONFIG)]
    await together(*pushes, at_most=_PUSHES_AT_ONCE)


async def _attach(source: Source, resolved: Resolved, built: BuiltIndex) -> Digest:
    layers = [
        Descriptor(IMAGE_MEDIA_TYPE, sha256_digest(built.index), len(built.index)),
        *(Descriptor(LAYER_MEDIA_TYPE, digest, len(blob)) for digest, blob in built.layers.items()),
    ]
    subject = subject_of(resolved)
    return await source.attach(subject, build_artifact(ARTIFACT_TYPE, layers, subject, first_blob(layers)))


def subject_of(resolved: Resolved) -> Descriptor:
    """The image manifest, as what is attached refers to it."""
    return Descriptor(resolved.manifest.media_type, Digest(resolved.manifest_digest), len(resolved.manifest_bytes))


async def write_layout(directory: str, resolved: Resolved, built: BuiltIndex) -> str:
    """Writes the index artifact into an OCI image layout at `directory`, made if it is missing."""
    layout = open_source(DirectoryReference(make_layout(directory)), Access())
    try:
        return await attach_index(layout, resolved, built)
    finally:
        await layout.aclose()


def make_layout(directory: str) -> str:
    """An empty layout, unless there is one already; returns its absolute path."""
    try:
        os.makedirs(os.path.join(directory, "blobs", "sha256"), exist_ok=True)
        for name, content in (
            ("oci-layout", b'{"imageLayoutVersion": "1.0.0"}'),
            ("index.json", b'{"schemaVersion": 2, "manifests": []}'),
        ):
            path = os.path.join(directory, name)
            if not os.path.exists(path):
                with open(path, "wb") as file:
                    file.write(content)
    except OSError as error:
        raise HostError(
            f"cannot write to {directory}: {error.strerror}", "choose another directory"
        ) from None
    return os.path.abspath(directory)
