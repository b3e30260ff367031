"""/proc/self/mountinfo, parsed (proc_pid_mountinfo(5))."""

from __future__ import annotations

import os


class MountEntry:
    """One mount. `root` is the mounted directory within its file system, `options` are the mount's, `super_options`
    the file system's. Not a dataclass: that import takes 20 ms."""

    __slots__ = (
        "dev",
        "fstype",
        "mount_id",
        "mountpoint",
        "options",
        "parent_id",
        "root",
        "source",
        "super_options",
    )

    def __init__(
        self,
        mount_id: int,
        parent_id: int,
        dev: tuple[int, int],
        root: str,
        mountpoint: str,
        options: tuple[str, ...],
        fstype: str,
        source: str,
        super_options: tuple[str, ...],
    ) -> None:
        self.mount_id = mount_id
        self.parent_id = parent_id
        self.dev = dev
        self.root = root
        self.mountpoint = mountpoint
        self.options = options
        self.fstype = fstype
        self.source = source
        self.super_options = super_options

    def __repr__(self) -> str:
        return f"<MountEntry {self.mount_id} {self.fstype} {self.source!r} on {self.mountpoint!r}>"


def _unescape(field: bytes) -> str:
    """Undoes the kernel's octal escapes (of space, tab, newline, backslash, "#")."""
    if b"\\" not in field:
        return os.fsdecode(field)
    parts = field.split(b"\\")
    out = bytearray(parts[0])
    for part in parts[1:]:
        code = part[:3]
        if len(code) == 3 and all(0x30 <= c <= 0x37 for c in code) and int(code, 8) < 256:
            out.append(int(code, 8))
            out += part[3:]
        else:
            out += b"\\" + part
    return os.fsdecode(bytes(out))


def parse_line(line: bytes) -> MountEntry | None:
    """Parses one line, given without its newline; None if it does not have the documented form."""
    fields = line.split(b" ")
    try:
        separator = fields.index(b"-", 6)
        major, minor = fields[2].split(b":")
        return MountEntry(
            mount_id=int(fields[0]),
            parent_id=int(fields[1]),
            dev=(int(major), int(minor)),
            root=_unescape(fields[3]),
            mountpoint=_unescape(fields[4]),
            options=tuple(os.fsdecode(fields[5]).split(",")),
            fstype=os.fsdecode(fields[separator + 1]),
            source=_unescape(fields[separator + 2]),
            super_options=tuple(_unescape(fields[separator + 3]).split(",")),
        )
    except (ValueError, IndexError):
        return None


def mounts(path: str = "/proc/self/mountinfo") -> list[MountEntry]:
    """All mounts of this process's namespace, in the kernel's order: a later one covers an earlier one at the same
    place. Raises OSError."""
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    return [entry for entry in map(parse_line, lines) if entry is not None]


def mount_at(target: str) -> MountEntry | None:
    """The topmost mount whose mount point is exactly the real path of `target`; None if there is none."""
    wanted = os.path.realpath(target)
    found = None
    for entry in mounts():
        if entry.mountpoint == wanted:
            found = entry
    return found
