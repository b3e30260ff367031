"""Image configuration → runtime configuration: the `config.json` of a bundle, as a plain dictionary.

Pure. Rules: OCI image-spec conversion.md; form: OCI runtime-spec 1.0.2 config.md and config-linux.md. What the
specifications leave open (capabilities, masked paths, PATH, /dev) is as in Docker, because images are written for that.
The network is the host's: there is no network namespace, and the caller mounts copies of the host's resolv.conf and
hosts. No seccomp filter is set.

The image is hostile. Its working directory and volumes may not lie under /proc (CVE-2024-21626, CVE-2023-27561). Its
labels become annotations only by an allow-list, because runtimes obey annotations ("org.systemd.property.*" and
"run.oci.*" act on the host). What the *user* asks for is only checked for sense.
"""

from __future__ import annotations

from lazyfs.containers.accounts import MAX_ID, Account
from lazyfs.containers.specmounts import IdRange, Mount, checked_text, forbidden_place, ordered_mounts
from lazyfs.errors import ImageError, UserError
from lazyfs.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from lazyfs.core.oci.documents import ImageConfig

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
"""Docker's default set (moby, oci/caps/defaults.go)."""

MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

_LABEL_PREFIXES = ("org.opencontainers.image.", "org.label-schema.")
_LABEL_NAMES = frozenset(
    {
        "architecture",
        "authors",
        "build-date",
        "description",
        "license",
        "maintainer",
        "name",
        "release",
        "summary",
        "url",
        "vendor",
        "version",
    }
)
MAX_LABEL_BYTES = 16384


class SpecOptions(NamedTuple):
    """What the user asks for, and what the caller knows of the host. The defaults change nothing.

    `command` replaces the image's Cmd; `entrypoint` replaces its Entrypoint and drops its Cmd. `env` entries
    are ``NAME=value``. `mounts` come last, `hosts_files` (resolv.conf, hosts) and `volumes` before them.
    `terminal_size`: columns, lines; runc sets it too, but later than a program may ask. `no_new_privileges`: set-id
    programs give no rights.
    `uid_ranges` and `gid_ranges` make it a rootless container: a user namespace with that mapping.
    """

    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    env: tuple[str, ...] = ()
    cwd: str = ""
    hostname: str = ""
    terminal: bool = False
    terminal_size: tuple[int, int] | None = None
    read_only: bool = False
    mounts: tuple[Mount, ...] = ()
    volumes: tuple[Mount, ...] = ()
    hosts_files: tuple[Mount, ...] = ()
    no_new_privileges: bool = False
    cgroup_namespace: bool = False
    uid_ranges: tuple[IdRange, ...] = ()
    gid_ranges: tuple[IdRange, ...] = ()


