"""`lazyfs cache`: size, eviction, verification."""

from __future__ import annotations

import argparse
import json
import sys
import time

from lazyfs.cache import evict, places
from lazyfs.cache.directory import CacheDirectory
from lazyfs.commands.report import human_bytes, table
from lazyfs.errors import UserError


def cache(args: argparse.Namespace) -> int:
    """`lazyfs cache du|verify|prune|gc`."""
    store = CacheDirectory(places.cache_directory(args.cache))
    if args.action == "du":
        return _du(store, args.json)
    if args.action == "verify":
        checked, damaged, broken = evict.verify(store)
        if args.json:
            print(
                json.dumps({"checked_blocks": checked, "damaged_blocks": damaged, "broken_entries": broken})
            )
        else:
            print(f"{checked} blocks checked, {damaged} damaged (they will be fetched again)")
            for content_root in broken:
                print(f"the entry of layer {content_root[:12]} cannot be used: lazyfs cache prune removes it")
        return 1 if damaged or broken else 0
    if args.action == "gc" and not args.max_size_bytes:
        raise UserError("gc needs a size to fit", "for example --max-size 20G; prune removes all unused")
    freed, left = evict.collect(store, None if args.action == "prune" else args.max_size_bytes)
    if args.json:
        print(json.dumps({"freed_bytes": freed, "left_bytes": left}))
    else:
        print(f"freed {human_bytes(freed)}, {human_bytes(left)} left")
    return 0


def _du(store: CacheDirectory, as_json: bool) -> int:
    listed = evict.entries(store)
    if as_json:
        rows = [
            {
                "kind": e.kind,
                "name": e.name,
                "size_bytes": e.size_bytes,
                "used_at_s": e.used_at_s,
                "in_use": e.in_use,
            }
            for e in listed
        ]
        print(
            json.dumps(
                {"cache": store.path, "size_bytes": sum(e.size_bytes for e in listed), "entries": rows},
                indent=2,
            )
        )
        return 0
    lines = [
        [
            e.kind,
            e.name[:12],
            human_bytes(e.size_bytes),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(e.used_at_s)),
            "in use" if e.in_use else "",
        ]
        for e in reversed(listed)
    ]
    sys.stdout.write(table(["KIND", "NAME", "SIZE", "LAST USED", ""], lines, right=(2,)))
    print(f"{store.path}: {human_bytes(sum(e.size_bytes for e in listed))}")
    return 0
