"""`lazyfs mount` and `umount`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazyfs.mounting.job import Mounted


def mount(args: argparse.Namespace) -> int:
    if args.options.foreground:
        from lazyfs.mounting.foreground import hold

        hold(lambda on_attached: _mount_once(args, on_attached))
    else:
        _mount_once(args)
    return 0


def _mount_once(
    args: argparse.Namespace, on_attached: Callable[[Mounted], None] | None = None
) -> Mounted:
    from lazyfs.commands.bars import layer_bars
    from lazyfs.commands.report import ProgressLine
    from lazyfs.mounting import mount

    progress = ProgressLine(sys.stderr)
    # Without -v, a terminal still shows what takes time; a script sees nothing but errors.
    show = progress if args.verbose or sys.stderr.isatty() else None
    try:
        mounted = mount.mount(
            args.image,
            args.target,
            args.options,
            push_index=args.push_index,
            on_progress=show,
            bars=layer_bars if show else None,
            on_attached=on_attached,
        )
    finally:
        progress.clear()
    if args.verbose:
        joined = ", joining an earlier mount" if mounted.joined else ""
        place = f"{mounted.image} mounted on {mounted.target}"
        print(f"lazyfs: {place} by backend={mounted.backend}{joined}", file=sys.stderr, flush=True)
    return mounted


def umount(args: argparse.Namespace) -> int:
    from lazyfs.mounting.unmount import umount

    umount(args.target, lazy=args.lazy, wait=args.wait)
    return 0
