"""What has to be cleaned up although this process is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator

_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@contextlib.contextmanager
def guarded(clean_up: Callable[[], None]) -> Iterator[None]:
    """If this process dies inside the context, by SIGKILL, say, a child process that does nothing else calls `clean_up`
    and ends. If the context ends in any other way, the child ends at once.

    To be entered while the process has one thread. The child is a copy of this process at that moment: it has the same
    open files, in particular standard error, to which it writes if `clean_up` fails.
    """
    ours, theirs = socket.socketpair()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _guard(theirs, clean_up)
    theirs.close()
    try:
        ours.recv(1)  # it is ready
        yield
    finally:
        with contextlib.suppress(OSError):  # somebody has killed it
            ours.send(b"x")
        ours.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _guard(parent: socket.socket, clean_up: Callable[[], None]) -> None:
    """The child."""
    status = 0
    try:
        os.setsid()  # not killed with its parent's group or terminal
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(BrokenPipeError):
            parent.send(b"x")
        said = b""
        with contextlib.suppress(ConnectionResetError):  # it was killed before it read what was sent
            said = parent.recv(1)
        if not said:
            clean_up()
    except BaseException as error:
        status = 1
        with contextlib.suppress(OSError):
            os.write(2, f"lazyfs: clean-up after a killed command: {error}\n".encode(errors="replace"))
    finally:
        os._exit(status)
