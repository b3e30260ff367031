"""`config.json` of a bundle, and the files of this host that it refers to.

Volumes: those in /proc, /sys and /dev are left to the system. Where the image's directory is empty or missing, a
directory of the bundle is mounted, with its owner and mode. A directory with contents stays part of the writable root,
so that nothing is copied; under a read-only root runc copies the contents into a tmpfs.
"""

from __future__ import annotations

import os
import stat

from lazyfs.containers.accounts import resolve_user
from lazyfs.containers.imageroot import ImageRoot
from lazyfs.containers.spec import SpecOptions, all_mounts, build_spec, check_ids
from lazyfs.containers.specmounts import SYSTEM_PLACES, Mount, forbidden_place, image_volumes
from lazyfs.core import lightjson
from lazyfs.errors import HostError, ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lazyfs.core.oci.documents import ImageConfig

_MAX_HOSTS_BYTES = 1 << 20


def write_configuration(
    path: str, rootfs: str, config: ImageConfig, user: str | None, spec: SpecOptions
) -> tuple[str, ...]:
    """Writes the configuration `path` and, beside it, what it refers to. Returns notes for the user: what was left out,
    and why.

    Resolves users inside the root that is mounted at `rootfs`, and follows the working directory and volumes through
    its symlinks. Raises ImageError, UserError, HostError, OSError.
    """
    directory = os.path.dirname(path)
    notes: list[str] = []
    with ImageRoot(rootfs) as root:
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
    _write(path, lightjson.dumps(document).encode(), 0o600)
    return (*notes, *more_notes)


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
