"""Runtime bundles: a directory with `config.json` and the image mounted as `rootfs`, ready for `runc run`.

    DIR/config.json           the runtime configuration (configuration.py)
       /rootfs/               the image's root; as root an overlay, writable
       /upper/ /work/         what the container wrote
       /volumes/N/            one for each volume of the image
       /hosts /resolv.conf    copies of the host's, because the network is the host's
       /hostname              the container's name

For an ordinary user the root is read-only, because mounting an overlay needs rights over the whole host, and the
configuration has a user namespace, mapped as `runc spec --rootless` does. With newuidmap(1) and a range in /etc/subuid
the image's other users exist, too.
"""

from __future__ import annotations

import os

from lazyfs.containers.spec import SpecOptions
from lazyfs.errors import HostError, UserError
from lazyfs.mounting.options import MountOptions
from lazyfs.records import NamedTuple
from lazyfs.system.mountinfo import mounts as mount_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from lazyfs.core.oci.documents import ImageConfig
else:
    Protocol = object  # typing takes 10 ms to import

BUNDLE_CONFIG = "config.json"
_OWN_FILES = (BUNDLE_CONFIG, "hosts", "hostname", "resolv.conf", "runc.log")
_REMOVAL_S = 120.0
"""How long deleting a bundle's files may take: ext4 deletes 50,000 files/s."""


class MountedImage(NamedTuple):
    """The image whose root was mounted."""

    config: ImageConfig
    manifest_digest: str
    reference: str  # canonical


class RootProvider(Protocol):
    """Mounts an image's root: roots.py; a plain directory in tests of bundles."""

    def attach(self, image: str, target: str, options: MountOptions) -> MountedImage:
        """Mounts `image` at the existing directory `target`. Raises LazyfsError; then nothing is mounted."""

    def detach(self, target: str) -> None:
        """Unmounts what `attach` mounted, within seconds, if need be lazily. It is no error if nothing is mounted,
        because a signal may come before or after the mount. Raises HostError."""


class BundleOptions(NamedTuple):
    """`spec`: what the user asks of the container. `user`: ``USER[:GROUP]`` instead of the image's, if not None.
    `mount`: options of the root's mount. If it is writable and has no `upperdir`, the upper directory is in the bundle,
    or, without `keep_upper`, it ends with the mount."""

    spec: SpecOptions = SpecOptions()
    user: str | None = None
    mount: MountOptions = MountOptions()
    keep_upper: bool = True


class Bundle(NamedTuple):
    """A bundle on disk. `notes` are for the user: what was left out, and why. `stop_signal` is as the image has it (a
    name, a number or ""), not checked."""

    directory: str
    notes: tuple[str, ...]
    stop_signal: str

    @property
    def rootfs(self) -> str:
        return os.path.join(self.directory, "rootfs")


def make_bundle(
    image: str,
    directory: str,
    options: BundleOptions,
    roots: RootProvider,
    on_mounted: Callable[[MountedImage], object] = lambda image: None,
) -> Bundle:
    """Makes a bundle of `image` in `directory`, which must not exist or be empty; its mode becomes 0700.
    `on_mounted` is called with the image before the configuration is written.

    The root stays mounted: `roots.detach` and `delete_bundle` end it. On any failure nothing is
    left mounted or written. Raises UserError for `directory`, and what mounting and conversion raise.
    """
    directory = os.path.realpath(directory)
    existed = _prepare_directory(directory)
    rootfs = os.path.join(directory, "rootfs")
    mount = options.mount
    try:
        os.mkdir(rootfs, 0o755)
        if mount.writable and not mount.upperdir and options.keep_upper:
            upper, work = os.path.join(directory, "upper"), os.path.join(directory, "work")
            os.mkdir(upper, 0o700)
            os.mkdir(work, 0o700)
            mount = mount._replace(upperdir=upper, workdir=work)
        mounted = roots.attach(image, rootfs, mount)
        on_mounted(mounted)
        from lazyfs.containers.configuration import write_configuration  # roots.py loads it while it waits

        config = os.path.join(directory, BUNDLE_CONFIG)
        notes = write_configuration(config, rootfs, mounted.config, options.user, options.spec)
        return Bundle(directory, notes, mounted.config.stop_signal)
    except BaseException as error:
        roots.detach(rootfs)
        delete_bundle(directory, keep_itself=existed)
        if isinstance(error, OSError):
            raise HostError(f"cannot make the bundle {directory}: {error.strerror}") from None
        raise


def _prepare_directory(directory: str) -> bool:
    """Whether it was there (and empty)."""
    try:
        os.mkdir(directory, 0o700)
        return False
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(f"cannot make the directory {directory}: {error.strerror}") from None
    try:
        if os.listdir(directory):
            raise UserError(f"the directory {directory} is not empty", "choose another, or empty it")
        # others must not reach the image's set-id files (CVE-2021-41103)
        os.chmod(directory, 0o700)
    except OSError as error:
        raise UserError(f"cannot use {directory} for a bundle: {error.strerror}") from None
    return True


def delete_bundle(directory: str, keep_itself: bool = False) -> None:
    """Deletes the bundle with all that the container wrote, never what is mounted below it. rm(1) deletes what the
    container wrote, because no symlink misleads it, and directories may be nested deeper than Python's recursion."""
    if below := [mount.mountpoint for mount in mount_table() if mount.mountpoint.startswith(f"{directory}/")]:
        raise HostError(f"{directory} is kept: {below[0]} is still mounted", f"umount {below[0]}")
    _unlink_own(directory)
    if not keep_itself:
        try:
            os.rmdir(directory)
            return
        except OSError:
            pass  # not empty, or gone
    victims = [os.path.join(directory, n) for n in os.listdir(directory)] if keep_itself else [directory]
    if not victims:
        return
    import subprocess  # here, because it takes milliseconds, and most bundles are gone by now

    command = ["rm", "-rf", "--one-file-system", "--", *victims]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_REMOVAL_S)
    except subprocess.TimeoutExpired:
        raise HostError(
            f"deleting {directory} took longer than {_REMOVAL_S:.0f} s", "delete it by hand"
        ) from None
    if done.returncode != 0:
        reason = done.stderr.decode("utf-8", "replace").strip().splitlines()[:1]
        raise HostError(f"cannot delete {directory}: {' '.join(reason)}", "delete it by hand")


def _unlink_own(directory: str) -> None:
    """Deletes the files that every bundle has, as far as possible. Most bundles have no others."""
    for name in _OWN_FILES:
        try:  # noqa: SIM105 - contextlib takes 2 ms to import
            os.unlink(os.path.join(directory, name))
        except OSError:
            pass  # there is none
    try:  # noqa: SIM105
        os.rmdir(os.path.join(directory, "rootfs"))
    except OSError:
        pass  # rm(1) says why
