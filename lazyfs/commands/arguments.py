"""The command line of `lazyfs`: one parser per subcommand, with help that teaches by examples."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

from lazyfs.errors import UserError
from lazyfs.mounting.options import help_text

_SIZES = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}

_IMAGE = "image: NAME[:TAG][@DIGEST], oci:DIR[:TAG], oci+https://HOST/PATH[:TAG]"


class _Add(Protocol):
    def __call__(
        self, name: str, summary: str, examples: str = "", *, description: str = "", more: str = ""
    ) -> argparse.ArgumentParser: ...


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' lines. It finds the width itself, because argparse would import shutil, which takes 3 ms in
    every command: argparse makes a formatter for each argument."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_width() - 2)


def _width() -> int:
    try:
        return int(os.environ["COLUMNS"]) or 80
    except (KeyError, ValueError):
        pass
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


class Parser(argparse.ArgumentParser):
    """Raises UserError (exit code 1, as mount(8)) in place of printing the usage and exiting with 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"`{self.prog} --help` explains")


def size(text: str) -> int:
    """Bytes: 500M, 20G (decimal), 20Gi (binary). Raises ArgumentTypeError."""
    digits = text.rstrip("kKmMgGtTiIbB")
    unit = text[len(digits) :].lower().removesuffix("b")
    try:
        value = float(digits) * _SIZES[unit]
    except (ValueError, KeyError):
        value = -1.0
    if not 0 <= value <= 2**62:  # false for nan, too
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 500M, 20G or 20Gi")
    return int(value)


def parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser for `words`: of the whole program, or, if the first word is a subcommand, of that alone, because
    setting up all of them takes longer than parsing. The parsed namespace has `subcommand`, and for most subcommands
    that take an image the list `option_texts`."""
    top = Parser(
        prog="lazyfs",
        formatter_class=Help,
        description="Mounts container images at once and fetches only what is read.",
        epilog="""examples:
  lazyfs index registry.example/app:1 --push        once per image: makes mounting it fast everywhere
  lazyfs record registry.example/app:1 --push       what a start needs, for the next ones everywhere
  lazyfs mount registry.example/app:1 /mnt          read-only root of the image
  lazyfs run --rm -it debian:12 bash                a container of it, by runc
  lazyfs umount /mnt
  lazyfs doctor                                     what this host can do""",
    )
    top.add_argument("--version", action="store_true", help="print the version and exit")
    commands = top.add_subparsers(dest="subcommand", metavar="COMMAND", parser_class=Parser)

    def add(
        name: str, summary: str, examples: str = "", *, description: str = "", more: str = ""
    ) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=description or summary[0].upper() + summary[1:] + ".",
            epilog=(f"examples:\n{examples}" if examples else "") + more,
            formatter_class=Help,
        )

    wanted = words[0] if words else ""
    for define in [_DEFINITIONS[wanted]] if wanted in _DEFINITIONS else _DEFINITIONS.values():
        define(add)
    return top


def _mount_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-o", dest="option_texts", action="append", default=[], metavar="OPTIONS", help="mount options"
    )


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


def _about_an_image(command: argparse.ArgumentParser) -> None:
    """The arguments of commands that look at an image without mounting it."""
    command.add_argument("image", metavar="IMAGE", help=_IMAGE)
    _mount_options(command)
    _json(command)


def _cache_directory(command: argparse.ArgumentParser, what: str = "the cache directory") -> None:
    command.add_argument("--cache", metavar="DIR", help=what)


def _mount(add: _Add) -> None:
    mount = add(
        "mount",
        "mount an image's root file system",
        "  lazyfs mount debian:12 /mnt\n"
        "  lazyfs mount -o rw,upperdir=/srv/up,workdir=/srv/work registry.example/app:1 /mnt\n"
        "  lazyfs mount -o backend=fuse oci:layout:app ~/root\n"
        "  mount -t lazyfs debian:12 /mnt -o ephemeral\n"
        "  fstab: debian:12 /mnt lazyfs _netdev,nofail,x-systemd.automount 0 0\n\n",
        more=help_text(),
        description="Mounts an image's root file system, and returns when it is usable.",
    )
    mount.add_argument("image", metavar="IMAGE", help=_IMAGE)
    mount.add_argument("target", metavar="TARGET", help="an existing directory")
    _mount_options(mount)
    mount.add_argument("-s", "--sloppy", action="store_true", help="ignore unknown mount options")
    mount.add_argument("-v", "--verbose", action="store_true", help="say what is done")
    mount.add_argument(
        "--push-index",
        action="store_true",
        help="if an index must be built, attach it to the image, or in the first index_repository=",
    )


def _umount(add: _Add) -> None:
    umount = add("umount", "unmount it", "  lazyfs umount /mnt\n  lazyfs umount --wait /mnt\n")
    umount.add_argument("target", metavar="TARGET", help="a mount point")
    umount.add_argument(
        "-l", "--lazy", action="store_true", help="detach it now, end it when nobody uses it any more"
    )
    umount.add_argument("--wait", action="store_true", help="return when the daemon has let go of it")


def _bundle(add: _Add) -> None:
    from lazyfs.commands.containers import add_bundle_arguments

    bundle = add(
        "bundle",
        "make a runc bundle of an image",
        "  lazyfs bundle debian:12 /srv/bundle && runc run --bundle /srv/bundle c1\n\n",
        more=help_text(),
    )
    add_bundle_arguments(bundle)


def _run(add: _Add) -> None:
    from lazyfs.commands.containers import add_run_arguments

    run = add(
        "run",
        "run a command in a container of an image",
        "  lazyfs run --rm -it debian:12 bash\n"
        "  lazyfs run --rm -v /data:/data:ro -e LANG=C python:3 python3 /data/x.py\n\n",
        description="Mounts the image, makes a bundle, runs it by runc and cleans up. Ends with the exit\n"
        "code of the container's command.",
        more=help_text(),
    )
    add_run_arguments(run)


def _index(add: _Add) -> None:
    index = add(
        "index",
        "build the index of an image, and attach it in the registry",
        "  lazyfs index registry.example/app:1 --push\n"
        "  lazyfs index python:3 --push-to registry.example/indexes\n"
        "  lazyfs index oci:layout:app --output /tmp/index\n",
    )
    index.add_argument("--push", action="store_true", help="attach it to the image, in the image's registry")
    index.add_argument(
        "--push-to",
        metavar="REPO",
        help="attach it in an index repository (as index_repository= of mount)",
    )
    index.add_argument("--output", metavar="DIR", help="write it to DIR")
    _about_an_image(index)


def _record(add: _Add) -> None:
    from lazyfs.commands.containers import add_record_arguments

    record = add(
        "record",
        "record a start of an image, and attach what it needs as a startup pack",
        "  lazyfs record --push registry.example/app:1                    runs its command to the end\n"
        "  lazyfs record --push --until-http http://127.0.0.1:8080/ registry.example/web:1\n"
        "  lazyfs record --push-to registry.example/indexes --until-line 'ready to accept' postgres:17\n"
        "  lazyfs record --seconds 10 --output /srv/packs -e MODE=test oci:layout:app start-app --quick\n\n",
        description="Runs a container of the image until it is ready, ends it, and makes a startup pack of all\n"
        "that was read until then: at the next mounts that comes in a few large requests, beside the\n"
        "index. What earlier starts on this host and the pack that is attached already tell is merged:\n"
        "record each command that matters. The image is not changed, and nothing of the container is\n"
        "kept. What it writes goes to standard error.",
        more="Without --push, --push-to and --output this host alone knows what the start needs.\n\n" + help_text(),
    )
    until = record.add_mutually_exclusive_group()
    until.add_argument(
        "--until-exit", action="store_true", help="it is ready when its command has ended well (default)"
    )
    until.add_argument("--until-line", metavar="TEXT", help="... when it writes a line with this text")
    until.add_argument(
        "--until-http",
        metavar="URL",
        help="... when this answers a GET with a status below 400; its network is this host's",
    )
    until.add_argument(
        "--until-port", type=int, metavar="N", help="... when it takes connections at this TCP port"
    )
    until.add_argument("--seconds", type=float, metavar="N", help="... so many seconds after its start")
    record.add_argument(
        "--timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="give up if it is not ready so long after its start (default: %(default)g)",
    )
    record.add_argument("--push", action="store_true", help="attach the pack to the image, in its registry")
    record.add_argument(
        "--push-to", metavar="REPO", help="attach it in an index repository (as index_repository= of mount)"
    )
    record.add_argument("--output", metavar="DIR", help="attach it in the layout DIR: an index repository, too")
    record.add_argument(
        "--max-pack",
        type=size,
        metavar="SIZE",
        dest="max_pack_bytes",
        help="the most that the pack may take: 50M (what is needed last is left out)",
    )
    _json(record)
    add_record_arguments(record)


def _inspect(add: _Add) -> None:
    inspect = add(
        "inspect",
        "show an image's layers and sizes, and whether it has an index",
        "  lazyfs inspect debian:12\n",
    )
    _about_an_image(inspect)


def _analyze(add: _Add) -> None:
    analyze = add(
        "analyze",
        "show where an image's data lies, what a start reads, and what is cached already",
        "  lazyfs analyze debian:12\n"
        "  lazyfs analyze --plot layers.png registry.example/app:1 -- python3 -c 'import json'\n\n"
        "A command behind -- is run in a container with an empty cache, which is removed afterwards.\n",
    )
    analyze.usage = "lazyfs analyze [-h] [--plot FILE] [-o OPTIONS] [--json] IMAGE [-- CMD...]"
    analyze.add_argument("--plot", metavar="FILE", help="draw it, too (PNG, SVG or PDF; needs matplotlib)")
    _about_an_image(analyze)


def _profile(add: _Add) -> None:
    profile = add(
        "profile",
        "show which data the starts of an image touched on this host, and when",
        "  lazyfs profile show python:3 | head -30\n"
        "  lazyfs profile show --plot start.png registry.example/app:1\n\n"
        "A start that is being traced counts as over.\n",
    )
    profile.add_argument("action", choices=["show"], help="show: by layer, and by file in the order of need")
    profile.add_argument("--plot", metavar="FILE", help="draw it, too (PNG, SVG or PDF; needs matplotlib)")
    _about_an_image(profile)


def _stats(add: _Add) -> None:
    stats = add(
        "stats",
        "show what a mount has fetched and cached",
        "  lazyfs stats /mnt\n  lazyfs stats /mnt --json | jq .bytes_fetched\n",
    )
    stats.add_argument("target", metavar="TARGET", help="a mount point")
    _json(stats)


def _ls(add: _Add) -> None:
    _json(add("ls", "list the mounts of this user's daemons", "  lazyfs ls\n  lazyfs ls --json\n"))


def _doctor(add: _Add) -> None:
    doctor = add(
        "doctor",
        "check what this host can do, and say what to change",
        "  lazyfs doctor\n  sudo lazyfs doctor\n",
    )
    _json(doctor)
    _cache_directory(doctor, "the cache directory to look at")


def _cache(add: _Add) -> None:
    cache = add(
        "cache",
        "look after the block cache",
        "  lazyfs cache du\n  lazyfs cache gc --max-size 20G\n  lazyfs cache verify\n",
    )
    cache.add_argument(
        "action",
        choices=["du", "verify", "prune", "gc"],
        help="du: what takes the space; verify: check every block; prune: remove what no mount uses, but for "
        "profiles; gc: remove the least recently used until it fits --max-size, profiles last",
    )
    cache.add_argument(
        "--max-size", type=size, metavar="SIZE", dest="max_size_bytes", help="for gc: 500M, 20G, 20Gi"
    )
    _json(cache)
    _cache_directory(cache)


def _daemon(add: _Add) -> None:
    daemon = add(
        "daemon",
        "run a cache's daemon in the foreground, or talk to the running one",
        "  lazyfs daemon                 for a service manager\n"
        "  lazyfs daemon --upgrade       replace the running daemon by a new one; mounts stay\n",
        description="Runs the daemon in the foreground, for a service manager. `lazyfs mount` starts one by\n"
        "itself if none runs.",
    )
    daemon.add_argument(
        "--linger", type=float, metavar="SECONDS", help="stay this long after the last mount is gone"
    )
    act = daemon.add_mutually_exclusive_group()
    act.add_argument("--ping", action="store_true", help="only tell whether it runs")
    act.add_argument(
        "--upgrade", action="store_true", help="hand over to a new process of the installed version"
    )
    act.add_argument("--stop", action="store_true", help="end it, unless something is mounted")
    _cache_directory(daemon)


_DEFINITIONS: dict[str, Callable[[_Add], None]] = {
    "mount": _mount,
    "umount": _umount,
    "bundle": _bundle,
    "run": _run,
    "index": _index,
    "record": _record,
    "inspect": _inspect,
    "analyze": _analyze,
    "profile": _profile,
    "stats": _stats,
    "ls": _ls,
    "doctor": _doctor,
    "cache": _cache,
    "daemon": _daemon,
}
