"""Unix sockets: who is at the other end, and descriptors by SCM_RIGHTS."""

from __future__ import annotations

import os
import socket
import struct

from lazyfs.errors import HostError

TYPE_CHECKING = False  # not from typing, which takes 8 ms to import
if TYPE_CHECKING:
    from collections.abc import Sequence


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end (SO_PEERCRED), as of when the connection was made."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return int(uid)


def peer_pid(connection: socket.socket) -> int:
    """The process that made the listening socket (or the pair) at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, _, _ = struct.unpack("3i", credentials)
    return int(pid)


_SOL_SOCKET = 1
_SCM_RIGHTS = 1
_MSG_CTRUNC = 0x8
_MSG_CMSG_CLOEXEC = 0x40000000
_FD = struct.Struct("=i")


def send_fds(connection: socket.socket, data_bytes: bytes, fds: Sequence[int]) -> None:
    """Sends all of `data_bytes`, the descriptors with its first byte (SCM_RIGHTS). Descriptors stay open
    here. Raises OSError."""
    rights = b"".join(map(_FD.pack, fds))
    sent = connection.sendmsg([data_bytes], [(_SOL_SOCKET, _SCM_RIGHTS, rights)]) if fds else 0
    if sent < len(data_bytes):
        connection.sendall(memoryview(data_bytes)[sent:])


def recv_fds(connection: socket.socket, size: int, max_fds: int) -> tuple[bytes, list[int]]:
    """At most `size` bytes and the descriptors that came with them, close-on-exec, now the caller's.
    b"" at end of stream. Raises OSError; HostError (none kept) if more than `max_fds` came."""
    # CMSG_SPACE: a header of 16 bytes, the descriptors, padded to 8
    space = 16 + -(-max_fds * _FD.size // 8) * 8
    data_bytes, messages, flags, _ = connection.recvmsg(size, space, _MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, rights in messages:
        if level == _SOL_SOCKET and kind == _SCM_RIGHTS:
            fds += [fd for (fd,) in _FD.iter_unpack(rights[: len(rights) // _FD.size * _FD.size])]
    if flags & _MSG_CTRUNC or len(fds) > max_fds:
        for fd in fds:
            os.close(fd)
        raise HostError("too many descriptors came, or too many files are open", "raise the limit of open files")
    return data_bytes, fds
