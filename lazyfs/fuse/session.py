"""Mounting and unmounting a pyfuse3 session, with errors that say what is wrong."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import subprocess
from collections.abc import Iterable, Iterator

import pyfuse3

from lazyfs.errors import HostError, UserError
from lazyfs.system import host
from lazyfs.system.mountapi import MNT_DETACH, UMOUNT_NOFOLLOW, umount2
from lazyfs.system.mountinfo import mounts
from lazyfs.system.process import SYSTEM_PATH, find_program
from lazyfs.system.syscalls import SyscallError

log = logging.getLogger(__name__)

UNMOUNT_S = 20.0


def mount(
    operations: pyfuse3.Operations, target: str, reference: str, *, allow_other: bool, executable: bool
) -> tuple[int, int]:
    """Mounts at `target` and returns the device number. Call `serve_requests` next, and `close` in the end.
    Root mounts by itself, other users by fusermount3. Raises UserError, HostError."""
    target = os.path.realpath(target)  # before mounting: afterwards a stat of it would wait for this process
    if not os.path.isdir(target):
        raise UserError(f"{target} is not a directory", "give an existing directory")
    options = {
        # default_permissions: the kernel checks modes and owners; we are never asked.
        *("ro", "default_permissions", "subtype=lazyfs"),
        # Shown in mountinfo. Commas and backslashes would need escapes, and pyfuse3 takes ASCII only.
        "fsname=" + re.sub(r"[^!-+\--\[\]-~]", "_", reference)[:1024],
    }
    if allow_other:
        options.add("allow_other")
    if not executable:
        options.add("noexec")
    with _captured_stderr() as words:
        try:
            pyfuse3.init(operations, target, options)
        except RuntimeError:
            failed = True
        else:
            failed = False
    if failed:
        raise _mount_error(target, words[0])
    found = [entry.dev for entry in mounts() if entry.mountpoint == target and entry.fstype == "fuse.lazyfs"]
    if not found:
        pyfuse3.close(unmount=False)
        raise HostError(f"{target} was unmounted at once", "see what else uses it")
    return found[-1]


async def serve_requests(max_tasks: int) -> None:
    """Answers the kernel until the last mount has gone."""
    await pyfuse3.main(max_tasks=max_tasks)


def close() -> None:
    """Ends the connection: remaining users of the mount get ENOTCONN. Does not unmount, because libfuse would
    unmount whatever is at the target now; see `unmount_lazily`."""
    pyfuse3.close(unmount=False)


def _mount_error(target: str, words: str) -> UserError | HostError:
    reason = words.strip().replace("\n", "; ")[:500] or "libfuse gave no reason"
    if "user_allow_other" in reason:
        return UserError(f"cannot mount on {target}: {reason}", "add user_allow_other to /etc/fuse.conf")
    if "no write access" in reason or "not owned by user" in reason:
        return UserError(f"cannot mount on {target}: {reason}", "give a directory that is yours")
    problem = host.fuse_problem()
    return HostError(f"cannot mount on {target}: {reason}", problem[1] if problem else "run `lazyfs doctor`")


@contextlib.contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """Collects what libfuse and fusermount3 print, the only account of a failed mount, and prints it in the end.
    After the context the list has one element."""
    words: list[str] = []
    memory_fd = os.memfd_create("stderr")
    saved_fd = os.dup(2)
    try:
        os.dup2(memory_fd, 2)
        try:
            yield words
        finally:
            os.dup2(saved_fd, 2)
            text = os.pread(memory_fd, 65536, 0)
            words.append(text.decode("utf-8", "replace"))
            with contextlib.suppress(OSError):
                os.write(2, text)
    finally:
        os.close(memory_fd)
        os.close(saved_fd)


def unmount_lazily(dev: tuple[int, int], others: Iterable[tuple[tuple[int, int], str]] = ()) -> None:
    """Detaches all mounts of file system `dev` in this namespace, and the `others` (device, target). Mounts that
    cover them stay. Never raises: logs what cannot be unmounted."""
    wanted = set(others)
    try:
        entries = mounts()
    except OSError as error:
        log.warning("cannot read the mount table: %s", error.strerror)
        return
    top = {entry.mountpoint: entry.dev for entry in entries}
    for entry in reversed(entries):
        ours = entry.dev == dev or (entry.dev, entry.mountpoint) in wanted
        if ours and top[entry.mountpoint] == entry.dev:
            try:
                _unmount(entry.mountpoint)
            except (HostError, OSError, subprocess.SubprocessError) as error:
                log.warning("cannot unmount %s: %s", entry.mountpoint, error)


def _unmount(target: str) -> None:
    try:
        umount2(target, MNT_DETACH | UMOUNT_NOFOLLOW)
    except SyscallError as error:
        program = find_program("fusermount3", also=SYSTEM_PATH)
        if error.errno != errno.EPERM or program is None:
            raise
        done = subprocess.run(
            [program, "-u", "-z", "-q", "--", target],
            stdin=subprocess.DEVNULL,
            timeout=UNMOUNT_S,
            check=False,
        )
        if done.returncode != 0:
            raise HostError(f"fusermount3 -u -z {target}: exit {done.returncode}") from None
