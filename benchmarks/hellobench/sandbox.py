"""Runs the whole benchmark in namespaces of its own, so that nothing of it can outlive it or meet the host's.

Processes: when the first one ends, however it ends, the kernel kills all others. Mounts and /run (state of runc,
containerd, network namespaces, lazyfs) go with the mount namespace. Ports: the loopback interface is its own.
Only files in the work directory can be left by kill -9; the next run removes them.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.host import WORK_PREFIX, WORK_ROOT, run

_INSIDE = "LAZYFS_HELLOBENCH_INSIDE"
# A shell as the first process: it reaps what others leave. It may not replace itself by its last command.
_FIRST = '"$@"; exit $?'


def inside() -> bool:
    """Whether this process was started by enter()."""
    return _INSIDE in os.environ


def enter(arguments: Sequence[str]) -> None:
    """Continue inside: the first call runs the command anew in there, and ends this process as that one ends. As
    root."""
    if not inside():
        sys.exit(_run_inside([sys.executable, "-m", "benchmarks.hellobench", *arguments]))
    # skopeo keeps notes on registries in the other one.
    for directory in ("/run", "/var/lib/containers"):
        os.makedirs(directory, exist_ok=True)
        run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", directory)
    run("ip", "link", "set", "lo", "up")


def _run_inside(program: Sequence[str]) -> int:
    # unshare ignores SIGINT and SIGTERM, so they are sent to its whole group; and it is killed when we are.
    command = ["setpriv", "--pdeathsig", "KILL"]
    command += ["unshare", "--fork", "--pid", "--mount-proc", "--mount", "--net", "--kill-child"]
    process = subprocess.Popen(
        [*command, "sh", "-c", _FIRST, "sh", *program], env=os.environ | {_INSIDE: "1"}, process_group=0
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: os.killpg(process.pid, received))
    return process.wait()


def remove_abandoned() -> None:
    """Delete the work directories of runs that were killed."""
    for directory in Path(WORK_ROOT).glob(f"{WORK_PREFIX}*"):
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            run("rm", "-rf", "--one-file-system", directory)
        except BlockingIOError:
            pass  # somebody works there
        finally:
            os.close(descriptor)
