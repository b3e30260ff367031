"""The roots of bundles by lazyfs itself: mounts an image, and gives its configuration from the cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from lazyfs.cache import places
from lazyfs.core.oci.documents import ImageConfig
from lazyfs.images.cached import cached_config
from lazyfs.mounting import mount, unmount
from lazyfs.mounting.options import MountOptions
from lazyfs.system.mountinfo import mount_at

if TYPE_CHECKING:
    from lazyfs.indexing.missing import Bars

"""Manifests and configurations are held to less where they are fetched."""


class MountedRoots:
    """Mounts as `lazyfs mount` does. `on_progress` gets lines of text for the user."""

    def __init__(self, on_progress: Callable[[str], None] | None = None, bars: Bars | None = None) -> None:
        self._on_progress = on_progress
        self._bars = bars

    def attach(self, image: str, target: str, options: MountOptions) -> ImageConfig:
        mounted = mount.mount(image, target, options, on_progress=self._on_progress, bars=self._bars)
        try:
            return cached_config(places.cache_directory(options.cache), mounted.manifest_digest)
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
