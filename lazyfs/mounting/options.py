"""Mount options as mount(8) writes them: ``-o rw,upperdir=/u,"cache=/a,b"``, the last one wins.

Paths become absolute here, because the daemon works in another directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lazyfs.errors import UserError
from lazyfs.sources.access import Access

BACKENDS = ("auto", "kernel", "fuse")
MAX_TIMEOUT_S = 86400.0

# Options of mount(8), fstab(5) and systemd.mount(5) that mean something to others, or nothing here: access
# times are never written to a read-only root, and an overlay keeps the defaults.
_IGNORED = frozenset(
    (
        *("defaults", "auto", "noauto", "nofail", "_netdev", "_rnetdev", "nouser"),
        *(
            "atime",
            "noatime",
            "diratime",
            "nodiratime",
            "relatime",
            "norelatime",
            "strictatime",
            "nostrictatime",
        ),
        *("async", "sync", "dirsync", "lazytime", "nolazytime", "silent", "loud", "iversion", "noiversion"),
        *("mand", "nomand"),
    )
)
_IGNORED_WITH_VALUE = frozenset(("comment", "uhelper", "helper", "fsname", "subtype"))
_IGNORED_PREFIXES = ("x-", "X-")


class MountOptions(NamedTuple):
    """Parsed mount options. Paths are absolute. Defaults: read-only, nodev, nosuid."""

    writable: bool = False
    ephemeral: bool = False  # writable was asked for by this name, with no upperdir in mind
    upperdir: str | None = None
    workdir: str | None = None
    backend: str = "auto"
    cache: str | None = None  # None: the default directory
    dev: bool = False
    suid: bool = False
    executable: bool = True
    allow_other: bool = False
    foreground: bool = False
    timeout_s: float = 30.0  # the longest a single read waits
    access: Access = Access()

    def having(self, **values: object) -> MountOptions:
        """With these fields, of this record or of `access`."""
        own = {name: value for name, value in values.items() if name in self._fields}
        access = {name: value for name, value in values.items() if name not in own}
        return self._replace(access=self.access._replace(**access), **own)  # type: ignore[arg-type]


def split(text: str) -> Iterator[tuple[str, str | None]]:
    """The options of one string, as (name, value or None). A comma inside double quotes, or after a
    backslash, belongs to the value; the quotes and that backslash are dropped. Raises UserError."""
    item: list[str] = []
    quoted = False
    position = 0
    while position < len(text):
        character = text[position]
        if not quoted and character == "\\" and text[position + 1 : position + 2] in (",", "\\", '"'):
            item.append(text[position + 1])
            position += 1
        elif character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            yield from _pair("".join(item))
            item.clear()
        else:
            item.append(character)
        position += 1
    if quoted:
        raise UserError(f"mount options have an unclosed quote: {text:.200}", "close the double quote")
    yield from _pair("".join(item))


def _pair(item: str) -> Iterator[tuple[str, str | None]]:
    name, separator, value = item.strip(" \t").partition("=")
    if name:
        yield name, value if separator else None
    elif separator:
        raise UserError(f"mount option without a name: {item:.100}", "write NAME=VALUE")


def quote(value: str) -> str:
    """`value` as it has to be written in an option string, so that `split` gives it back."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace(",", "\\,")


_FLAGS: dict[str, dict[str, bool]] = {
    "ro": {"writable": False},
    "rw": {"writable": True},
    "ephemeral": {"writable": True, "ephemeral": True},
    "dev": {"dev": True},
    "nodev": {"dev": False},
    "suid": {"suid": True},
    "nosuid": {"suid": False},
    "exec": {"executable": True},
    "noexec": {"executable": False},
    # mount(8): these imply further ones "unless overridden by subsequent options".
    "user": {"executable": False, "dev": False, "suid": False},
    "users": {"executable": False, "dev": False, "suid": False},
    "owner": {"dev": False, "suid": False},
    "group": {"dev": False, "suid": False},
    "offline": {"offline": True},
    "allow_other": {"allow_other": True},
    "insecure": {"insecure": True},
    "foreground": {"foreground": True},
}
_PATHS = {"upperdir": "upperdir", "workdir": "workdir", "cache": "cache"}
_PATH_LISTS = {"authfile": "auth_files", "ca": "ca_files"}
KNOWN = (*_FLAGS, *_PATHS, *_PATH_LISTS, "backend", "timeout", "platform")


