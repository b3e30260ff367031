"""The `mounts` of a runtime configuration: defaults, the image's volumes, and what -v and --tmpfs ask for.

Pure. Form: OCI runtime-spec config.md, "Mounts"; the defaults are those of `runc spec`.
"""

from __future__ import annotations

import posixpath

from lazyfs.errors import ImageError, UserError
from lazyfs.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lazyfs.core.oci.documents import ImageConfig

MAX_VOLUMES = 128

_PROPAGATION = frozenset({"private", "rprivate", "slave", "rslave", "shared", "rshared"})
_TMPFS_FLAGS = frozenset(
    {"ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "relatime"}
)
_BIND_OPTIONS = _PROPAGATION | _TMPFS_FLAGS | {"rro"}
_TMPFS_SETTINGS = frozenset({"size", "mode", "uid", "gid", "nr_inodes"})


class Mount(NamedTuple):
    """One entry of the runtime configuration's `mounts`. `source` is a host path for type "bind"."""

    destination: str
    type: str
    source: str
    options: tuple[str, ...] = ()


class IdRange(NamedTuple):
    """`size` ids from `container_id` on are the host's from `host_id` on (user_namespaces(7))."""

    container_id: int
    host_id: int
    size: int


# -- names from outside --------------------------------------------------------------------------------


def checked_text(value: str, what: str, error: type[ImageError] | type[UserError] = ImageError) -> str:
    """`value` if it can be an argument, a variable or a path: without NUL, and valid UTF-8 (JSON allows lone
    surrogates)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise error(f"{what} is not valid UTF-8: {value[:80]!a}") from None
    if "\0" in value:
        raise error(f"{what} has a NUL byte: {value[:80]!r}")
    return value


def forbidden_place(path: str, places: Sequence[str] = ("/proc",)) -> bool:
    """Whether the absolute `path`, its "." and ".." taken away, is one of `places` or below it."""
    clean = normal_path(path)
    return any(clean == place or clean.startswith(f"{place}/") for place in places)


def normal_path(path: str) -> str:
    """`path` from the root, without ".", ".." and doubled slashes; symlinks are not looked at."""
    return posixpath.normpath("/" + path.lstrip("/"))


# -- the list -----------------------------------------------------------------------------------------


def _default_mounts(gid_ranges: Sequence[IdRange]) -> list[Mount]:
    rootless = bool(gid_ranges)
    tty_group_known = not rootless or any(r.container_id <= 5 < r.container_id + r.size for r in gid_ranges)
    terminals = ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620")
    hidden = ("nosuid", "noexec", "nodev")
    # A new sysfs needs rights over the network namespace, which is the host's: see `runc spec --rootless`.
    sysfs = (
        Mount("/sys", "none", "/sys", ("rbind", *hidden, "ro"))
        if rootless
        else Mount("/sys", "sysfs", "sysfs", (*hidden, "ro"))
    )
    return [
        Mount("/proc", "proc", "proc", hidden),
        Mount("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
        Mount("/dev/pts", "devpts", "devpts", (*terminals, "gid=5") if tty_group_known else terminals),
        Mount("/dev/shm", "tmpfs", "shm", (*hidden, "mode=1777", "size=65536k")),
        Mount("/dev/mqueue", "mqueue", "mqueue", hidden),
        sysfs,
        Mount("/sys/fs/cgroup", "cgroup", "cgroup", (*hidden, "relatime", "ro")),
    ]


def ordered_mounts(wanted: Iterable[Mount], gid_ranges: Sequence[IdRange] = ()) -> list[Mount]:
    """The defaults, then `wanted`, parents before children. If a place is named several times, the last mount counts.
    `gid_ranges`: the mapping of a rootless container, which may mount less."""
    defaults = {mount.destination: mount for mount in _default_mounts(gid_ranges)}
    chosen = defaults | {mount.destination: mount for mount in wanted}
    first = [mount for place, mount in chosen.items() if place in defaults]
    rest = [mount for place, mount in chosen.items() if place not in defaults]
    return first + sorted(rest, key=lambda mount: mount.destination.count("/"))


SYSTEM_PLACES = ("/proc", "/sys", "/dev")


def image_volumes(config: ImageConfig) -> tuple[str, ...]:
    """The places of the image's Volumes, from the root and normalised. The root itself is none. Raises ImageError: too
    many, or no text."""
    places: dict[str, None] = {}
    for volume in config.volumes:
        place = normal_path(checked_text(volume, "a volume of the image"))
        if place != "/":
            places[place] = None
    if len(places) > MAX_VOLUMES:
        raise ImageError(f"the image asks for {len(places)} volumes, more than {MAX_VOLUMES}")
    return tuple(places)


def parse_bind(text: str) -> Mount:
    """``SOURCE:DESTINATION[:OPTIONS]`` as -v takes it, OPTIONS separated by commas (ro, rslave).

    Both paths are absolute; the caller checks that SOURCE exists. Raises UserError.
    """
    parts = checked_text(text, "-v", UserError).split(":")
    if len(parts) not in (2, 3) or not parts[0].startswith("/"):
        raise UserError(
            f"-v {text!r} is not SOURCE:DESTINATION[:OPTIONS]", "SOURCE is an absolute path of this host"
        )
    asked = [option for option in (parts[2].split(",") if len(parts) == 3 else ()) if option]
    if unknown := [option for option in asked if option not in _BIND_OPTIONS]:
        raise UserError(
            f"-v {text!r}: unknown option {unknown[0]!r}", "known: " + " ".join(sorted(_BIND_OPTIONS))
        )
    options = ("rbind", *asked) if _PROPAGATION.intersection(asked) else ("rbind", "rprivate", *asked)
    return Mount(_destination(parts[1], f"-v {text!r}"), "bind", parts[0], options)


def parse_tmpfs(text: str) -> Mount:
    """``DESTINATION[:OPTIONS]`` as --tmpfs takes it: options of tmpfs(5). Default: nosuid,nodev,mode=1777."""
    place, _, given = checked_text(text, "--tmpfs", UserError).partition(":")
    asked = [option for option in given.split(",") if option]
    for option in asked:
        name, equals, value = option.partition("=")
        if not (option in _TMPFS_FLAGS or (name in _TMPFS_SETTINGS and equals and value.isalnum())):
            known = " ".join(sorted(_TMPFS_FLAGS) + [f"{n}=" for n in sorted(_TMPFS_SETTINGS)])
            raise UserError(f"--tmpfs {text!r}: unknown option {option!r}", f"known: {known}")
    mode = () if any(option.startswith("mode=") for option in asked) else ("mode=1777",)
    return Mount(
        _destination(place, f"--tmpfs {text!r}"), "tmpfs", "tmpfs", ("nosuid", "nodev", *mode, *asked)
    )


def _destination(place: str, what: str) -> str:
    if not place.startswith("/"):
        raise UserError(f"{what}: the place in the container is not an absolute path")
    clean = normal_path(place)
    if clean == "/" or forbidden_place(clean):
        raise UserError(f"{what}: nothing can be mounted on {clean}")
    return clean


def distinct_mounts(mounts: Iterable[Mount]) -> tuple[Mount, ...]:
    """The user's mounts. Raises UserError if two have the same destination."""
    seen: dict[str, Mount] = {}
    for mount in mounts:
        if mount.destination in seen:
            raise UserError(f"two mounts are asked for at {mount.destination}")
        seen[mount.destination] = mount
    return tuple(seen.values())
