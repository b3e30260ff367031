"""Runtime bundles: a directory with `config.json` and the image mounted as `rootfs`, ready for `runc run`.

    DIR/config.json           the runtime configuration (spec.py)
       /rootfs/               the image's root; as root an overlay, writable
       /upper/ /work/         what the container wrote
       /volumes/N/            one for each volume of the image
       /hosts /resolv.conf    copies of the host's, because the network is the host's
       /hostname              the container's name

Volumes: those in /proc, /sys and /dev are left to the system. Where the image's directory is empty or missing, a
directory of the bundle is mounted, with its owner and mode. A directory with contents stays part of the writable root,
so that nothing is copied; under a read-only root runc copies the contents into a tmpfs.

For an ordinary user the root is read-only, because mounting an overlay needs rights over the whole host, and the
configuration has a user namespace, mapped as `runc spec --rootless` does. With newuidmap(1) and a range in /etc/subuid
the image's other users exist, too.
"""

from __future__ import annotations

import os
import stat

from lazyfs.containers.accounts import resolve_user
from lazyfs.containers.imageroot import ImageRoot
from lazyfs.containers.spec import SpecOptions, all_mounts, build_spec, check_ids
from lazyfs.containers.specmounts import SYSTEM_PLACES, Mount, forbidden_place, image_volumes
from lazyfs.core import lightjson
from lazyfs.errors import HostError, ImageError, UserError
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

_MAX_HOSTS_BYTES = 1 << 20
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
        return write_bundle(directory, mounted.config, options.user, options.spec)
    except BaseException as error:
        roots.detach(rootfs)
        delete_bundle(directory, keep_itself=existed)
        if isinstance(error, OSError):
            raise HostError(f"cannot make the bundle {directory}: {error.strerror}") from None
        raise


def write_bundle(directory: str, config: ImageConfig, user: str | None, spec: SpecOptions) -> Bundle:
    """Writes `config.json` and what it refers to, next to the root mounted at ``directory/rootfs``.

    Resolves users inside that root, and follows the working directory and volumes through its symlinks.
    Raises ImageError, UserError, HostError.
    """
    notes: list[str] = []
    with ImageRoot(os.path.join(directory, "rootfs")) as root:
        account = resolve_user(
            config.user if user is None else user,
            root.read_account_file("/etc/passwd"),
            root.read_account_file("/etc/group"),
        )
        if os.geteuid() != 0:
            from lazyfs.containers.idmaps import rootless_ranges

            uid_ranges, gid_ranges = rootless_ranges()
            spec = spec._replace(uid_ranges=uid_ranges, gid_ranges=gid_ranges)
        if missing := check_ids(account, spec):
            raise HostError(
                f"the container's user has {missing}, which an ordinary user's containers cannot have here",
                "install uidmap and get a range in /etc/subuid and /etc/subgid, or use --user 0, or be root",
            )
        read_only = root.is_read_only()
        if read_only and not spec.read_only:
            spec = spec._replace(read_only=True)
            if os.geteuid() != 0:
                notes.append("the root is read-only: an ordinary user cannot mount a writable one")
        spec = spec._replace(
            cgroup_namespace=os.path.exists("/sys/fs/cgroup/cgroup.controllers"),  # cgroup v2 only
            hosts_files=_hosts_files(directory, spec.hostname),
        )
        spec = spec._replace(volumes=_volumes(directory, config, spec, root, notes))
        if read_only:
            spec = _with_existing_places(spec, root, notes)
        document, more_notes = build_spec(config, account, spec)
        cwd = document["process"]["cwd"]
        if forbidden_place(root.canonical(cwd)):
            raise ImageError(
                f"the working directory {cwd[:80]!r} leads by a symbolic link to /proc, which is refused",
                "choose another with -w",
            )
    _write(os.path.join(directory, BUNDLE_CONFIG), lightjson.dumps(document).encode(), 0o600)
    return Bundle(directory, (*notes, *more_notes), config.stop_signal)


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


