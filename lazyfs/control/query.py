"""Questions to the running daemons of this user: who serves a mount, what is mounted, with which counters."""

from __future__ import annotations

import os

from lazyfs.cache.places import NAMESPACE
from lazyfs.control import client, messages, rundir
from lazyfs.errors import LazyfsError, UserError
from lazyfs.records import NamedTuple
from lazyfs.system.mountinfo import MountEntry, mount_at

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ANSWER_S = 10.0


class DaemonReply(NamedTuple):
    """What a daemon answered, and at which socket."""

    socket_path: str
    reply: dict[str, Any]


def lazyfs_mount(target: str) -> MountEntry | None:
    """The mount at `target` if it is one of lazyfs, as mountinfo shows it: no daemon need live."""
    entry = mount_at(target)
    if entry is None:
        return None
    ours = (
        entry.fstype == "fuse.lazyfs"
        or (entry.fstype == "erofs" and os.path.basename(entry.source) == NAMESPACE)
        or (entry.fstype == "overlay" and entry.source == "lazyfs")
    )
    return entry if ours else None


def required_mount(target: str) -> MountEntry:
    """As `lazyfs_mount`. Raises UserError if there is none."""
    entry = lazyfs_mount(target)
    if entry is None:
        raise UserError(f"{target} is not a lazyfs mount", "`lazyfs ls` lists the mounts")
    return entry


def daemon_of(dev: tuple[int, int]) -> DaemonReply | None:
    """The daemon that serves the mount `dev`, and its "stats"; None if no daemon answers that it does."""
    for path in rundir.all_sockets():
        try:
            reply = client.ask_once(path, {"op": "stats", "dev": messages.format_dev(dev)}, ANSWER_S)
        except LazyfsError:  # not its mount, or dead
            continue
        return DaemonReply(path, reply)
    return None


def listings() -> list[DaemonReply]:
    """What every daemon of this user serves. Dead ones are left out."""
    found = []
    for path in rundir.all_sockets():
        try:
            found.append(DaemonReply(path, client.ask_once(path, {"op": "list"}, ANSWER_S)))
        except LazyfsError:
            continue
    return found


def mounts_of(listing: dict[str, Any]) -> list[dict[str, Any]]:
    """The well-formed entries of a "list" reply."""
    value = listing.get("mounts")
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def targets_of(entry: dict[str, Any]) -> list[dict[str, Any]]:
    value = entry.get("targets")
    return [target for target in value if isinstance(target, dict)] if isinstance(value, list) else []
