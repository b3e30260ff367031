"""`lazyfs run` and `lazyfs bundle`: their arguments, and what they say."""

from __future__ import annotations

import os
import sys

from lazyfs.containers.bundle import BundleOptions, make_bundle
from lazyfs.containers.runc import GRACE_S
from lazyfs.containers.spec import SpecOptions
from lazyfs.containers.specmounts import Mount, distinct_mounts, parse_bind, parse_tmpfs
from lazyfs.errors import UserError
from lazyfs.mounting import options as mount_options
from lazyfs.mounting.options import MountOptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from lazyfs.commands.bars import LayerBars
    from lazyfs.containers.bundle import RootProvider
    from lazyfs.containers.run import RunRequest


def add_bundle_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `lazyfs bundle`: IMAGE DIR [CMD...] and those that describe the container."""
    _add_container_arguments(parser)
    _add_terminal(parser)
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("directory", metavar="DIR", help="made, or empty")
    _add_command(parser)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `lazyfs run`: IMAGE [CMD...] and those that describe the container."""
    _add_container_arguments(parser)
    _add_terminal(parser)
    parser.add_argument("--rm", action="store_true", help="remove all that the container wrote when it ends")
    parser.add_argument("--name", help="of the container (default: a new one)")
    parser.add_argument("-i", "--interactive", action="store_true", help="it gets standard input, as it does with -t")
    _add_image_and_command(parser)


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """Those arguments of `lazyfs record` that `lazyfs run` has, too."""
    _add_container_arguments(parser)
    _add_image_and_command(parser)
    parser.set_defaults(tty=False)


def _add_image_and_command(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stop-timeout",
        type=float,
        default=GRACE_S,
        metavar="SECONDS",
        help="from a signal to end until the container is killed (default: %(default)s)",
    )
    parser.add_argument("image", metavar="IMAGE")
    _add_command(parser)


def _add_command(parser: argparse.ArgumentParser) -> None:
    remainder = "..."  # argparse.REMAINDER, without its import
    parser.add_argument("command", metavar="CMD", nargs=remainder, help="instead of the image's command")


def _add_terminal(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-t", "--tty", action="store_true", help="the container gets a terminal")


def _add_container_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument(
        "--security-opt", action="append", default=[], metavar="OPTION", help="no-new-privileges"
    )


# -- commands --------------------------------------------------------------------------------------------


def bundle(args: argparse.Namespace, roots: RootProvider | None = None) -> int:
    """`lazyfs bundle`: the bundle stays, mounted. Raises LazyfsError, with nothing left behind."""
    spec = container_spec(args)
    options = BundleOptions(
        spec._replace(hostname=spec.hostname or "lazyfs"), args.user, container_mount(args.options)
    )
    made = make_bundle(args.image, args.directory, options, roots or lazy_roots())
    for note in made.notes:
        say(note)
    print(made.directory)
    say(f"run it with: runc run --bundle {made.directory} NAME; end it with: lazyfs umount {made.rootfs}")
    return 0


def run(args: argparse.Namespace) -> int:
    """`lazyfs run`: the exit code is the container's, or 125 if lazyfs could not run it (main.py)."""
    from lazyfs.containers import run
    from lazyfs.containers.store import ContainerStore

    return run.run(run_request(args), ContainerStore(), lazy_roots(), say)


def lazy_roots() -> RootProvider:
    """Roots that lazyfs mounts, with lines and bars for the user."""
    from lazyfs.containers.roots import MountedRoots
    from lazyfs.mounting.lease import Reporter

    return MountedRoots(Reporter(say, _bars, say))


def _bars() -> LayerBars:
    from lazyfs.commands.bars import layer_bars

    return layer_bars()


def say(text: str) -> None:
    """A line for the user, on standard error."""
    print(f"lazyfs: {text}", file=sys.stderr, flush=True)


# -- what was parsed, as records -------------------------------------------------------------------------


def run_request(args: argparse.Namespace) -> RunRequest:
    """What `add_run_arguments` parsed, checked. Raises UserError."""
    from lazyfs.containers.run import RunRequest

    return RunRequest(
        args.image,
        container_spec(args),
        args.user,
        container_mount(args.options),
        args.name,
        args.rm,
        args.interactive,
        args.stop_timeout,
    )


def container_mount(texts: list[str]) -> MountOptions:
    """The mount options of a container's root. It needs its devices and set-id programs; only root may give them."""
    root = os.geteuid() == 0
    return mount_options.parse(texts, MountOptions(writable=root, dev=root, suid=root))


def container_spec(args: argparse.Namespace) -> SpecOptions:
    """What the arguments of a container ask for. Raises UserError."""
    wanted = [_bind(text) for text in args.volume] + [parse_tmpfs(text) for text in args.tmpfs]
    environment = []
    for setting in args.env:
        if "=" in setting:
            environment.append(setting)
        elif setting in os.environ:  # -e NAME: the value of this process, if there is one
            environment.append(f"{setting}={os.environ[setting]}")
    return SpecOptions(
        command=tuple(args.command),
        entrypoint=None if args.entrypoint is None else (args.entrypoint,) if args.entrypoint else (),
        env=tuple(environment),
        cwd=args.workdir,
        hostname=args.hostname or "",
        terminal=args.tty,
        terminal_size=_terminal_size() if args.tty else None,
        read_only=args.read_only,
        no_new_privileges=_no_new_privileges(args.security_opt),
        mounts=distinct_mounts(wanted),
    )


def _no_new_privileges(texts: list[str]) -> bool:
    asked = False
    for text in texts:
        name, _, value = text.replace("=", ":", 1).partition(":")  # docker takes both
        if name != "no-new-privileges" or value not in ("", "true", "false"):
            raise UserError(f"--security-opt {text!r} is not known", "known: no-new-privileges")
        asked = value != "false"
    return asked


def _terminal_size() -> tuple[int, int] | None:
    for fd in (0, 1, 2):
        try:
            columns, lines = os.get_terminal_size(fd)
            return columns, lines
        except OSError:
            continue
    return None


def _bind(text: str) -> Mount:
    if text.startswith((".", "~")):
        source, colon, rest = text.partition(":")
        text = os.path.abspath(os.path.expanduser(source)) + colon + rest
    mount = parse_bind(text)
    if not os.path.exists(mount.source):
        raise UserError(f"-v {text}: {mount.source} does not exist", "make it first")
    return mount
