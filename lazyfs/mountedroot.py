"""The roots of bundles by lazyfs itself: mounts an image, and gives its configuration from the cache."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from lazyfs import mounts, paths, unmount
from lazyfs.core.oci import ImageConfig, Manifest, digest_matches, parse_config, parse_digest, parse_manifest
from lazyfs.errors import HostError, ImageError
from lazyfs.mountinfo import mount_at
from lazyfs.options import MountOptions

_MAX_DOCUMENT_BYTES = 8 << 20
"""Manifests and configurations are held to less where they are fetched."""


class MountedRoots:
    """Mounts as `lazyfs mount` does. `on_progress` gets lines of text for the user."""

    def __init__(self, on_progress: Callable[[str], None] | None = None) -> None:
        self._on_progress = on_progress

    def attach(self, image: str, target: str, options: MountOptions) -> ImageConfig:
        mounted = mounts.mount(image, target, options, on_progress=self._on_progress)
        try:
            return cached_config(paths.cache_directory(options.cache), mounted.manifest_digest)
        except BaseException:
            self.detach(target)
            raise

    def detach(self, target: str) -> None:
        """Plainly, so that what uses the mount is noticed; lazily if it is in use."""
        if mount_at(target) is None:
            return
        try:
            unmount.umount(target)
        except unmount.Busy:
            with contextlib.suppress(unmount.Busy):
                unmount.umount(target, lazy=True)


def cached_config(cache: str, manifest_digest: str) -> ImageConfig:
    """The configuration of an image that is mounted from `cache`; the daemon filed it there. Verified against
    the manifest, and that against its digest. Raises HostError, ImageError."""
    _, name = parse_digest(manifest_digest)
    directory = os.path.join(cache, "indexes", name)
    manifest_bytes = _read_verified(os.path.join(directory, "manifest"), manifest_digest)
    manifest = parse_manifest(manifest_bytes, "")
    if not isinstance(manifest, Manifest):
        raise ImageError(f"{manifest_digest} is not the manifest of an image")
    return parse_config(_read_verified(os.path.join(directory, "config"), manifest.config.digest))


def _read_verified(path: str, digest: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise HostError(
            f"cannot read {path}: {error.strerror}", "mount again; if it stays so, `lazyfs cache verify`"
        ) from None
    if not digest_matches(content, digest):
        raise ImageError(f"{path} is damaged", "run `lazyfs cache verify`, then mount again")
    return content
