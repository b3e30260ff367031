"""One container in the foreground: `runc run`, its signals, its end.

runc passes every signal on to the container, and in a terminal the kernel sends Ctrl-C both to runc and to this
process. So signals are received one by one (sigtimedwait), and passed on only if runc did not get them. SIGTERM means
"stop": the image's stop signal, then, after a grace period, SIGKILL. SIGINT does the same, because the first process of
a container ignores a SIGINT that it does not handle; a second SIGINT kills at once.

What watches a start (Start) has it stopped by a signal of its own to this process's main thread.
"""

from __future__ import annotations

import os
import time

from lazyfs.core import lightjson
from lazyfs.errors import HostError
from lazyfs.records import NamedTuple
from lazyfs.system.process import find_program, process_fds

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol
else:
    import _signal as signal  # what `signal` makes enumerations of, which takes 5 ms

    Protocol = object

GRACE_S = 10.0
_COMMAND_S = 20.0
"""The longest that `runc kill` or `runc delete` may take; they take 20 ms."""

EXIT_NOT_STARTED = 125  # as docker-run(1), "Exit Status"
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)
_STOP = signal.SIGRTMIN  # from a Start: acts as SIGTERM does, but is no interruption
_MAX_LOG_BYTES = 1 << 20


class HeldSignals:
    """A context manager that blocks the signals that would end this process, and gives those to wait for. Signals that
    a parent has set to be ignored (nohup, a shell's background job) stay ignored."""

    def __enter__(self) -> frozenset[int]:
        stopping = (*_STOPPING, *_PASSED_ON)
        self._watched = frozenset(s for s in stopping if signal.getsignal(s) != signal.SIG_IGN)
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, self._watched | {signal.SIGCHLD, _STOP})
        return self._watched

    def __exit__(self, *_: object) -> None:
        while signal.sigtimedwait(self._watched | {signal.SIGCHLD, _STOP}, 0) is not None:
            pass  # came during clean-up: answered by ending
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)


class Ended(NamedTuple):
    """How a container ended: the exit status as a shell would have it, whether its process ever ran, and whether a
    signal to this process asked for the end."""

    status: int
    started: bool
    interrupted: bool = False


class Start(Protocol):
    """Watches a container's start (readiness.py)."""

    def streams(self) -> tuple[int, int, int]:
        """Standard input, output and error for the container, in place of this process's. They stay the Start's."""

    def begun(self, pid: int, stop: Callable[[], None]) -> None:
        """runc runs as `pid`. `stop`, from any thread, ends the container as SIGTERM would."""

    def ended(self, ended: Ended | None) -> None:
        """The last call, after `streams`, whatever happened. None: it is not known how the container ended."""