def build_spec(
    config: ImageConfig, account: Account, options: SpecOptions
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The runtime configuration, and notes for the user on what of the image was left out.

    The root is the directory "rootfs" next to config.json. Raises ImageError or UserError if the image or the user asks
    for something that is not allowed.
    """
    notes: list[str] = []
    if options.uid_ranges and account.additional_gids:
        account = account._replace(additional_gids=())
        notes.append("supplementary groups are left out: a container of an ordinary user cannot set them")
    spec: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": _process(config, account, options, notes),
        "root": {"path": "rootfs", "readonly": options.read_only},
        "mounts": [_mount(m) for m in all_mounts(options)],
        "linux": _linux(options),
    }
    if options.hostname:
        spec["hostname"] = options.hostname
    if annotations := _annotations(config, notes):
        spec["annotations"] = annotations
    return spec, tuple(notes)


def _process(config: ImageConfig, account: Account, options: SpecOptions, notes: list[str]) -> dict[str, Any]:
    capabilities = list(CAPABILITIES)
    active = capabilities if account.uid == 0 else []
    user: dict[str, Any] = {"uid": account.uid, "gid": account.gid}
    if not options.uid_ranges:
        # The primary one among them: else a program that drops it by setgid(2) gets rid of a group that is denied
        # something (CVE-2022-2989 and its kin).
        user["additionalGids"] = [account.gid, *account.additional_gids]
    process: dict[str, Any] = {
        "terminal": options.terminal,
        "user": user,
        "args": _arguments(config, options),
        "env": _environment(config, account, options, notes),
        "cwd": working_directory(config, options.cwd),
        "capabilities": {
            "bounding": capabilities,
            "effective": active,
            "permitted": active,
            "inheritable": [],  # CVE-2022-24769
            "ambient": [],
        },
        "noNewPrivileges": options.no_new_privileges,
    }
    if options.terminal and options.terminal_size:
        columns, lines = options.terminal_size
        process["consoleSize"] = {"width": columns, "height": lines}
    return process


def _linux(options: SpecOptions) -> dict[str, Any]:
    linux: dict[str, Any] = {
        "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")],
        "maskedPaths": list(MASKED_PATHS),
        "readonlyPaths": list(READONLY_PATHS),
    }
    if options.cgroup_namespace:
        linux["namespaces"].append({"type": "cgroup"})
    if options.uid_ranges:
        linux["namespaces"].append({"type": "user"})
        linux["uidMappings"] = [_mapping(r) for r in options.uid_ranges]
        linux["gidMappings"] = [_mapping(r) for r in options.gid_ranges]
    else:
        # runc itself lets the harmless devices of /dev through (null, zero, full, random, urandom, tty, pts)
        linux["resources"] = {"devices": [{"allow": False, "access": "rwm"}]}
    return linux


def all_mounts(options: SpecOptions) -> list[Mount]:
    """Every mount of the container, in the order they are made."""
    return ordered_mounts((*options.hosts_files, *options.volumes, *options.mounts), options.gid_ranges)


def _mapping(ids: IdRange) -> dict[str, int]:
    return {"containerID": ids.container_id, "hostID": ids.host_id, "size": ids.size}


def _mount(mount: Mount) -> dict[str, Any]:
    return {
        "destination": mount.destination,
        "type": mount.type,
        "source": mount.source,
        "options": list(mount.options),
    }


# -- process ---------------------------------------------------------------------------------------------


def _arguments(config: ImageConfig, options: SpecOptions) -> list[str]:
    asked = options.entrypoint is not None or options.command
    if options.entrypoint is not None:
        arguments = [*options.entrypoint, *options.command]
    else:
        entrypoint = () if config.entrypoint == ("",) else config.entrypoint  # how docker build takes one away
        arguments = [*entrypoint, *(options.command or config.cmd)]
    if not arguments or not arguments[0]:
        error = UserError if asked else ImageError
        raise error("there is no command to run: the image names none", "give one after the image's name")
    return [checked_text(argument, "an argument of the command") for argument in arguments]


def _environment(config: ImageConfig, account: Account, options: SpecOptions, notes: list[str]) -> list[str]:
    """The image's variables in their order, the user's in their place, then missing defaults. What of the image is none
    is left out, as by those who pass it on to a kernel that takes anything."""
    overrides: dict[str, str] = {}
    for entry in options.env:
        name = _variable_name(entry, "-e", UserError)
        if not name:
            raise UserError(f"a variable of -e is not of the form NAME=value: {entry[:80]!r}")
        overrides[name] = entry
    env: list[str] = []
    names: set[str] = set()
    for entry in config.env:
        name = _variable_name(entry, "the image's Env", ImageError)
        if not name:
            notes.append(f"the image's variable {entry[:80]!r} has no name or no value, and is left out")
            continue
        if name in overrides and name in names:
            continue
        names.add(name)
        env.append(overrides.get(name, entry))
    env += [entry for name, entry in overrides.items() if name not in names]
    names |= overrides.keys()
    defaults = {"PATH": DEFAULT_PATH, "HOME": account.home}
    if options.hostname:
        defaults["HOSTNAME"] = options.hostname
    if options.terminal:
        defaults["TERM"] = "xterm"
    return env + [f"{name}={value}" for name, value in defaults.items() if name not in names]


def _variable_name(entry: str, where: str, error: type[ImageError] | type[UserError]) -> str:
    """The name of a variable; "" if it is not of the form NAME=value."""
    checked_text(entry, f"a variable of {where}", error)
    name, equals, _ = entry.partition("=")
    return name if equals else ""


def working_directory(config: ImageConfig, override: str = "") -> str:
    """The process's absolute working directory, "/" if none is named.

    One under /proc is refused, whoever asks: it could be one of runc's own descriptors, a way to the host
    (CVE-2024-21626). The caller must still follow the image's symlinks (`forbidden_place`).
    """
    error = UserError if override else ImageError
    cwd = checked_text(override or config.working_dir or "/", "the working directory", error)
    cwd = cwd if cwd.startswith("/") else f"/{cwd}"
    if forbidden_place(cwd):
        raise error(
            f"the working directory {cwd[:80]!r} lies under /proc, which is refused", "choose one with -w"
        )
    return cwd


# -- annotations -----------------------------------------------------------------------------------------


def _annotations(config: ImageConfig, notes: list[str]) -> dict[str, str]:
    """Annotations from the image's fields and labels. A label wins over the field of the same meaning
    (conversion.md)."""
    implicit: Mapping[str, str] = {
        "os": config.os,
        "architecture": config.architecture,
        "variant": config.variant,
        "stopSignal": config.stop_signal,
        "exposedPorts": ",".join(config.exposed_ports),
    }
    annotations = {f"org.opencontainers.image.{name}": value for name, value in implicit.items() if value}
    omitted = []
    for name, value in config.labels.items():
        allowed = name.startswith(_LABEL_PREFIXES) or name in _LABEL_NAMES
        if allowed and len(name) + len(value) <= MAX_LABEL_BYTES:
            annotations[name] = value
        else:
            omitted.append(name)
    if omitted:
        shown = ", ".join(name[:60] for name in omitted[:3]) + (", ..." if len(omitted) > 3 else "")
        notes.append(f"{len(omitted)} of the image's labels did not become annotations: {shown!a}")
    return {name: _printable(value) for name, value in annotations.items()}


def _printable(value: str) -> str:
    """`value` as JSON can carry it to any reader: lone surrogates replaced."""
    return value.encode("utf-8", "replace").decode("utf-8")


def check_ids(account: Account, options: SpecOptions) -> str:
    """ "" if the account's ids exist in the container, else what is missing (rootless mappings)."""
    for what, number, ranges in (
        ("uid", account.uid, options.uid_ranges),
        ("gid", account.gid, options.gid_ranges),
    ):
        if number > MAX_ID:
            return f"{what} {number}"
        if ranges and not any(r.container_id <= number < r.container_id + r.size for r in ranges):
            return f"{what} {number}"
    return ""
