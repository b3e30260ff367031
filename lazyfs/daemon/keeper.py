"""The process that survives: owns the FUSE connection and restarts the daemon that serves it.

    python -m lazyfs.daemon.keeper --cache DIR --runtime DIR [--linger S] [--worker MODULE] [--foreground]

1. Lock RUNTIME/keeper.lock; exit 0 if another keeper has it.
2. Mount FUSE detached (it is attached nowhere, ever) and answer FUSE_INIT, so that all workers are alike.
3. Listen on RUNTIME/control.sock (0600).
4. Start the worker (``python -P [-S] -m MODULE --cache DIR --runtime DIR [--linger S]``) with those descriptors,
   and keep those that it sends (see keeperlink.py). When the worker dies, start another, which inherits all of them.

It does nothing else, so that little can go wrong and nothing requires replacing it: one thread, no disk, no network,
12 MB resident (6 MB of its own). On SIGHUP the worker drains and is replaced (an upgrade). On SIGTERM (and SIGINT with
--foreground) the worker drains, then both end, and what is still mounted fails. Exit codes: 0 ended, 1 usage, 2 this
host, or a worker that does not start.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import signal
import socket
import sys
import time

from lazyfs.daemon.arguments import parse_arguments
from lazyfs.daemon.handover import (
    ENVIRONMENT,
    EXIT_ENDED,
    EXIT_SUCCESSOR,
    MAX_MESSAGE_BYTES,
    MAX_NAME_BYTES,
    handover,
)
from lazyfs.errors import HostError, LazyfsError
from lazyfs.fuse.wire import WireError, answer_init
from lazyfs.system.detached import fuse_mount_detached
from lazyfs.system.sockets import listen_private, recv_fds

SOCKET_NAME = "control.sock"
LOCK_NAME = "keeper.lock"
DEFAULT_WORKER = "lazyfs.daemon"

QUICK_DEATH_S = 5.0  # a worker that lived longer had started well
QUICK_DEATHS_MAX = 10  # then one start a second
START_FAILURES_MAX = 3  # failed exits in a row, with nothing held: a daemon that cannot start
DRAIN_LIMIT_S = 60.0  # longer than a read's default deadline; then SIGKILL, and the kernel asks the successor again
_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# mallopt(3). By default glibc keeps what many threads freed: 74 MB resident in place of 56. But when a threshold is set
# every piece of 128 KiB is mapped anew and faulted in, unless the other is set, too: a quarter of the CPU of a start.
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_TRIM_THRESHOLD_": str(2 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(8 << 20),
}
# The OOM killer takes the worker, which can be replaced, not the keeper (oom_score_adj, proc(5)).
_OOM_SCORE = b"-900"


def log(text: str) -> None:
    with contextlib.suppress(OSError):  # the log's disk may be full
        print(f"keeper: {text}", file=sys.stderr, flush=True)


def backoff_s(quick_deaths: int) -> float:
    """How long to wait before the next start after so many quick deaths in a row."""
    if quick_deaths > QUICK_DEATHS_MAX:
        return 1.0
    return 0.0 if quick_deaths < 3 else 0.02 * quick_deaths


class Keeper:
    """The descriptors, and the current worker. One thread; `run` is the whole life."""

    def __init__(self, runtime: str, command: list[str]) -> None:
        self._runtime_fd = os.open(runtime, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._command = command
        self._fuse_fd = -1
        self._mount_fd: int | None = None
        self._lock_fd: int | None = None
        self._listener: socket.socket | None = None
        self._held: dict[str, int] = {}
        self._link: socket.socket | None = None
        self._worker = 0  # process id, 0: none
        self._started_s = 0.0
        self._quick_deaths = 0
        self._start_failures = 0
        self._terminating = False
        self._kill_at_s: float | None = None
        self._oom_score: bytes | None = None

    # -- descriptors -------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        """A path that fits a socket address (108 bytes), however long the directory's own path is."""
        return f"/proc/self/fd/{self._runtime_fd}/{name}"

    def lock(self) -> bool:
        """False if another keeper serves this runtime directory."""
        self._lock_fd = os.open(self._path(LOCK_NAME), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def mount(self) -> None:
        """Raises HostError."""
        try:
            self._fuse_fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            message = f"cannot open /dev/fuse: {error.strerror}"
            raise HostError(message, "load the module: modprobe fuse") from None
        self._mount_fd = fuse_mount_detached(self._fuse_fd)
        try:
            answer_init(self._fuse_fd)
        except (OSError, WireError) as error:
            raise HostError(f"FUSE does not start: {error}", "Linux 6.12 or later is needed") from None

    def listen(self) -> None:
        self._listener = listen_private(self._path(SOCKET_NAME))

    def _receive(self, link: socket.socket) -> bool:
        """One message of the worker, if there is one; False at the end of the link."""
        try:
            data_bytes, fds = recv_fds(link, MAX_MESSAGE_BYTES, 1)
        except BlockingIOError:
            return False
        except HostError as error:
            log(f"a descriptor was lost: {error}")
            return True
        except OSError:
            return False
        if not data_bytes:
            return False
        import json  # not before the first worker was started: it takes 8 ms

        try:
            message = json.loads(data_bytes)
            if "hold" in message:
                name = str(message["hold"])
                if len(name.encode()) > MAX_NAME_BYTES:
                    raise ValueError("name too long")
                fd = fds.pop()  # first: if there is none, what is held stays
                self._drop(name)
                self._held[name] = fd
            elif "drop" in message:
                self._drop(str(message["drop"]))
            elif "let_go" in message:
                self._let_go()
        except (ValueError, TypeError, IndexError) as error:
            log(f"the worker sent nonsense: {error}")
        for fd in fds:
            os.close(fd)
        return True

    def _drop(self, name: str) -> None:
        fd = self._held.pop(name, None)
        if fd is not None:
            os.close(fd)

    def _let_go(self) -> None:
        """Frees the path and the lock for another keeper. It unlinks first and unlocks last, because a new keeper binds
        after that. It unlocks explicitly, because the worker shares the lock."""
        if self._listener is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(SOCKET_NAME))
            self._listener.close()
            self._listener = None
        for name in list(self._held):
            self._drop(name)
        if self._mount_fd is not None:
            os.close(self._mount_fd)
            self._mount_fd = None
        if self._lock_fd is not None:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
            os.close(self._lock_fd)
            self._lock_fd = None

    # -- the worker --------------------------------------------------------------------------------------

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        listen_fd = None if self._listener is None else self._listener.fileno()
        numbers = {
            "fuse": self._fuse_fd,
            "mount": self._mount_fd,
            "listen": listen_fd,
            "lock": self._lock_fd,
            "link": theirs.fileno(),
        }
        memory_fd = os.memfd_create("lazyfs-fds", os.MFD_CLOEXEC)
        os.write(memory_fd, handover(numbers, self._held))
        inherited = [memory_fd, self._fuse_fd, theirs.fileno(), *self._held.values()]
        inherited += [fd for fd in (self._mount_fd, listen_fd, self._lock_fd) if fd is not None]
        environment = os.environ | _ALLOCATOR | {ENVIRONMENT: str(memory_fd)}
        self._started_s = time.monotonic()
        self._worker = os.fork()
        if self._worker == 0:
            self._exec(inherited, environment)
        theirs.close()
        os.close(memory_fd)
        if self._link is not None:
            self._link.close()
        self._link = ours
        self._kill_at_s = None
        if self._terminating:  # the signal came between two workers
            self._ask_to_drain()

    def _exec(self, inherited: list[int], environment: dict[str, str]) -> None:
        """In the child: becomes the worker."""
        try:
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            if self._oom_score is not None:
                with contextlib.suppress(OSError):
                    _write_oom_score(self._oom_score)
            for fd in inherited:
                os.set_inheritable(fd, True)
            os.execve(self._command[0], self._command, environment)
        except BaseException as error:
            log(f"cannot start {self._command[0]}: {error}")
        finally:
            os._exit(127)

    def _ask_to_drain(self) -> None:
        if self._worker:
            os.kill(self._worker, signal.SIGTERM)
            self._kill_at_s = time.monotonic() + DRAIN_LIMIT_S

    def _after_death(self, status: int) -> float | None:
        """Seconds until the next start; None: no next one. Raises HostError: it cannot start."""
        code = os.waitstatus_to_exitcode(status)
        if self._terminating or code == EXIT_ENDED:
            return None
        if code == EXIT_SUCCESSOR:
            self._quick_deaths = 0
            return 0.0
        lived_s = time.monotonic() - self._started_s
        how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        log(f"the worker {self._worker} {how} after {lived_s:.1f} s; starting another")
        quick = lived_s < QUICK_DEATH_S
        self._quick_deaths = self._quick_deaths + 1 if quick else 0
        self._start_failures = self._start_failures + 1 if quick and code > 0 else 0
        if self._start_failures >= START_FAILURES_MAX and not self._held and self._listener is not None:
            raise HostError(f"the daemon ends at once, with exit code {code}", "its messages are above")
        return backoff_s(self._quick_deaths)

    # -- the loop ----------------------------------------------------------------------------------------

    def run(self, foreground: bool) -> None:
        """Runs until a worker reports the end of the connection, or until SIGTERM. Raises HostError."""
        self._protect_memory()
        wakeup = self._catch_signals(foreground)
        start_at_s: float | None = 0.0
        try:
            while start_at_s is not None or self._worker:
                if start_at_s is not None and time.monotonic() >= start_at_s:
                    self._start()
                    start_at_s = None
                self._wait(wakeup, start_at_s)
                if self._take_signals(wakeup) and not self._worker:
                    return
                status = self._reap()
                if status is not None:
                    pause_s = self._after_death(status)
                    self._worker = 0
                    start_at_s = None if pause_s is None else time.monotonic() + pause_s
        finally:
            self._let_go()
            os.close(self._fuse_fd)

    def _protect_memory(self) -> None:
        with contextlib.suppress(OSError):
            with open("/proc/self/oom_score_adj", "rb") as file:
                self._oom_score = file.read().strip()
            _write_oom_score(_OOM_SCORE)

    def _catch_signals(self, foreground: bool) -> socket.socket:
        """The socket on which each signal arrives as one byte."""
        wakeup, writer = socket.socketpair()
        wakeup.setblocking(False)
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the parent may block some: `lazyfs run` does
        if not foreground:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return wakeup

    def _wait(self, wakeup: socket.socket, start_at_s: float | None) -> None:
        poller = select.poll()
        poller.register(wakeup, select.POLLIN)
        if self._link is not None:
            poller.register(self._link, select.POLLIN)
        kill_at_s = self._kill_at_s if self._worker else None
        deadlines = [at_s for at_s in (start_at_s, kill_at_s) if at_s is not None]
        timeout_ms = max(0, int((min(deadlines) - time.monotonic()) * 1000) + 1) if deadlines else None
        ready = dict(poller.poll(timeout_ms))
        # Stop watching the link at its end (the worker is dying), or poll returns at once for ever.
        if self._link is not None and self._link.fileno() in ready and not self._receive(self._link):
            self._link.close()
            self._link = None
        if self._worker and self._kill_at_s is not None and time.monotonic() >= self._kill_at_s:
            log(f"the worker {self._worker} has not drained in {DRAIN_LIMIT_S:g} s")
            os.kill(self._worker, signal.SIGKILL)
            self._kill_at_s = None

    def _take_signals(self, wakeup: socket.socket) -> bool:
        """True if the keeper is to end."""
        try:
            numbers = wakeup.recv(256)
        except BlockingIOError:
            return self._terminating
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            self._terminating = True
            self._ask_to_drain()
        elif signal.SIGHUP in numbers:
            self._ask_to_drain()
        return self._terminating

    def _reap(self) -> int | None:
        """The worker's wait status if it has died, after receiving all that it sent; else None."""
        if not self._worker:
            return None
        pid, status = os.waitpid(self._worker, os.WNOHANG)
        if pid == 0:
            return None
        if self._link is not None:
            self._link.setblocking(False)
            while self._receive(self._link):
                pass
        return status


def _write_oom_score(score_bytes: bytes) -> None:
    with open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
        file.write(score_bytes)


def _raise_file_limit() -> None:
    """One descriptor per mounted image is held."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    try:
        options = parse_arguments(arguments)
        os.chdir("/")
        alone = ["-S"] if sys.flags.no_site else []  # as we were started (mounting/launch.py)
        command = [sys.executable, "-P", *alone, "-m", options.get("worker", DEFAULT_WORKER)]
        for name in ("cache", "runtime", "linger"):
            if name in options:
                command += [f"--{name}", options[name]]
        _raise_file_limit()
        try:
            keeper = Keeper(options["runtime"], command)
            if not keeper.lock():
                return 0
            keeper.mount()
            keeper.listen()
        except OSError as error:
            message = f"cannot use {options['runtime']}: {error.strerror}"
            raise HostError(message, "check the directory's rights and the disk") from None
        keeper.run("foreground" in options)
    except LazyfsError as error:
        log(str(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
