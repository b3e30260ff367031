"""Attaching an index to its image: an OCI artifact whose `subject` is the image manifest.

Works on any source that takes pushes: the image's own registry or layout directory, or a new layout.
"""

from __future__ import annotations

import functools
import os

from lazyfs.core.index.blob import ARTIFACT_TYPE, INDEX_MEDIA_TYPE, WINDOWS_MEDIA_TYPE
from lazyfs.core.oci.digests import Digest, sha256_digest
from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.oci.reference import DirectoryReference
from lazyfs.core.oci.referrers import build_artifact
from lazyfs.errors import HostError
from lazyfs.images.resolve import Resolved
from lazyfs.indexing.build import BuiltIndex
from lazyfs.sources.access import Access
from lazyfs.sources.source import Source, open_source
from lazyfs.tasks import together


async def attach_index(source: Source, resolved: Resolved, built: BuiltIndex) -> str:
    """Pushes both blobs, then the artifact manifest; returns its digest. Safe to repeat: nothing doubles."""
    blobs = [(INDEX_MEDIA_TYPE, built.index)]
    if built.windows:
        blobs.append((WINDOWS_MEDIA_TYPE, built.windows))
    empty = b"{}"  # the config of an artifact (image-spec manifest.md)
    # At once: each push takes several round trips.
    await together(*(functools.partial(source.push_blob, data) for data in (empty, *(data for _, data in blobs))))
    layers = [Descriptor(media_type, sha256_digest(data), len(data)) for media_type, data in blobs]
    subject = Descriptor(resolved.manifest.media_type, Digest(resolved.manifest_digest), len(resolved.manifest_bytes))
    return await source.attach(subject, build_artifact(ARTIFACT_TYPE, layers, subject, {}))


def windows_digest(built: BuiltIndex) -> str:
    """Digest of the windows blob; empty if there is none."""
    return sha256_digest(built.windows) if built.windows else ""


async def write_layout(directory: str, resolved: Resolved, built: BuiltIndex) -> str:
    """Writes the index artifact into an OCI image layout at `directory`, made if it is missing."""
    layout = open_source(DirectoryReference(_make_layout(directory)), Access())
    try:
        return await attach_index(layout, resolved, built)
    finally:
        await layout.aclose()


def _make_layout(directory: str) -> str:
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
