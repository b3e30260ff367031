"""The documents of an image: its config and its index, from the cache or the registry, verified."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import NamedTuple

from lazyfs.cache.directory import BlockCache
from lazyfs.cache.images import index_directory, keep_index, read_file
from lazyfs.core.erofs.reader import ErofsReader
from lazyfs.core.index.blob import ARTIFACT_TYPE, INDEX_MEDIA_TYPE, MAX_INDEX_BYTES, WINDOWS_MEDIA_TYPE, Index
from lazyfs.core.oci.documents import MAX_CONFIG_BYTES, Descriptor, Manifest, parse_config, parse_manifest
from lazyfs.core.oci.reference import is_digest
from lazyfs.errors import HostError, ImageError, LazyfsError, NotFound, RemoteError
from lazyfs.images.resolve import Resolved
from lazyfs.sources.source import Source


@dataclass(frozen=True, slots=True)
class Found:
    """An index of this very image. `windows_digest`: of its windows blob, empty if there is none; `artifact_digest`:
    of the artifact it was attached as, empty if it came from the cache.
    """

    index: Index
    windows_digest: str
    artifact_digest: str = ""


class Missing(NamedTuple):
    """The image has no index, neither here nor in its registry. `reasons`: a sentence for each that was passed over."""

    manifest_digest: str
    reasons: tuple[str, ...] = ()


async def load_config(cache: BlockCache, resolved: Resolved) -> bytes:
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


async def find_index(cache: BlockCache, resolved: Resolved, *, offline: bool = False) -> Found | Missing:
    """The image's index, from the cache or attached in the registry, and then kept in the cache.

    One that is damaged, of another version or of another image is passed over, and the next one tried. Raises
    RemoteError if the registry cannot say what is attached just now, or not deliver it; HostError: disk.
    """
    reasons: list[str] = []
    directory = index_directory(cache, resolved.manifest_digest)
    blob = read_file(os.path.join(directory, "index"))
    if blob is not None:
        windows_digest = (read_file(os.path.join(directory, "windows")) or b"").decode("ascii", "replace")
        try:
            return Found(checked_index(blob, resolved, windows_digest), windows_digest)
        except ImageError as error:
            reasons.append(f"the one in the cache: {error.message}")
    if offline:
        return Missing(resolved.manifest_digest, tuple(reasons))
    for attached in await _referrers(resolved.source, resolved.manifest_digest):
        try:
            blob, windows_digest = await _artifact(resolved.source, attached.digest)
            index = checked_index(blob, resolved, windows_digest)
        except LazyfsError as error:
            if isinstance(error, HostError) or (isinstance(error, RemoteError) and error.temporary):
                raise
            reasons.append(f"attached {attached.digest[:19]}: {error.message}")
        else:
            keep_index(cache, resolved.manifest_digest, blob, windows_digest)
            return Found(index, windows_digest, attached.digest)
    return Missing(resolved.manifest_digest, tuple(reasons))


async def _artifact(source: Source, digest: str) -> tuple[bytes, str]:
    """The index blob of an artifact, and the digest of its windows blob. Raises NotFound, ImageError, RemoteError."""
    raw, media_type = await source.manifest(digest)
    artifact = parse_manifest(raw, media_type)
    if not isinstance(artifact, Manifest) or not artifact.layers or artifact.layers[0].media_type != INDEX_MEDIA_TYPE:
        raise ImageError("it is no index of a version that lazyfs knows")
    tables = artifact.layers[0]
    if tables.size_bytes > MAX_INDEX_BYTES:
        raise ImageError(f"it is larger than {MAX_INDEX_BYTES >> 20} MiB")
    windows = [one.digest for one in artifact.layers[1:] if one.media_type == WINDOWS_MEDIA_TYPE]
    return await source.blob(tables.digest, tables.size_bytes), windows[0] if windows else ""


async def _referrers(source: Source, manifest_digest: str) -> list[Descriptor]:
    """What is attached; nothing if the registry does not say (some forbid the question)."""
    try:
        return await source.referrers(manifest_digest, ARTIFACT_TYPE)
    except RemoteError as error:
        if error.temporary:
            raise
    except (ImageError, NotFound):
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
    ErofsReader(index.namespace())  # of a version we know?
    return index
