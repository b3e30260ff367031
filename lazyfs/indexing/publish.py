"""Attaching an index to its image: an OCI artifact whose `subject` is the image manifest.

Works on any source that takes pushes: the image's own registry or layout directory, or a new layout.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import AsyncIterator

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.images import forget_lacking, keep_index
from lazyfs.core.index.imageindex import ARTIFACT_TYPE, IMAGE_MEDIA_TYPE
from lazyfs.core.index.layerindex import LAYER_MEDIA_TYPE
from lazyfs.core.oci.digests import Digest, sha256_digest
from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.oci.indexrepository import index_repository, place_of
from lazyfs.core.oci.reference import DirectoryReference
from lazyfs.core.oci.referrers import build_artifact
from lazyfs.errors import HostError
from lazyfs.images.resolve import Resolved, close_source
from lazyfs.indexing.assemble import BuiltIndex
from lazyfs.sources.access import Access
from lazyfs.sources.source import Source, open_source
from lazyfs.tasks import together

_PUSHES_AT_ONCE = 8


async def push_index(cache: CacheDirectory, resolved: Resolved, built: BuiltIndex, repository: str = "") -> str:
    """Attaches the index to its image where that comes from, or in an index repository (core/oci/indexrepository.py),
    and notes it in the cache. As attach_index."""
    async with place_to_push(resolved, repository) as (source, place):
        digest = await attach_index(source, resolved, built)
    keep_index(cache, resolved.manifest_digest, built.index, place)
    if place:
        forget_lacking(cache, resolved.manifest_digest, place)
    return digest


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


async def attach_index(source: Source, resolved: Resolved, built: BuiltIndex) -> str:
    """Pushes those blobs that are not there, then the artifact manifest; returns its digest. Safe to repeat: nothing
    doubles."""
    empty = b"{}"  # the config of an artifact (image-spec manifest.md)
    # At once: each push takes several round trips.
    pushes = [functools.partial(source.push_blob, data) for data in (built.index, *built.layers.values(), empty)]
    await together(*pushes, at_most=_PUSHES_AT_ONCE)
    layers = [
        Descriptor(IMAGE_MEDIA_TYPE, sha256_digest(built.index), len(built.index)),
        *(Descriptor(LAYER_MEDIA_TYPE, digest, len(blob)) for digest, blob in built.layers.items()),
    ]
    subject = subject_of(resolved)
    return await source.attach(subject, build_artifact(ARTIFACT_TYPE, layers, subject, {}))


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