class Runc:
    """runc with its own directory of container states. Raises HostError if it is not installed."""

    def __init__(self, state_directory: str) -> None:
        """`state_directory`: runc's --root."""
        program = find_program("runc", also="/usr/local/sbin:/usr/sbin:/sbin")
        if program is None:
            raise HostError("runc is not installed", "install the package runc")
        self._program = program
        self._root = state_directory

    def exists(self, name: str) -> bool:
        return os.path.exists(os.path.join(self._root, name))

    def run(
        self,
        bundle: str,
        name: str,
        stop_signal: str,
        grace_s: float,
        watched: frozenset[int],
        start: Start | None = None,
        *,
        take_input: bool = False,
    ) -> Ended:
        """Runs the bundle's container until it ends.

        It has the streams of `start`; without one this process's standard output and error, and its standard input if
        `take_input`. `stop_signal`: as the image has it. Call it in the
        main thread, inside `HeldSignals`, which gives `watched`. After an exception the container may still exist: call
        `delete`.
        """
        log = os.path.join(bundle, "runc.log")
        command = self._command("--log", log, "--log-format", "json", "run", "--bundle", bundle, name)
        if start is None:
            actions = [] if take_input else [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
            return self._ended(self._spawn(command, watched, actions), log, name, stop_signal, grace_s, watched)
        import threading  # here: plain containers need none

        main = threading.get_ident()
        ended = None
        try:
            streams = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(start.streams())]
            pid = self._spawn(command, watched, streams)
            start.begun(pid, lambda: signal.pthread_kill(main, _STOP))
            ended = self._ended(pid, log, name, stop_signal, grace_s, watched)
        finally:
            start.ended(ended)
        return ended

    def _spawn(self, command: list[str], watched: frozenset[int], actions: Sequence[tuple[Any, ...]]) -> int:
        """Starts runc and returns its process id. `actions`: as of posix_spawn, what becomes of descriptors."""
        default = (*watched, signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores the last two
        try:
            return os.posix_spawn(
                self._program, command, os.environ, file_actions=actions, setsigmask=(), setsigdef=default
            )
        except OSError as error:
            raise HostError(f"cannot execute {self._program}: {error.strerror}", "reinstall runc") from None

    def _ended(
        self, pid: int, log: str, name: str, stop_signal: str, grace_s: float, watched: frozenset[int]
    ) -> Ended:
        status, interrupted = self._supervise(pid, name, stop_signal, grace_s, watched)
        failure = _not_started(log) if status == 1 else 0
        return Ended(failure or status, not failure, interrupted)

    def _supervise(
        self, pid: int, name: str, stop_signal: str, grace_s: float, watched: frozenset[int]
    ) -> tuple[int, bool]:
        """The exit status, and whether a signal asked for the end."""
        deadline: float | None = None
        kills = 0
        interrupted = False
        while True:
            wait_s = 3600.0 if deadline is None else max(0.0, deadline - time.monotonic())
            received = signal.sigtimedwait(watched | {signal.SIGCHLD, _STOP}, wait_s)
            ended, wait_status = os.waitpid(pid, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(wait_status)
                return 128 - status if status < 0 else status, interrupted
            if received is None:
                if deadline is not None and time.monotonic() >= deadline:
                    # Kills the container first, then runc if that does not end; `delete` does the rest.
                    if kills or not self.kill(name, "KILL"):
                        os.kill(pid, signal.SIGKILL)
                    kills += 1
                    deadline = time.monotonic() + grace_s
                continue
            number = received.si_signo
            if number == _STOP:
                number = signal.SIGTERM
            elif number in _STOPPING:
                interrupted = True
            from_terminal = received.si_code > 0  # SI_KERNEL: sent to runc as well
            if number != signal.SIGCHLD and not from_terminal:
                wanted = checked_stop_signal(stop_signal) if number == signal.SIGTERM else str(int(number))
                # Not through the running runc, which dies of the signal until it has set up its handlers. If there
                # is no container yet, that is what is wanted.
                if not self.kill(name, wanted):
                    os.kill(pid, number)
            if number in (signal.SIGTERM, signal.SIGINT) or (number == signal.SIGHUP and from_terminal):
                again = deadline is not None
                deadline = time.monotonic() + (0.0 if again else grace_s)

    def kill(self, name: str, signal_name: str) -> bool:
        """Sends a signal to the container's first process; whether that worked."""
        return self._call("kill", name, signal_name) == ""

    def delete(self, name: str) -> None:
        """Ends the container, if it exists, and forgets it. Raises HostError."""
        if not self.exists(name):
            return
        reason = self._call("delete", "--force", name)
        if reason:
            raise HostError(f"cannot delete the container {name}: {reason}", f"runc delete --force {name}")

    def kill_bundle(self, bundle: str) -> None:
        """Ends a runc that still runs a bundle, because the process that started it was killed."""
        import select

        for process_fd in process_fds("--bundle", bundle):
            try:
                signal.pidfd_send_signal(process_fd, signal.SIGKILL)
                select.select([process_fd], [], [], _COMMAND_S)
            finally:
                os.close(process_fd)

    def _command(self, *arguments: str) -> list[str]:
        return [self._program, "--root", self._root, *arguments]

    def _call(self, *arguments: str) -> str:
        """ "" or why it failed."""
        import subprocess  # here, because it takes milliseconds, and few containers must be killed or deleted

        try:
            done = subprocess.run(
                self._command(*arguments), stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMMAND_S
            )
        except subprocess.TimeoutExpired:
            return f"runc {arguments[0]} took longer than {_COMMAND_S:.0f} s"
        if done.returncode == 0:
            return ""
        return done.stderr.decode("utf-8", "replace").strip()[-500:] or f"exit status {done.returncode}"


def _not_started(log: str) -> int:
    """0 if the container's process was started, else the exit status that says why not. runc exits with 1 in either
    case, but when it fails it writes to its log, and has told the user."""
    try:
        with open(log, "rb") as file:
            lines = file.read(_MAX_LOG_BYTES).splitlines()
    except OSError:
        return 0
    for line in lines:
        try:
            message = lightjson.loads(line.decode())["msg"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(message, str) and message.startswith("runc run failed:"):
            if 'exec: "' not in message and "exec /" not in message:
                return EXIT_NOT_STARTED
            return EXIT_NOT_EXECUTABLE if "permission denied" in message else EXIT_NOT_FOUND
    return 0


def checked_stop_signal(text: str) -> str:
    """`text` (the image's StopSignal: "SIGQUIT", "QUIT", "3", "SIGRTMIN+3") as `runc kill` takes it, or
    "TERM" if it is nothing of the kind."""
    from signal import Signals

    name = text.strip().upper()
    if name.isascii() and name.isdecimal() and len(name) <= 2 and 1 <= int(name) <= signal.SIGRTMAX:
        return name
    base, plus, offset = name.removeprefix("SIG").partition("+")
    if base == "RTMIN" and (not plus or (offset.isascii() and offset.isdecimal() and len(offset) <= 2)):
        number = signal.SIGRTMIN + int(offset or 0)
        return str(number) if number <= signal.SIGRTMAX else "TERM"
    known: Sequence[str] = [s.name for s in Signals]
    return base if not plus and f"SIG{base}" in known else "TERM"
