"""Where things lie: cache and runtime directories, private to their user.

    cache     root: /var/cache/lazyfs     others: ${XDG_CACHE_HOME:-~/.cache}/lazyfs
    runtime   root: /run/lazyfs/KEY       others: $XDG_RUNTIME_DIR/lazyfs/KEY or /tmp/lazyfs-UID/KEY

KEY is the beginning of the sha256 of the cache's real path: one daemon, so one socket, per cache.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

from lazyfs.errors import HostError, LazyfsError, UserError

SOCKET_NAME = "control.sock"
LOG_NAME = "daemon.log"
_KEY_CHARACTERS = 16


def default_cache() -> str:
    if os.geteuid() == 0:
        return "/var/cache/lazyfs"
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "lazyfs")


def cache_directory(chosen: str | None = None) -> str:
    """The real path of the cache directory; made (0700) if it is missing. Raises HostError, UserError."""
    path = os.path.realpath(chosen or default_cache())
    _make_private(path, parents=True)
    _check_private(path, "cache directory", "choose another with -o cache=DIR", writable_only=True)
    return path


def uppers_directory(cache: str) -> str:
    """Where upper directories of ``rw`` mounts without ``upperdir=`` lie: ``<here>/<random>/{upper,work}``.
    On the cache's disk, and below a directory only its owner may enter (set-id files: CVE-2021-41103)."""
    path = os.path.join(cache, "uppers")
    _make_private(path)
    return path


def key_of(cache: str) -> str:
    from lazyfs.core.lightsha import light_sha256

    return light_sha256(os.fsencode(os.path.realpath(cache)))[:_KEY_CHARACTERS]


def _bases() -> list[str]:
    """Possible parents of runtime directories, best first. Root of a user namespace may not write /run."""
    bases = ["/run/lazyfs"] if os.geteuid() == 0 else []
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    if session.startswith("/") and os.path.isdir(session):
        bases.append(os.path.join(session, "lazyfs"))
    bases.append(f"/tmp/lazyfs-{os.geteuid()}")
    return bases


def runtime_directory(cache: str) -> str:
    """The runtime directory of the daemon of `cache`; made (0700) if it is missing. Raises HostError."""
    problem: LazyfsError | None = None
    for base in _bases():
        try:
            _make_private(base)
            _check_private(base, "runtime directory", f"remove {base}")
            path = os.path.join(base, key_of(cache))
            _make_private(path)
            _check_private(path, "runtime directory", f"remove {path}")
            return path
        except LazyfsError as error:
            problem = problem or error
            if base.startswith("/tmp/"):
                break
    raise problem or HostError("no runtime directory")


def control_socket(runtime: str) -> str:
    return os.path.join(runtime, SOCKET_NAME)


def log_file(runtime: str) -> str:
    return os.path.join(runtime, LOG_NAME)


def fuse_sockets(runtime: str) -> Iterator[str]:
    """The sockets of this cache's ``lazyfs.fusemount`` processes: ``fuse-*.sock``."""
    for name in _names(runtime):
        if name.startswith("fuse-") and name.endswith(".sock"):
            yield os.path.join(runtime, name)


def remove_dead_socket(path: str) -> None:
    """Removes the socket ``fuse-PID.sock``, which nobody listens at, if process PID was killed. (Otherwise it
    may be just starting.)"""
    pid = os.path.basename(path).removeprefix("fuse-").removesuffix(".sock")
    if pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
        with contextlib.suppress(OSError):
            os.unlink(path)


def all_sockets() -> Iterator[str]:
    """Every control socket of this user, of all caches; their daemons may be dead."""
    for base in _bases():
        for key in _names(base):
            runtime = os.path.join(base, key)
            names = _names(runtime)
            if SOCKET_NAME in names:
                yield control_socket(runtime)
            yield from (
                os.path.join(runtime, n) for n in names if n.startswith("fuse-") and n.endswith(".sock")
            )


def _names(directory: str) -> list[str]:
    try:
        _check_private(directory, "runtime directory", "")
        return sorted(os.listdir(directory))
    except (OSError, LazyfsError):  # missing, or not ours: then there is no daemon of ours either
        return []


def _make_private(path: str, parents: bool = False) -> None:
    try:
        if parents:
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise HostError(
            f"cannot make the directory {path}: {error.strerror}", "check the rights of its parent"
        ) from None


def _check_private(path: str, what: str, hint: str, writable_only: bool = False) -> None:
    """`path` must be a real directory that belongs to this user and that others cannot use (with
    `writable_only`: cannot write)."""
    try:
        status = os.lstat(path)
    except OSError as error:
        raise HostError(f"cannot use the {what} {path}: {error.strerror}", hint) from None
    if not stat.S_ISDIR(status.st_mode):
        raise UserError(f"the {what} {path} is not a directory", hint)
    if status.st_uid != os.geteuid():
        raise UserError(f"the {what} {path} belongs to user {status.st_uid}, not to you", hint)
    forbidden = 0o022 if writable_only else 0o077
    if status.st_mode & forbidden:
        raise UserError(
            f"other users may {'write' if writable_only else 'enter'} the {what} {path}", f"chmod 700 {path}"
        )