def _write(path: str, content: bytes, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(fd, "wb") as file:
        os.fchmod(fd, mode)  # whatever the umask
        file.write(content)


# -- what the configuration refers to --------------------------------------------------------------------


def _hosts_files(directory: str, hostname: str) -> tuple[Mount, ...]:
    """Copies of the host's resolv.conf and hosts (with the container's name): names resolve in the container as on the
    host, and the container writes to its own copies. And the container's name, where the image has perhaps that of the
    machine it was built on."""
    contents = {name: _host_file(name) for name in ("resolv.conf", "hosts")}
    if hostname:
        separator = b"" if not contents["hosts"] or contents["hosts"].endswith(b"\n") else b"\n"
        contents["hosts"] += separator + f"127.0.1.1\t{hostname}\n".encode()
        contents["hostname"] = f"{hostname}\n".encode()
    mounts = []
    for name, content in contents.items():
        path = os.path.join(directory, name)
        _write(path, content, 0o644)
        mounts.append(Mount(f"/etc/{name}", "bind", path, ("rbind", "rprivate")))
    return tuple(mounts)


def _host_file(name: str) -> bytes:
    try:
        with open(f"/etc/{name}", "rb") as file:
            return file.read(_MAX_HOSTS_BYTES)
    except OSError:
        return b""


def _volumes(
    directory: str, config: ImageConfig, spec: SpecOptions, root: ImageRoot, notes: list[str]
) -> tuple[Mount, ...]:
    """A mount for each volume of the image on which the user has not mounted anything."""
    taken = {mount.destination for mount in spec.mounts}
    mounts = []
    for number, place in enumerate(image_volumes(config)):
        if place in taken:
            continue
        if forbidden_place(root.canonical(place), SYSTEM_PLACES):  # also by a symbolic link (CVE-2023-27561)
            notes.append(f"the image's volume {place[:80]!r} lies in a system directory, and is left out")
            continue
        status = root.status(place)
        if status is not None and not stat.S_ISDIR(status.st_mode):
            raise ImageError(f"the image's volume {place[:80]!r} is not a directory")
        mode, uid, gid = (
            (0o755, 0, 0) if status is None else (status.st_mode & 0o7777, status.st_uid, status.st_gid)
        )
        if not root.is_empty(place):
            if spec.read_only:
                mounts.append(_copied_up(place, mode, uid, gid))
            continue
        source = os.path.join(directory, "volumes", str(number))
        os.makedirs(source, 0o700)
        if os.geteuid() == 0:
            os.chown(source, uid, gid)
        os.chmod(source, mode)
        mounts.append(Mount(place, "bind", source, ("rbind", "rprivate")))
    return tuple(mounts)


def _copied_up(place: str, mode: int, uid: int, gid: int) -> Mount:
    """A tmpfs into which runc copies what the image has at `place` (runc's own option `tmpcopyup`)."""
    owner = (f"uid={uid}", f"gid={gid}") if os.geteuid() == 0 else ()
    return Mount(place, "tmpfs", "tmpfs", ("nosuid", "nodev", f"mode={mode:o}", *owner, "tmpcopyup"))


def _with_existing_places(spec: SpecOptions, root: ImageRoot, notes: list[str]) -> SpecOptions:
    """Checks mounts on a read-only root, where runc cannot make mount points. Where the image has no place for the
    copies of host files, they are left out; for any other mount, raises HostError."""
    kept = tuple(mount for mount in spec.hosts_files if _place_fits(mount, root))
    if len(kept) < len(spec.hosts_files):
        missing = " or ".join(mount.destination for mount in spec.hosts_files if mount not in kept)
        notes.append(f"the image has no place for {missing}, and its root is read-only: they stay as they are")
    spec = spec._replace(hosts_files=kept)
    mounted: list[str] = []
    for mount in all_mounts(spec):
        if not forbidden_place(mount.destination, mounted) and not _place_fits(mount, root):
            raise HostError(
                f"the image has no place at {mount.destination} to mount on, and its root is read-only",
                "mount it rw (as root): runc makes the place, and --read-only still protects the root",
            )
        mounted.append(mount.destination)
    return spec


def _place_fits(mount: Mount, root: ImageRoot) -> bool:
    status = root.status(mount.destination)
    if status is None:
        return False
    return stat.S_ISDIR(status.st_mode) == (mount.type != "bind" or os.path.isdir(mount.source))
