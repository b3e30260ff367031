"""The `lazyfs` command. Each subcommand imports what it needs when it runs, so that `mount` stays quick."""

from __future__ import annotations

import os
import sys

from lazyfs.errors import HostError, LazyfsError, UserError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say
EXIT_BUG = 4  # mount(8): "internal mount bug"
# Of commands whose other exit codes are those of what they run: docker-run(1), "Exit Status".
_OWN_FAILURES = {"run": 125}


def program() -> None:
    """The command `lazyfs`: its words are this process's, which ends here."""
    from lazyfs.commands.end import end
    from lazyfs.system import startup

    startup.command()
    end(main(sys.argv[1:]))


def main(words: Sequence[str]) -> int:
    """Runs one command and returns its exit code; every failure is one line on standard error."""
    own_failure = _OWN_FAILURES.get(words[0] if words else "", 0)
    try:
        return _dispatch(list(words))
    except LazyfsError as error:
        return _fail(str(error), own_failure or error.exit_code)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has gone (`lazyfs ls | head`). Python would report it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        text = f"{error.filename or 'system call'}: {error.strerror or error}"
        return _fail(text, own_failure or HostError.exit_code)
    except MemoryError:
        return _fail("out of memory", own_failure or HostError.exit_code)
    except Exception as error:
        if os.environ.get("LAZYFS_DEBUG"):
            raise
        return _fail(
            f"bug: {type(error).__name__}: {error} (LAZYFS_DEBUG=1 shows where; please report it)",
            own_failure or EXIT_BUG,
        )


def _fail(text: str, code: int) -> int:
    line = " ".join(text.split())
    print(f"lazyfs: {line}", file=sys.stderr)
    return code


def _dispatch(words: list[str]) -> int:
    from lazyfs.commands import usual

    args = usual.parse(words) or _parsed(words)
    if args.version:
        print(f"lazyfs {_version()}")
        return 0
    if args.subcommand is None:
        from lazyfs.commands.arguments import parser

        parser().print_help()
        return 1
    if hasattr(args, "option_texts"):
        from lazyfs.mounting.options import parse

        args.options = parse(args.option_texts, sloppy=getattr(args, "sloppy", False))
    code = _COMMANDS[args.subcommand](args)
    sys.stdout.flush()  # here, so that a closed pipe is noticed inside main()
    return code


def _parsed(words: list[str]) -> argparse.Namespace:
    from lazyfs.commands.arguments import parser

    command: list[str] = []
    if words[:1] == ["analyze"] and "--" in words:
        cut = words.index("--")
        words, command = words[:cut], words[cut + 1 :]
    args = parser(words).parse_args(words)
    if args.subcommand == "analyze":
        args.command = command
    return args


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lazyfs")
    except PackageNotFoundError:
        return "(source tree)"


def _mount(args: argparse.Namespace) -> int:
    from lazyfs.commands.mount import mount

    return mount(args)


def _umount(args: argparse.Namespace) -> int:
    from lazyfs.commands.mount import umount

    return umount(args)


def _stats(args: argparse.Namespace) -> int:
    from lazyfs.commands.status import stats

    return stats(args)


def _ls(args: argparse.Namespace) -> int:
    from lazyfs.commands.status import ls

    return ls(args)


def _daemon(args: argparse.Namespace) -> int:
    from lazyfs.commands.status import daemon

    return daemon(args)


def _index(args: argparse.Namespace) -> int:
    from lazyfs.system import startup

    startup.begin()  # it imports as much as a daemon; the collector begins once all is imported
    from lazyfs.commands.index import index

    return int(index(args))


def _record(args: argparse.Namespace) -> int:
    from lazyfs.commands.record import record

    return record(args)


def _inspect(args: argparse.Namespace) -> int:
    from lazyfs.commands.inspect import inspect

    return int(inspect(args))


def _analyze(args: argparse.Namespace) -> int:
    from lazyfs.commands.analyze import analyze

    return int(analyze(args))


def _profile(args: argparse.Namespace) -> int:
    from lazyfs.commands.profile import profile

    return int(profile(args))


def _cache(args: argparse.Namespace) -> int:
    from lazyfs.commands.cache import cache

    if args.action == "gc" and args.max_size_bytes is None:
        raise UserError("cache gc needs --max-size", "lazyfs cache gc --max-size 20G")
    return int(cache(args))


def _bundle(args: argparse.Namespace) -> int:
    from lazyfs.commands.containers import bundle

    return bundle(args)


def _run(args: argparse.Namespace) -> int:
    from lazyfs.commands.containers import run

    return run(args)


def _doctor(args: argparse.Namespace) -> int:
    from lazyfs.commands import doctor, report
    from lazyfs.commands.report import print_json

    checks = doctor.examine(args.cache)
    if args.json:
        print_json([check._asdict() for check in checks])
    else:
        for check in checks:
            status = report.coloured(check.status, sys.stdout)
            print(f"{status}  {check.name}: {report.printable(check.finding)}")
            if check.advice:
                print(f"      -> {report.printable(check.advice)}")
    return 1 if any(check.status == "fail" for check in checks) else 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "mount": _mount,
    "umount": _umount,
    "index": _index,
    "record": _record,
    "inspect": _inspect,
    "analyze": _analyze,
    "profile": _profile,
    "cache": _cache,
    "bundle": _bundle,
    "run": _run,
    "stats": _stats,
    "ls": _ls,
    "doctor": _doctor,
    "daemon": _daemon,
}


if __name__ == "__main__":
    program()
