"""Unix sockets: listening, who is at the other end, and descriptors by SCM_RIGHTS.

`_socket` is the C half of `socket`, and all that is needed of it; the other half takes 4 ms to import, with enum and
selectors. Each `socket.socket` is one of its sockets, too.
"""

from __future__ import annotations

import _socket
import os
import struct
from _socket import socket as _Socket

from lazyfs.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence


Socket = _Socket


def connect(path: str, timeout_s: float) -> Socket:
    """A stream connection to the socket at `path`; `timeout_s` is that of all that follows, too. Raises OSError."""
    connection = Socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


def pair() -> tuple[Socket, Socket]:
    """Two stream sockets that are connected to each other. Raises OSError."""
    return _socket.socketpair()


def listen_private(path: str) -> socket.socket:
    """A listening socket at `path` that only this user may connect to. Renamed into place when it listens, so nobody
    finds one that refuses, and one that a killed process left is replaced. `path`.new: at most 107 bytes. Raises
    OSError."""
    import contextlib
    import socket

    new = path + ".new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        umask = os.umask(0o177)
        try:
            listener.bind(new)
        finally:
            os.umask(umask)
        listener.listen(128)
        os.rename(new, path)
    except BaseException:
        listener.close()
        raise
    return listener


def peer_uid(connection: Socket) -> int:
    """The user at the other end (SO_PEERCRED), as of when the connection was made."""
    credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return int(uid)


def peer_pid(connection: Socket) -> int:
    """The process that made the listening socket (or the pair) at the other end."""
    credentials = connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, _, _ = struct.unpack("3i", credentials)
    return int(pid)


_SOL_SOCKET = 1
_SCM_RIGHTS = 1
_MSG_CTRUNC = 0x8
_MSG_CMSG_CLOEXEC = 0x40000000
_FD = struct.Struct("=i")


def send_fds(connection: Socket, data_bytes: bytes, fds: Sequence[int]) -> None:
    """Sends all of `data_bytes`, the descriptors with its first byte (SCM_RIGHTS). Descriptors stay open
    here. Raises OSError."""
    rights = b"".join(map(_FD.pack, fds))
    sent = connection.sendmsg([data_bytes], [(_SOL_SOCKET, _SCM_RIGHTS, rights)]) if fds else 0
    if sent < len(data_bytes):
        connection.sendall(memoryview(data_bytes)[sent:])


def recv_fds(connection: Socket, size: int, max_fds: int) -> tuple[bytes, list[int]]:
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
