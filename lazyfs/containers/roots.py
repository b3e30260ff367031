"""The roots of bundles: mounts an image as `lazyfs mount` does, and reads its configuration from the cache."""

from __future__ import annotations

from lazyfs.cache import places
from lazyfs.containers.bundle import MountedImage
from lazyfs.mounting import mount
from lazyfs.mounting.lease import SILENT, Reporter
from lazyfs.mounting.options import MountOptions
from lazyfs.system.mountinfo import mount_at


def _load() -> None:
    """Loads what is needed once the root is there. A daemon that asks a registry takes about as long."""
    from lazyfs.containers import configuration  # noqa: F401
    from lazyfs.images import cached  # noqa: F401
    from lazyfs.mounting import overlay, unmount  # noqa: F401


class MountedRoots:
    """Implements RootProvider. `reporter` shows the progress of mounts. `own_runtime`: the runtime directory of a
    daemon that is only for them, and sees every read."""

    def __init__(self, reporter: Reporter = SILENT, own_runtime: str | None = None) -> None:
        self._reporter = reporter
        self._own_runtime = own_runtime

    def attach(self, image: str, target: str, options: MountOptions) -> MountedImage:
        mounted = mount.mount(
            image, target, options, reporter=self._reporter, own_runtime=self._own_runtime, meanwhile=_load
        )
        try:
            from lazyfs.images.cached import cached_config

            config = cached_config(places.cache_directory(options.cache), mounted.manifest_digest)
            return MountedImage(config, mounted.manifest_digest, mounted.image)
        except BaseException:
            self.detach(target)
            raise

    def detach(self, target: str) -> None:
        """Unmounts; lazily only if the mount is in use."""
        if mount_at(target) is None:
            return
        from lazyfs.mounting import unmount

        try:
            unmount.umount(target)
        except unmount.Busy:
            try:  # noqa: SIM105 - contextlib takes 2 ms to import
                unmount.umount(target, lazy=True)
            except unmount.Busy:
                pass
