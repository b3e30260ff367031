"""An image's config, from the cache or the registry, verified."""

from __future__ import annotations

import hashlib
import os

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.images import index_directory, read_file
from lazyfs.core.oci.documents import CONFIG_TYPES, MAX_CONFIG_BYTES, ImageConfig, Platform, parse_config
from lazyfs.core.oci.platforms import parse_platform, runs_on
from lazyfs.errors import ImageError, UserError
from lazyfs.images.resolve import Resolved


async def load_config(cache: CacheDirectory, resolved: Resolved) -> bytes:
    """The image config's bytes, from the cache or the source; verified against the manifest. ImageError: it is no
    image; UserError: it is one for another platform, which only the config tells."""
    path = os.path.join(index_directory(cache, resolved.manifest_digest), "config")
    wanted = resolved.manifest.config
    kept = read_file(path)
    if kept is not None and "sha256:" + hashlib.sha256(kept).hexdigest() == wanted.digest:
        _check_config(resolved, kept)
        return kept
    if wanted.size_bytes > MAX_CONFIG_BYTES:
        raise ImageError(f"the image config is larger than {MAX_CONFIG_BYTES >> 20} MiB")
    raw = await resolved.source.blob(wanted.digest, wanted.size_bytes)
    _check_config(resolved, raw)
    cache.write_atomically(path, raw)
    return raw


def _check_config(resolved: Resolved, raw: bytes) -> None:
    kind = resolved.manifest.config.media_type
    try:
        config = parse_config(raw)
    except ImageError:
        if kind in CONFIG_TYPES:
            raise
        kind = resolved.manifest.artifact_type or kind
        raise ImageError(f"{resolved.reference} is no container image, but an artifact of type {kind}") from None
    _check_platform(resolved, config)


def check_joined(resolved: Resolved, raw: bytes) -> None:
    """Raises UserError if this reference leads to an image of another platform. `raw`: its config, which was loaded for
    another reference."""
    if not resolved.listed:
        _check_platform(resolved, parse_config(raw))


def _check_platform(resolved: Resolved, config: ImageConfig) -> None:
    have = Platform(config.os, config.architecture, config.variant)
    if not resolved.listed and not runs_on(have, parse_platform(resolved.platform)):
        raise UserError(
            f"{resolved.reference} is an image for {have}, not for {resolved.platform}",
            f"to have it all the same: platform={have}",
        )
