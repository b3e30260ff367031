"""The `lazyfs` command. Each subcommand imports what it needs when it runs, so that `mount` stays quick."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lazyfs.errors import HostError, LazyfsError, UserError

if TYPE_CHECKING:
    from lazyfs.mounts import Mounted

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say
EXIT_BUG = 4  # mount(8): "internal mount bug"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; every failure is one line on standard error."""
    if arguments is None:  # as a program, not from one
        from lazyfs import quickstart  # noqa: F401
    try:
        return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except LazyfsError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`lazyfs ls | head`). Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'system call'}: {error.strerror or error}", HostError.exit_code)
    except MemoryError:
        return _fail("out of memory", HostError.exit_code)
    except Exception as error:
        if os.environ.get("LAZYFS_DEBUG"):
            raise
        return _fail(
            f"bug: {type(error).__name__}: {error} (LAZYFS_DEBUG=1 shows where; please report it)", EXIT_BUG
        )


def _fail(text: str, code: int) -> int:
    line = " ".join(text.split())
    print(f"lazyfs: {line}", file=sys.stderr)
    return code


def _dispatch(words: list[str]) -> int:
    from lazyfs.arguments import parser

    command: list[str] = []
    if words[:1] == ["analyze"] and "--" in words:
        cut = words.index("--")
        words, command = words[:cut], words[cut + 1 :]
    top = parser(words)
    args = top.parse_args(words)
    if args.subcommand == "analyze":
        args.command = command
    if args.version:
        print(f"lazyfs {_version()}")
        return 0
    if args.subcommand is None:
        top.print_help()
        return 1
    if hasattr(args, "option_texts"):
        from lazyfs.options import parse

        args.options = parse(args.option_texts, sloppy=getattr(args, "sloppy", False))
    code = _COMMANDS[args.subcommand](args)
    sys.stdout.flush()  # here, so that a closed pipe is noticed inside main()
    return code


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lazyfs")
    except PackageNotFoundError:
        return "(source tree)"


def _mount(args: argparse.Namespace) -> int:
    if args.options.foreground:
        from lazyfs.foreground import hold

        hold(lambda on_attached: _mount_once(args, on_attached))
    else:
        _mount_once(args)
    return 0


def _mount_once(
    args: argparse.Namespace, on_attached: Callable[[Mounted], None] | None = None
) -> Mounted:
    from lazyfs import mounts
    from lazyfs.report import ProgressLine

    progress = ProgressLine(sys.stderr)
    # Without -v, a terminal still shows what takes time; a script sees nothing but errors.
    show = progress if args.verbose or sys.stderr.isatty() else None
    try:
        mounted = mounts.mount(
            args.image,
            args.target,
            args.options,
            push_index=args.push_index,
            on_progress=show,
            on_attached=on_attached,
        )
    finally:
        progress.clear()
    if args.verbose:
        joined = ", joining an earlier mount" if mounted.joined else ""
        place = f"{mounted.image} mounted on {mounted.target}"
        print(f"lazyfs: {place} by backend={mounted.backend}{joined}", file=sys.stderr, flush=True)
    return mounted


def _umount(args: argparse.Namespace) -> int:
    from lazyfs.unmount import umount

    umount(args.target, lazy=args.lazy, wait=args.wait)
    return 0


def _index(args: argparse.Namespace) -> int:
    from lazyfs.commands import index

    return int(index(args))


def _inspect(args: argparse.Namespace) -> int:
    from lazyfs.commands import inspect

    return int(inspect(args))


def _analyze(args: argparse.Namespace) -> int:
    from lazyfs.analyze import analyze

    return int(analyze(args))


def _cache(args: argparse.Namespace) -> int:
    from lazyfs.commands import cache

    if args.action == "gc" and args.max_size_bytes is None:
        raise UserError("cache gc needs --max-size", "lazyfs cache gc --max-size 20G")
    return int(cache(args))


def _bundle(args: argparse.Namespace) -> int:
    from lazyfs.containers import bundle

    return int(bundle(args))


def _run(args: argparse.Namespace) -> int:
    from lazyfs.containers import run

    return int(run(args))


def _stats(args: argparse.Namespace) -> int:
    from lazyfs import query, report

    entry = query.required_mount(args.target)
    found = query.serving(entry.dev)
    if found is None:
        raise HostError(f"no daemon answers for {args.target}", "it may have died, or belong to another user")
    values = {name: value for name, value in found.reply.items() if name not in ("ok", "config")}
    if args.json:
        _print_json(values)
    else:
        values["targets"] = [target.get("target") for target in query.targets_of(values)]
        flat = {name: value for name, value in values.items() if not isinstance(value, dict | list)}
        sys.stdout.write(report.facts({"target": entry.mountpoint, **flat}))
    return 0


def _ls(args: argparse.Namespace) -> int:
    from lazyfs import query, report

    found = query.listings()
    if args.json:
        _print_json(
            [
                {"socket": one.socket_path, **{k: v for k, v in one.reply.items() if k != "ok"}}
                for one in found
            ]
        )
        return 0
    rows = []
    for one in found:
        cache = str(one.reply.get("cache") or "-")
        for entry in query.mounts_of(one.reply):
            digest = str(entry.get("manifest_digest") or "-").removeprefix("sha256:")[:12]
            for target in query.targets_of(entry) or [{}]:
                place = str(target.get("target") or "-")
                rows.append([place, str(entry.get("image")), digest, str(entry.get("backend") or "-"), cache])
    if rows:
        sys.stdout.write(report.table(["TARGET", "IMAGE", "MANIFEST", "BACKEND", "CACHE"], sorted(rows)))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from lazyfs import doctor, report

    checks = doctor.examine(args.cache)
    if args.json:
        _print_json([check._asdict() for check in checks])
    else:
        for check in checks:
            status = report.coloured(check.status, sys.stdout)
            print(f"{status}  {check.name}: {report.printable(check.finding)}")
            if check.advice:
                print(f"      -> {report.printable(check.advice)}")
    return 1 if any(check.status == "fail" for check in checks) else 0


def _daemon(args: argparse.Namespace) -> int:
    from lazyfs import control, paths, process, report

    cache = paths.cache_directory(args.cache)
    runtime = paths.runtime_directory(cache)
    for op in ("ping", "upgrade", "stop"):
        if getattr(args, op):
            reply = control.ask_once(paths.control_socket(runtime), {"op": op}, 60.0)
            if op == "ping":
                sys.stdout.write(
                    report.facts({"cache": cache, **{k: v for k, v in reply.items() if k != "ok"}})
                )
            return 0
    arguments = ["--cache", cache, "--runtime", runtime, "--foreground"]
    if args.linger is not None:
        arguments += ["--linger", str(args.linger)]
    command = process.python_command("lazyfs.keeper", *arguments)
    sys.stdout.flush()
    os.execve(command[0], command, process.environment())


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2))


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "mount": _mount,
    "umount": _umount,
    "index": _index,
    "inspect": _inspect,
    "analyze": _analyze,
    "cache": _cache,
    "bundle": _bundle,
    "run": _run,
    "stats": _stats,
    "ls": _ls,
    "doctor": _doctor,
    "daemon": _daemon,
}


if __name__ == "__main__":
    sys.exit(main())
