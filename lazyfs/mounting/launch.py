"""Starts the processes behind mounts: the keeper (with its daemon) of a cache, and a fuse process for each mount.

They outlive the command that starts them: each has a session of its own, writes to daemon.log, and changes to "/".
"""

from __future__ import annotations

import os
import time

from lazyfs.control import rundir
from lazyfs.control.client import Connection, DaemonGone
from lazyfs.errors import HostError
from lazyfs.system.process import environment, find_program, python_command
from lazyfs.system.sockets import pair

START_DEADLINE_S = 20.0  # starting Python and binding a socket takes 0.1 s; a loaded host may need longer
END_DEADLINE_S = 5.0


MAX_LOG_BYTES = 8 * 1024 * 1024  # a larger log is renamed when a process starts


class StartError(HostError):
    """A process of lazyfs did not start, or ended at once."""


class Child:
    """A process that this one started. `subprocess` would take 11 ms to import."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        """The exit code, minus the signal that ended it, or None while it runs."""
        if self._status is None:
            try:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
            except ChildProcessError:  # the parent has set SIGCHLD to be ignored
                pid, status = self._pid, 0
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def end(self) -> None:
        """Ends the process, by SIGKILL if SIGTERM does not end it within seconds."""
        import signal  # takes 4 ms, with enum, and few commands end a process

        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + END_DEADLINE_S
            if self.poll() is None:
                os.kill(self._pid, number)
            while self.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)


def _spawn(command: list[str], log: str, inherited: tuple[int, ...] = ()) -> Child:
    """Starts a process in a session of its own, its output in `log`, with the descriptors `inherited`."""
    try:
        if os.path.getsize(log) > MAX_LOG_BYTES:
            os.replace(log, log + ".old")
    except OSError:
        pass  # no log yet
    try:
        log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise HostError(f"cannot write {log}: {error.strerror}", "check the disk and the directory's rights") from None
    streams = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, log_fd, 1),
        (os.POSIX_SPAWN_DUP2, log_fd, 2),
    ]
    mask = os.umask(0o077)
    for fd in inherited:
        os.set_inheritable(fd, True)
    try:
        return Child(os.posix_spawn(command[0], command, environment(), file_actions=streams, setsid=True))
    except OSError as error:
        raise HostError(f"cannot start {command[0]}: {error.strerror}", "check memory and process limits") from None
    finally:
        for fd in inherited:
            os.set_inheritable(fd, False)
        os.umask(mask)
        os.close(log_fd)


def last_words(log: str) -> str:
    """The last line of a log, for an error message; empty if there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.path.getsize(log) - 4096))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip()[:300] if lines else ""


def service_manager_prefix(runtime: str, membership: str = "/proc/self/cgroup") -> list[str]:
    """The command line to put before the daemon's, if a systemd mount unit (fstab) starts it: it gives the daemon a
    unit of its own. In the mount unit's control group the daemon would be killed when that one mount is unmounted,
    under all others. `membership`: cgroups(7), /proc/PID/cgroup."""
    try:
        with open(membership, encoding="ascii", errors="replace") as file:
            in_mount_unit = any(line.rstrip().endswith(".mount") for line in file)
    except OSError:
        return []
    if not in_mount_unit or os.geteuid() != 0:
        return []
    runner = find_program("systemd-run", "/usr/bin:/bin")
    if runner is None:
        return []
    # --scope runs the command as our child, with our output, in a control group of its own.
    unit = f"--unit=lazyfs-{os.path.basename(runtime)}-{os.getpid()}"
    return [runner, "--quiet", "--collect", "--scope", unit, "--property=DefaultDependencies=no", "--"]


def connect_or_start(cache: str, runtime: str) -> Connection:
    """A connection to the daemon of `cache`, which is started if nobody listens. Raises HostError."""
    path = rundir.control_socket(runtime)
    try:
        return Connection.open(path)
    except DaemonGone:
        pass
    log = rundir.log_file(runtime)
    command = python_command("lazyfs.daemon.keeper", "--cache", cache, "--runtime", runtime)
    prefix = service_manager_prefix(runtime)
    deadline = time.monotonic() + START_DEADLINE_S
    keeper = _spawn(prefix + command, log)
    pause_s = 0.002
    while time.monotonic() < deadline:
        try:
            connection = Connection.open(path)
        except DaemonGone:
            pass
        else:
            return connection
        status = keeper.poll()
        if status and prefix:  # the service manager failed: better a daemon in this control group than none
            prefix = []
            keeper = _spawn(command, log)
        elif status:
            raise StartError(
                f"the daemon did not start: {last_words(log) or f'exit code {status}'}", f"see {log}"
            )
        elif status == 0:
            # Another keeper holds the lock. It is about to listen, or about to end and free the lock.
            time.sleep(0.05)
            keeper = _spawn(prefix + command, log)
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.05)
    keeper.end()
    raise StartError(f"the daemon does not listen at {path} after {START_DEADLINE_S:g} s", f"see {log}")


def start_fuse_process(
    cache: str, runtime: str, image: str, target: str
) -> tuple[Connection, Child]:
    """A ``lazyfs.daemon.fuseworker`` process that waits for its "fuse_mount" request on the returned connection. Image
    and target are on its command line for ps only. It ends if the connection is closed before the mount was reported
    as attached. Raises HostError."""
    ours, theirs = pair()
    try:
        words = ("--cache", cache, "--runtime", runtime, "--status-fd", str(theirs.fileno()), "--", image, target)
        command = python_command("lazyfs.daemon.fuseworker", *words)
        process = _spawn(command, rundir.log_file(runtime), (theirs.fileno(),))
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return Connection(ours), process
