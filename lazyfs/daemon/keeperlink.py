"""The worker's link to the keeper: what the worker inherits, and what it hands over for its successor.

The keeper starts the worker with ``LAZYFS_FDS``, the number of a memory file that holds JSON: {"fuse",
"mount", "listen", "lock", "link": descriptor numbers (null after let_go), "held": {name: number}}. The JSON is not in
the environment, because a variable is limited to 128 KiB.

Over the link (SOCK_SEQPACKET, so a message is whole or absent) the worker sends {"hold": name} with a
descriptor, {"drop": name} and {"let_go": true}. Nothing is acknowledged: what was sent before a kill -9 is
in the keeper's queue, which the keeper empties before it starts a successor.

If the keeper is killed, nothing is lost: the worker goes on, with the control socket and the lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket

from lazyfs.daemon.handover import ENVIRONMENT, MAX_NAME_BYTES
from lazyfs.errors import HostError
from lazyfs.system.sockets import send_fds


def _optional_fd(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int):
        raise ValueError(f"descriptor {value!r}")
    os.set_inheritable(value, False)  # programs that the worker starts get none of them
    return value


def _fd(value: object) -> int:
    fd = _optional_fd(value)
    if fd is None:
        raise ValueError("no descriptor")
    return fd


class KeeperLink:
    """Owns the inherited descriptors. Call its methods from one thread.

    `fuse_fd`: the connection. `mount_fd`: the detached FUSE mount; files in it are
    ``/proc/self/fd/<mount_fd>/<name>``. `listen_fd`: the control socket, listening. The latter two are None
    once `let_go` was called, here or by a predecessor. `held`: name -> descriptor, as a predecessor left it.
    """

    def __init__(
        self, fuse_fd: int, mount_fd: int | None, listen_fd: int | None, link_fd: int, held: dict[str, int]
    ) -> None:
        self.fuse_fd = fuse_fd
        self.mount_fd = mount_fd
        self.listen_fd = listen_fd
        self.held = held
        self._lock_fd: int | None = None
        self._socket = socket.socket(fileno=link_fd)

    @classmethod
    def from_environment(cls) -> KeeperLink:
        """What the keeper handed over; can be called once. Raises HostError."""
        try:
            number = int(os.environ.pop(ENVIRONMENT))
            with open(number, "rb") as file:
                file.seek(0)
                given = json.load(file)
            held = {str(name): _fd(fd) for name, fd in given["held"].items()}
            link = cls(
                _fd(given["fuse"]),
                _optional_fd(given["mount"]),
                _optional_fd(given["listen"]),
                _fd(given["link"]),
                held,
            )
            link._lock_fd = _optional_fd(given["lock"])
        except (KeyError, ValueError, TypeError, AttributeError, OSError):
            raise HostError(
                "the daemon was not started by its keeper", "start python -m lazyfs.daemon.keeper instead"
            ) from None
        return link

    def keeper_gone(self) -> bool:
        """Whether the keeper was killed. Then descriptors are held no more, and nobody would start a successor."""
        poller = select.poll()
        poller.register(self._socket, 0)  # POLLHUP is always reported
        return bool(poller.poll(0))

    def hold(self, name: str, fd: int) -> None:
        """Hands `fd` to the keeper, for successors. It is owned here, in `held`, until `drop` closes it. It replaces a
        descriptor of that name in one message, so that a kill at any moment leaves one of the two."""
        if len(name.encode()) > MAX_NAME_BYTES:
            raise ValueError("name too long")
        if name in self.held:
            os.close(self.held[name])
        self.held[name] = fd
        self._send({"hold": name}, [fd])

    def drop(self, name: str) -> None:
        """Closes what is held under `name`, here and in the keeper. KeyError if there is nothing."""
        os.close(self.held.pop(name))
        self._send({"drop": name})

    def let_go(self) -> None:
        """Closes the control socket, the mount and everything held, here and in the keeper, and frees the path for the
        next keeper: there will be no more mounts. The FUSE connection stays, and ends (ENODEV) with its last user;
        until then the keeper goes on starting workers. Call `DeviceServer.release_mount` before, and accept what waits
        on `listen_fd`, as those connections are reset."""
        self._send({"let_go": True})
        for fd in (self.mount_fd, self.listen_fd, self._lock_fd, *self.held.values()):
            if fd is not None:
                os.close(fd)
        self.mount_fd = self.listen_fd = self._lock_fd = None
        self.held.clear()

    def _send(self, message: dict[str, object], fds: list[int] | None = None) -> None:
        with contextlib.suppress(OSError):  # the keeper was killed: what is mounted goes on
            send_fds(self._socket, json.dumps(message).encode(), fds or [])
