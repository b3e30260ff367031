"""A daemon that belongs to one command: it works on a cache that others may use, too, but it has a runtime directory of
its own, and so a FUSE connection and page caches of its own. It sees every read of what is mounted by it, and ends with
its command."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import time

from lazyfs.control import client, rundir
from lazyfs.errors import HostError, LazyfsError
from lazyfs.system.process import process_fds

_END_S = 10.0


def end_daemon(runtime: str) -> None:
    """Ends the processes of lazyfs that have this runtime directory, and removes it. Nothing may be mounted by them any
    more. Returns when they have ended. Raises HostError: they do not end. No error if there are none."""
    running_fds = process_fds("--runtime", runtime)
    with contextlib.suppress(LazyfsError):  # it has ended, or there are fuse processes only, which end by themselves
        client.ask_once(rundir.control_socket(runtime), {"op": "stop"}, _END_S)
    deadline_s = time.monotonic() + _END_S
    try:
        for process_fd in running_fds:
            if not select.select([process_fd], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
                raise HostError(
                    f"a daemon does not end after {_END_S:g} s: something may still be mounted",
                    f"see lazyfs ls, and {rundir.log_file(runtime)}",
                )
    finally:
        for process_fd in running_fds:
            os.close(process_fd)
    shutil.rmtree(runtime, ignore_errors=True)
