"""A container in the foreground: mount, bundle, runc, and clean up, whatever happens.

Without `remove` the container's directory (store.py) stays with what it wrote, and the user is told where it is.
"""

from __future__ import annotations

import os
import termios

from lazyfs.containers.bundle import BundleOptions, make_bundle
from lazyfs.containers.runc import GRACE_S, HeldSignals, Runc
from lazyfs.containers.spec import SpecOptions
from lazyfs.containers.store import checked_name, default_directory
from lazyfs.errors import LazyfsError, UserError
from lazyfs.mounting.options import MountOptions
from lazyfs.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from types import FrameType

    from lazyfs.containers.bundle import Bundle, RootProvider
    from lazyfs.containers.runc import Start
    from lazyfs.containers.store import Claim, ContainerStore
else:
    import _signal as signal  # what `signal` makes enumerations of, which takes 5 ms


class RunRequest(NamedTuple):
    """A container that is asked for. `mount`: options of its root. `name`: also the default of the host name; None: a
    new one. `remove`: deletes its files when it ends. `interactive`: it gets this process's standard input, as it does
    with a terminal; else none. `grace_s`: from a signal to end until it is killed."""

    image: str
    spec: SpecOptions = SpecOptions()
    user: str | None = None
    mount: MountOptions = MountOptions()
    name: str | None = None
    remove: bool = False
    interactive: bool = False
    grace_s: float = GRACE_S


def run(
    request: RunRequest,
    store: ContainerStore,
    roots: RootProvider,
    say: Callable[[str], None],
    start: Start | None = None,
) -> int:
    """Runs it, watched by `start`, and returns the exit status: the container's; 128 + the signal that ended it, or
    this process; 125 if runc could not start it, 126 or 127 if its command cannot be executed or found (runc has said
    why).

    Raises LazyfsError if it was not run at all. On return the container is gone and its root unmounted, in every case.
    `say` gets lines for the user.
    """
    spec = request.spec
    if spec.terminal and not any(os.isatty(fd) for fd in (0, 1, 2)):
        raise UserError("-t needs a terminal, and there is none", "leave it out")
    runc = Runc(_runc_state())
    if request.name is not None and runc.exists(checked_name(request.name)):
        raise UserError(
            f"runc already has a container {request.name}",
            f"choose another name, or: runc delete {request.name}",
        )
    with store.create(request.name) as claim:
        options = BundleOptions(
            spec._replace(hostname=spec.hostname or claim.name), request.user, request.mount, not request.remove
        )
        return _run_claimed(claim, request, options, runc, roots, say, start)


def _run_claimed(
    claim: Claim,
    request: RunRequest,
    options: BundleOptions,
    runc: Runc,
    roots: RootProvider,
    say: Callable[[str], None],
    start: Start | None,
) -> int:
    started = False
    with HeldSignals() as watched, _RestoredTerminal():
        try:
            made = _prepared(claim, request, options, roots, watched)
            for note in made.notes:
                say(note)
            take_input = request.interactive or request.spec.terminal
            ended = runc.run(
                claim.directory, claim.name, made.stop_signal, request.grace_s, watched, start, take_input=take_input
            )
            status, started = ended.status, ended.started
        except _Interrupted as interrupted:
            status = 128 + interrupted.number
        finally:
            _clean_up(runc, claim, roots, keep=started and not request.remove, say=say)
    return status


def _prepared(
    claim: Claim, request: RunRequest, options: BundleOptions, roots: RootProvider, watched: frozenset[int]
) -> Bundle:
    """The container's bundle. As long as it is made, the signals that `HeldSignals` holds come as _Interrupted."""
    before = {number: signal.signal(number, _interrupt) for number in watched}
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        if os.listdir(claim.directory):  # a killed process left it
            roots.detach(os.path.join(claim.directory, "rootfs"))
            claim.clear(keep_itself=True)
        return make_bundle(
            request.image,
            claim.directory,
            options,
            roots,
            lambda image: claim.record(image, keep=not request.remove),
        )
    finally:
        try:  # in no function of its own: one that is called begins by delivering signals
            signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _clean_up(runc: Runc, claim: Claim, roots: RootProvider, keep: bool, say: Callable[[str], None]) -> None:
    """Each step has its deadline. A failure is only reported, because the container's status is the result."""
    try:
        runc.delete(claim.name)
        roots.detach(os.path.join(claim.directory, "rootfs"))
        if not keep:
            claim.clear()
    except LazyfsError as error:
        say(f"clean-up is incomplete: {error}")
    if keep:
        say(f"the container's files are kept in {claim.directory}; remove them with: rm -r {claim.directory}")


def remove(name: str, store: ContainerStore, roots: RootProvider) -> None:
    """Ends the container of a process that was killed, and deletes it with all that it wrote. No error if there is no
    such container. Raises HostError."""
    runc = Runc(_runc_state())
    directory = os.path.join(store.directory, checked_name(name))
    runc.delete(name)
    runc.kill_bundle(directory)  # it may have been about to make the container
    runc.delete(name)
    roots.detach(os.path.join(directory, "rootfs"))
    if os.path.exists(directory):
        store.remove(name)


def _runc_state() -> str:
    """runc's own default where it has one, so that plain `runc list` and `runc exec` know our containers."""
    if os.geteuid() == 0:
        return "/run/runc"
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    return os.path.join(session if session.startswith("/") else default_directory() + "-state", "runc")


# -- signals and terminal --------------------------------------------------------------------------------


class _Interrupted(BaseException):
    """A signal came while the container was being prepared."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _interrupt(number: int, _: FrameType | None) -> None:
    raise _Interrupted(number)


class _RestoredTerminal:
    """A context manager that puts the terminal's settings back, should runc be killed while they are raw."""

    def __enter__(self) -> None:
        try:
            self._before = termios.tcgetattr(0)
        except termios.error:
            self._before = []  # there is no terminal

    def __exit__(self, *_: object) -> None:
        try:
            if self._before and os.tcgetpgrp(0) == os.getpgrp():  # a background process would be stopped
                termios.tcsetattr(0, termios.TCSADRAIN, self._before)
        except (OSError, termios.error):
            pass  # it has gone
