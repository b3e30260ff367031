"""`lazyfs run` and `lazyfs bundle`: mount, bundle, runc, and clean up, whatever happens.

A container's files lie in a directory of its own, its name reserved by making it:

    root: /var/lib/lazyfs/containers/NAME     others: ${XDG_STATE_HOME:-~/.local/state}/lazyfs/containers/NAME

Without --rm the directory stays, with what the container wrote, and its place is said.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from lazyfs.containers.bundle import BundleOptions, RootProvider, delete_bundle, make_bundle
from lazyfs.containers.runc import GRACE_S, Runc, checked_stop_signal, held_signals
from lazyfs.containers.spec import SpecOptions
from lazyfs.containers.specmounts import Mount, distinct_mounts, parse_bind, parse_tmpfs
from lazyfs.errors import HostError, LazyfsError, UserError
from lazyfs.mounting import options as mount_options
from lazyfs.mounting.lease import Reporter
from lazyfs.mounting.options import MountOptions

if TYPE_CHECKING:
    from lazyfs.indexing.missing import Bars

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,62}\Z", re.ASCII)
"""What runc accepts, and what is a file name and (with its length) a host name."""


def add_bundle_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `lazyfs bundle`: IMAGE DIR [CMD...] and those that describe the container."""
    _add_container_arguments(parser)
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("directory", metavar="DIR", help="made, or empty")
    parser.add_argument(
        "command", metavar="CMD", nargs=argparse.REMAINDER, help="instead of the image's command"
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `lazyfs run`: IMAGE [CMD...] and those that describe the container."""
    _add_container_arguments(parser)
    parser.add_argument("--rm", action="store_true", help="remove all that the container wrote when it ends")
    parser.add_argument("--name", help="of the container (default: a new one)")
    parser.add_argument(
        "-i", "--interactive", action="store_true", help="accepted; standard input is passed on anyway"
    )
    parser.add_argument(
        "--stop-timeout",
        type=float,
        default=GRACE_S,
        metavar="SECONDS",
        help="from a signal to end until the container is killed (default: %(default)s)",
    )
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument(
        "command", metavar="CMD", nargs=argparse.REMAINDER, help="instead of the image's command"
    )


def _add_container_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-t", "--tty", action="store_true", help="the container gets a terminal")
    parser.add_argument("-e", "--env", action="append", default=[], metavar="NAME[=VALUE]")
    parser.add_argument(
        "-v", "--volume", action="append", default=[], metavar="SOURCE:DIR[:OPTIONS]", help="a bind mount"
    )
    parser.add_argument("--tmpfs", action="append", default=[], metavar="DIR[:OPTIONS]")
    parser.add_argument("--read-only", action="store_true", help="the container cannot write to its root")
    parser.add_argument(
        "-o", "--options", action="append", default=[], metavar="OPTIONS", help="of the mount"
    )
    parser.add_argument("-w", "--workdir", default="", metavar="DIR", help="instead of the image's")
    parser.add_argument("-u", "--user", metavar="USER[:GROUP]", help="instead of the image's")
    parser.add_argument("--entrypoint", metavar="PROGRAM", help="instead of the image's; its CMD is dropped")
    parser.add_argument("--hostname", help="(default: the container's name)")


# -- commands --------------------------------------------------------------------------------------------


def bundle(args: argparse.Namespace, roots: RootProvider | None = None, bars: Bars | None = None) -> int:
    """`lazyfs bundle`: the bundle stays, mounted. Raises LazyfsError, with nothing left behind."""
    made = make_bundle(
        args.image, args.directory, container_options(args, "lazyfs", True), roots or _lazy_roots(bars)
    )
    for note in made.notes:
        _say(note)
    print(made.directory)
    _say(f"run it with: runc run --bundle {made.directory} NAME; end it with: lazyfs umount {made.rootfs}")
    return 0


def run(args: argparse.Namespace, roots: RootProvider | None = None, bars: Bars | None = None) -> int:
    """`lazyfs run`: the exit status is the container's; 128 + the signal that ended it, or ended us;
    125 if runc could not start it, 126 or 127 if its command cannot be executed or found (runc has said why).

    Raises LazyfsError if it was not run at all. In every case the container is gone and its root unmounted on
    return; `roots` is for tests of containers without images.
    """
    roots = roots or _lazy_roots(bars)
    name = _checked_name(args.name)
    options = container_options(args, name, keep_upper=not args.rm)
    if options.spec.terminal and not any(os.isatty(fd) for fd in (0, 1, 2)):
        raise UserError("-t needs a terminal, and there is none", "leave it out")
    runc = Runc(_runc_state())
    if runc.exists(name):
        raise UserError(
            f"runc already has a container {name}", f"choose another name, or: runc delete {name}"
        )
    directory = _claim(name)
    started = False
    with held_signals() as watched, _restored_terminal():
        try:
            with _delivered(watched):
                made = make_bundle(args.image, directory, options, roots)
            for note in made.notes:
                _say(note)
            stop_signal = checked_stop_signal(made.stop_signal)
            status, started = runc.run(directory, name, stop_signal, args.stop_timeout, watched)
        except _Interrupted as interrupted:
            status = 128 + interrupted.number
        finally:
            _clean_up(runc, name, directory, roots, keep=started and not args.rm)
    return status


def _lazy_roots(bars: Bars | None) -> RootProvider:
    from lazyfs.containers.roots import MountedRoots

    return MountedRoots(Reporter(_say, bars))


def _say(text: str) -> None:
    print(f"lazyfs: {text}", file=sys.stderr, flush=True)


def _clean_up(runc: Runc, name: str, directory: str, roots: RootProvider, keep: bool) -> None:
    """Each step has its deadline. What fails is said, since the container's status is the result."""
    try:
        runc.delete(name)
        roots.detach(os.path.join(directory, "rootfs"))
        if not keep:
            delete_bundle(directory)
    except LazyfsError as error:
        _say(f"clean-up is incomplete: {error}")
    if keep:
        _say(f"the container's files are kept in {directory}; remove them with: rm -r {directory}")


# -- arguments -------------------------------------------------------------------------------------------


def container_options(args: argparse.Namespace, hostname: str, keep_upper: bool) -> BundleOptions:
    """What `add_run_arguments` or `add_bundle_arguments` parsed, checked. Raises UserError."""
    wanted = [_bind(text) for text in args.volume] + [parse_tmpfs(text) for text in args.tmpfs]
    environment = []
    for setting in args.env:
        if "=" in setting:
            environment.append(setting)
        elif setting in os.environ:  # -e NAME: as it is here, if it is
            environment.append(f"{setting}={os.environ[setting]}")
    spec = SpecOptions(
        command=tuple(args.command),
        entrypoint=None if args.entrypoint is None else (args.entrypoint,) if args.entrypoint else (),
        env=tuple(environment),
        cwd=args.workdir,
        hostname=args.hostname or hostname,
        terminal=args.tty,
        terminal_size=_terminal_size() if args.tty else None,
        read_only=args.read_only,
        mounts=distinct_mounts(wanted),
    )
    # A container needs its devices and set-id programs; only root may give them.
    root = os.geteuid() == 0
    base = MountOptions(writable=root, dev=root, suid=root)
    return BundleOptions(spec, args.user, mount_options.parse(args.options, base), keep_upper)


def _terminal_size() -> tuple[int, int] | None:
    for fd in (0, 1, 2):
        with contextlib.suppress(OSError):
            columns, lines = os.get_terminal_size(fd)
            return columns, lines
    return None


def _bind(text: str) -> Mount:
    if text.startswith((".", "~")):
        source, colon, rest = text.partition(":")
        text = os.path.abspath(os.path.expanduser(source)) + colon + rest
    mount = parse_bind(text)
    if not os.path.exists(mount.source):
        raise UserError(f"-v {text}: {mount.source} does not exist", "make it first")
    return mount


def _checked_name(name: str | None) -> str:
    if name is None:
        return f"lazyfs-{os.urandom(4).hex()}"
    if not _NAME.match(name):
        raise UserError(
            f"the name {name[:80]!r} cannot be a container's", "use letters, digits, and _ . + - inside"
        )
    return name


# -- places ----------------------------------------------------------------------------------------------


def containers_directory() -> str:
    """Where containers' directories lie."""
    if os.geteuid() == 0:
        return "/var/lib/lazyfs/containers"
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "lazyfs", "containers")


