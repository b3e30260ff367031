"""Documents of an image that is mounted, from the cache alone; light to import."""

from __future__ import annotations

import os

from lazyfs.cache.places import image_path
from lazyfs.core.oci.digests import digest_matches, parse_digest
from lazyfs.core.oci.documents import MAX_CONFIG_BYTES, ImageConfig, Manifest, parse_config, parse_manifest
from lazyfs.errors import HostError, ImageError


def cached_config(cache: str, manifest_digest: str) -> ImageConfig:
    """The configuration of an image that is mounted from `cache`, where the daemon has filed it. Verified against the
    manifest, and the manifest against its digest. Raises HostError, ImageError."""
    parse_digest(manifest_digest)
    directory = image_path(cache, manifest_digest)
    manifest_bytes = _read_verified(os.path.join(directory, "manifest"), manifest_digest)
    manifest = parse_manifest(manifest_bytes, "")
    if not isinstance(manifest, Manifest):
        raise ImageError(f"{manifest_digest} is not the manifest of an image")
    return parse_config(_read_verified(os.path.join(directory, "config"), manifest.config.digest))


def _read_verified(path: str, digest: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise HostError(
            f"cannot read {path}: {error.strerror}", "mount again; if it stays so, `lazyfs cache verify`"
        ) from None
    if not digest_matches(content, digest):
        raise ImageError(f"{path} is damaged", "run `lazyfs cache verify`, then mount again")
    return content
