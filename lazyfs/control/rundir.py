"""Runtime directories, private to their user: sockets and log of the daemon of one cache.

    root: /run/lazyfs/KEY       others: $XDG_RUNTIME_DIR/lazyfs/KEY or /tmp/lazyfs-UID/KEY

KEY is the beginning of the sha256 of the cache's real path: one daemon, so one socket, per cache. A daemon that belongs
to one command (mounting/owndaemon.py) has a random KEY.
"""

from __future__ import annotations

import os

from lazyfs.errors import HostError, LazyfsError
from lazyfs.system.private import check_private, make_private

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

SOCKET_NAME = "control.sock"
LOG_NAME = "daemon.log"
_KEY_CHARACTERS = 16


def key_of(cache: str) -> str:
    from lazyfs.core.oci.sha256 import light_sha256

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
    return _made(key_of(cache))


def own_runtime_directory() -> str:
    """A new runtime directory (0700) that no other daemon has. Raises HostError."""
    return _made(f"own-{os.urandom(8).hex()}")


def _made(key: str) -> str:
    problem: LazyfsError | None = None
    for base in _bases():
        try:
            make_private(base)
            check_private(base, "runtime directory", f"remove {base}")
            path = os.path.join(base, key)
            make_private(path)
            check_private(path, "runtime directory", f"remove {path}")
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
    """The sockets of this cache's ``lazyfs.daemon.fuseworker`` processes: ``fuse-*.sock``."""
    for name in _names(runtime):
        if name.startswith("fuse-") and name.endswith(".sock"):
            yield os.path.join(runtime, name)


def remove_dead_socket(path: str) -> None:
    """Removes the socket ``fuse-PID.sock``, at which nobody listens, if process PID was killed. If it lives, it may be
    starting."""
    pid = os.path.basename(path).removeprefix("fuse-").removesuffix(".sock")
    if pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
        try:  # noqa: SIM105 - contextlib takes 2 ms to import
            os.unlink(path)
        except OSError:
            pass  # another client was faster


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
        check_private(directory, "runtime directory", "")
        return sorted(os.listdir(directory))
    except (OSError, LazyfsError):  # missing, or not ours: then there is no daemon of ours either
        return []