def _claim(name: str) -> str:
    """Makes the container's directory, 0700: its name is taken by that."""
    directory = os.path.join(containers_directory(), name)
    try:
        os.makedirs(os.path.dirname(directory), mode=0o700, exist_ok=True)
        os.mkdir(directory, 0o700)
    except FileExistsError:
        raise UserError(f"there is a container {name} already: {directory}", "choose another name") from None
    except OSError as error:
        raise HostError(f"cannot make {directory}: {error.strerror}") from None
    return directory


def _runc_state() -> str:
    """runc's own default where it has one, so that plain `runc list` and `runc exec` know our containers."""
    if os.geteuid() == 0:
        return "/run/runc"
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    return os.path.join(session if session.startswith("/") else containers_directory() + "-state", "runc")


# -- signals and terminal --------------------------------------------------------------------------------


class _Interrupted(BaseException):
    """A signal came while the container was being prepared."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _interrupt(number: int, _: FrameType | None) -> None:
    raise _Interrupted(number)


@contextmanager
def _delivered(watched: frozenset[int]) -> Iterator[None]:
    """Inside `held_signals`: lets the signals through again, as _Interrupted."""
    before = {number: signal.signal(number, _interrupt) for number in watched}
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        yield
    finally:
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _restored_terminal() -> Iterator[None]:
    """Puts the terminal's settings back, should runc be killed while they are raw."""
    try:
        before = termios.tcgetattr(0)
    except termios.error:
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError, termios.error):
            if os.tcgetpgrp(0) == os.getpgrp():  # a background process would be stopped
                termios.tcsetattr(0, termios.TCSADRAIN, before)
