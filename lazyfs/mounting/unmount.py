"""Unmounting, with an answer to "who is using it?"."""

from __future__ import annotations

import errno
import os
import select
import time

from lazyfs.control import client, messages, query
from lazyfs.errors import HostError, LazyfsError, UserError
from lazyfs.system import host
from lazyfs.system.mountapi import MNT_DETACH, UMOUNT_NOFOLLOW, umount2
from lazyfs.system.mountinfo import MountEntry, mounts
from lazyfs.system.process import SYSTEM_PATH, find_program
from lazyfs.system.syscalls import SyscallError

WAIT_S = 60.0
MAX_NAMED_PROCESSES = 8


class Busy(HostError):
    exit_code = 32  # what umount(8) says of EBUSY


find = query.lazyfs_mount


def umount(target: str, *, lazy: bool = False, wait: bool = False, wait_s: float = WAIT_S) -> None:
    """Unmounts the lazyfs mount at `target`. `lazy`: detaches it now; it ends when its last user goes. `wait`: returns
    only when the process behind it has let go of it (and of an ephemeral upper directory), at most `wait_s` later; at
    once if the image has further mounts like this one here, which the process does not tell apart. Raises UserError,
    Busy, HostError."""
    entry = query.required_mount(target)
    served = query.daemon_of(entry.dev) if wait else None
    process_fd = _process_of(served) if served is not None and entry.fstype == "fuse.lazyfs" else None
    try:
        if host.is_root():
            _umount_as_root(entry, lazy)
        else:
            _umount_as_user(entry, lazy)
        if process_fd is not None:
            poll = select.poll()
            poll.register(process_fd, select.POLLIN)
            # A process that serves further mounts of the image stays, but does not list this one any more.
            deadline = time.monotonic() + wait_s
            while not poll.poll(100) and _is_listed(served, entry.dev):
                _check_deadline(deadline, target, wait_s)
        elif served is not None:
            deadline = time.monotonic() + wait_s
            while _is_listed(served, entry.dev):
                _check_deadline(deadline, target, wait_s)
                time.sleep(0.05)
    finally:
        if process_fd is not None:
            os.close(process_fd)


def _check_deadline(deadline: float, target: str, wait_s: float) -> None:
    if time.monotonic() > deadline:
        raise Busy(
            f"{target} is unmounted, but still in use after {wait_s:g} s",
            "a process or container keeps it open",
        )


def _process_of(served: query.DaemonReply | None) -> int | None:
    if served is None:
        return None
    try:
        with client.Connection.open(served.socket_path) as connection:
            return os.pidfd_open(connection.peer_pid())
    except (LazyfsError, OSError):
        return None  # it has ended already


def _is_listed(served: query.DaemonReply | None, dev: tuple[int, int]) -> bool:
    """Whether a daemon lists a mount that is not here any more."""
    if served is None or any(entry.dev == dev for entry in mounts()):
        return False
    try:
        listing = client.ask_once(served.socket_path, {"op": "list"}, query.ANSWER_S)
    except client.DaemonGone:
        return False
    wanted = messages.format_dev(dev)
    return any(
        target.get("dev") == wanted
        for entry in query.mounts_of(listing)
        for target in query.targets_of(entry)
    )


def _umount_as_root(entry: MountEntry, lazy: bool) -> None:
    try:
        umount2(entry.mountpoint, UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0))
    except SyscallError as error:
        if error.errno != errno.EBUSY:
            raise
        raise _busy(entry) from None


def _umount_as_user(entry: MountEntry, lazy: bool) -> None:
    if entry.fstype != "fuse.lazyfs":
        raise UserError(f"{entry.mountpoint} was mounted by root", "unmount it as root")
    program = find_program("fusermount3", also=SYSTEM_PATH)
    if program is None:
        raise HostError("fusermount3 is missing", "install the package fuse3")
    import subprocess

    command = [program, "-u", *(["-z"] if lazy else []), "--", entry.mountpoint]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        if "busy" in done.stderr.lower():
            raise _busy(entry)
        raise HostError(f"unmounting {entry.mountpoint} failed: {done.stderr.strip()[:300]}", "try --lazy")


def _busy(entry: MountEntry) -> Busy:
    users = users_of(entry.mountpoint)
    below = [other.mountpoint for other in mounts() if other.parent_id == entry.mount_id]
    parts = []
    if users:
        named = ", ".join(f"{name} ({pid})" for pid, name in users[:MAX_NAMED_PROCESSES])
        more = f" and {len(users) - MAX_NAMED_PROCESSES} more" if len(users) > MAX_NAMED_PROCESSES else ""
        parts.append(f"used by {named}{more}")
    if below:
        parts.append(f"mounted below it: {', '.join(below[:MAX_NAMED_PROCESSES])}")
    reason = "; ".join(parts) or "something of another user keeps it open"
    return Busy(f"{entry.mountpoint} is busy: {reason}", "end them, or use --lazy")


def users_of(mountpoint: str) -> list[tuple[int, str]]:
    """Processes (pid, name) with a root, a working directory, a program, an open or a mapped file below `mountpoint`.
    Reads /proc without touching the mount, so that a dead daemon cannot block it. Only root sees the processes of
    other users."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid() and _uses(f"/proc/{name}", mountpoint):
            try:
                with open(f"/proc/{name}/comm", encoding="utf-8", errors="replace") as file:
                    found.append((int(name), file.read().strip()))
            except OSError:
                continue  # it has ended
    return sorted(found)


def _uses(process: str, mountpoint: str) -> bool:
    inside = mountpoint.rstrip("/") + "/"

    def below(path: str) -> bool:
        return path == mountpoint or path.startswith(inside)

    links = [f"{process}/root", f"{process}/cwd", f"{process}/exe"]
    try:  # noqa: SIM105 - contextlib takes 2 ms to import
        links += [f"{process}/fd/{fd}" for fd in os.listdir(f"{process}/fd")]
    except OSError:
        pass
    for link in links:
        try:
            if below(os.readlink(link)):
                return True
        except OSError:
            continue
    try:
        with open(f"{process}/maps", "rb") as file:
            fields = (line.split(None, 5) for line in file)  # address perms offset dev inode path
            return any(len(parts) == 6 and below(os.fsdecode(parts[5].rstrip(b"\n"))) for parts in fields)
    except OSError:
        return False


def wait_until_unmounted(target: str, dev: tuple[int, int]) -> None:
    """Blocks until `dev` is no longer mounted at `target` in this namespace."""
    with open("/proc/self/mountinfo", "rb") as file:
        poll = select.poll()
        poll.register(file, select.POLLERR | select.POLLPRI)  # proc_pid_mountinfo(5): set when it changes
        while any(entry.dev == dev and entry.mountpoint == target for entry in mounts()):
            poll.poll(10_000)
            file.seek(0)
            file.read()  # arms the notification again