def parse(
    texts: Iterable[str],
    base: MountOptions | None = None,
    *,
    sloppy: bool = False,
    directory: str | None = None,
) -> MountOptions:
    """The options of several ``-o`` strings over `base` (default: MountOptions()). `sloppy`: unknown ones
    are passed over (mount -s). Relative paths start at `directory` (default: the current one). Raises
    UserError."""
    options = MountOptions() if base is None else base
    for text in texts:
        for name, value in split(text):
            options = _apply(options, name, value, sloppy, directory)
    return _checked(options)


def _apply(
    options: MountOptions, name: str, value: str | None, sloppy: bool, directory: str | None
) -> MountOptions:
    if name in _FLAGS:
        if value is not None and not (name in ("user", "owner", "group") and value):
            raise UserError(f"mount option {name} takes no value", f"write {name}, not {name}={value:.40}")
        return options.having(**_FLAGS[name])
    if name in _PATHS:
        return options.having(**{_PATHS[name]: _path(name, value, directory)})
    if name in _PATH_LISTS:
        field = _PATH_LISTS[name]
        paths = (*(getattr(options.access, field) or ()), _path(name, value, directory))
        return options.having(**{field: paths})
    if name == "backend":
        if value not in BACKENDS:
            raise UserError(
                f"mount option backend={value or ''} is unknown", "use backend=auto, kernel or fuse"
            )
        return options._replace(backend=value)
    if name == "timeout":
        return options._replace(timeout_s=_seconds(value))
    if name == "platform":
        return options.having(platform=_platform(value))
    if name == "remount":
        raise UserError(
            "a lazyfs mount cannot be remounted", "unmount it and mount it again with the new options"
        )
    ignored = (
        (name in _IGNORED and value is None)
        or name in _IGNORED_WITH_VALUE
        or name.startswith(_IGNORED_PREFIXES)
    )
    if ignored or sloppy:
        return options
    raise UserError(f"unknown mount option {name:.60}", _suggestion(name))


def _suggestion(name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, KNOWN, 1)
    return (
        f"did you mean {close[0]}?"
        if close
        else "`lazyfs mount --help` lists the options; -s ignores unknown ones"
    )


def _path(name: str, value: str | None, directory: str | None) -> str:
    if not value or "\0" in value:
        raise UserError(f"mount option {name} needs a path", f"write {name}=/some/path")
    expanded = os.path.expanduser(value) if value.startswith("~/") else value
    return os.path.normpath(os.path.join(directory or os.getcwd(), expanded))


def _seconds(value: str | None) -> float:
    try:
        seconds = float((value or "").removesuffix("s"))
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= MAX_TIMEOUT_S:  # false for nan, too
        raise UserError(
            f"mount option timeout={value or ''} is not a time", "give seconds from 0.1 to 86400: timeout=30"
        )
    return seconds


def _platform(value: str | None) -> str:
    parts = (value or "").split("/")
    allowed = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")
    if not (
        2 <= len(parts) <= 3
        and len(value or "") <= 100
        and all(part and set(part) <= allowed for part in parts)
    ):
        raise UserError(
            f"mount option platform={value or '':.60} is not a platform",
            "write OS/ARCHITECTURE[/VARIANT]: platform=linux/arm64/v8",
        )
    return "/".join(parts)


def _checked(options: MountOptions) -> MountOptions:
    if options.workdir and not options.upperdir:
        raise UserError("mount option workdir= needs upperdir=", "give both, on the same file system")
    if options.upperdir and not options.writable:
        raise UserError("mount option upperdir= needs rw", "add rw: -o rw,upperdir=...")
    return options
