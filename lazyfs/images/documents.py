"""The documents of an image: its config and its index, from the cache or the registry, verified."""

from __future__ import annotations

import contextlib
import hashlib
import os

from lazyfs.cache.directory import BlockCache
from lazyfs.cache.images import index_directory, keep_index, read_file
from lazyfs.core.erofs.reader import ErofsReader
from lazyfs.core.index.blob import ARTIFACT_TYPE, INDEX_MEDIA_TYPE, MAX_INDEX_BYTES, WINDOWS_MEDIA_TYPE, Index
from lazyfs.core.oci.documents import Descriptor, Manifest, parse_config, parse_manifest
from lazyfs.core.oci.reference import is_digest
from lazyfs.errors import ImageError, NotFound, RemoteError
from lazyfs.images.resolve import Resolved
from lazyfs.sources.source import Source

_MAX_CONFIG_BYTES = 8 << 20


class NeedsIndexError(Exception):
    """The image has no index, neither here nor in its registry. Carries the manifest digest."""

    def __init__(self, manifest_digest: str) -> None:
        super().__init__(manifest_digest)
        self.manifest_digest = manifest_digest


async def load_config(cache: BlockCache, resolved: Resolved) -> bytes:
    """The image config's bytes, from the cache or the source; verified against the manifest."""
    path = os.path.join(index_directory(cache, resolved.manifest_digest), "config")
    wanted = resolved.manifest.config
    kept = read_file(path)
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
    blob = read_file(os.path.join(directory, "index"))
    if blob is not None:
        with contextlib.suppress(ImageError):
            windows_digest = (read_file(os.path.join(directory, "windows")) or b"").decode("ascii", "replace")
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
            except (ImageError, NotFound):
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
