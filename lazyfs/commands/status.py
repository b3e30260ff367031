"""`lazyfs stats`, `ls` and `daemon`: what is served, by whom."""

from __future__ import annotations

import argparse
import os
import sys

from lazyfs.commands.report import print_json
from lazyfs.errors import HostError


def stats(args: argparse.Namespace) -> int:
    from lazyfs.commands import report
    from lazyfs.control import query

    entry = query.required_mount(args.target)
    found = query.daemon_of(entry.dev)
    if found is None:
        raise HostError(f"no daemon answers for {args.target}", "it may have died, or belong to another user")
    values = {name: value for name, value in found.reply.items() if name not in ("ok", "config")}
    if args.json:
        print_json(values)
    else:
        values["targets"] = [target.get("target") for target in query.targets_of(values)]
        flat = {name: value for name, value in values.items() if not isinstance(value, dict | list)}
        sys.stdout.write(report.fields({"target": entry.mountpoint, **flat}))
    return 0


def ls(args: argparse.Namespace) -> int:
    from lazyfs.commands import report
    from lazyfs.control import query

    found = query.listings()
    if args.json:
        print_json(
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


def daemon(args: argparse.Namespace) -> int:
    from lazyfs.cache import places
    from lazyfs.commands import report
    from lazyfs.control import client, rundir
    from lazyfs.system import process

    cache = places.cache_directory(args.cache)
    runtime = rundir.runtime_directory(cache)
    for op in ("ping", "upgrade", "stop"):
        if getattr(args, op):
            reply = client.ask_once(rundir.control_socket(runtime), {"op": op}, 60.0)
            if op == "ping":
                sys.stdout.write(
                    report.fields({"cache": cache, **{k: v for k, v in reply.items() if k != "ok"}})
                )
            return 0
    arguments = ["--cache", cache, "--runtime", runtime, "--foreground"]
    if args.linger is not None:
        arguments += ["--linger", str(args.linger)]
    command = process.python_command("lazyfs.daemon.keeper", *arguments)
    sys.stdout.flush()
    os.execve(command[0], command, process.environment())
