"""`lazyfs mount` and `umount`."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from lazyfs.mounting.attach import Mounted


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
    from lazyfs.mounting import mount
    from lazyfs.mounting.lease import Reporter

    # Without -v a terminal still shows slow steps; a script gets errors and warnings only.
    if not args.verbose and not sys.stderr.isatty():
        return mount.mount(
            args.image,
            args.target,
            args.options,
            push_index=args.push_index,
            reporter=Reporter(warn=_warn),
            on_attached=on_attached,
        )
    from lazyfs.commands.bars import layer_bars
    from lazyfs.commands.report import ProgressLine

    progress = ProgressLine(sys.stderr)
    try:
        mounted = mount.mount(
            args.image,
            args.target,
            args.options,
            push_index=args.push_index,
            reporter=Reporter(progress, layer_bars, _warn),
            on_attached=on_attached,
        )
    finally:
        progress.clear()
    if args.verbose:
        joined = ", joining an earlier mount" if mounted.joined else ""
        place = f"{mounted.image} mounted on {mounted.target}"
        print(f"lazyfs: {place} by backend={mounted.backend}{joined}", file=sys.stderr, flush=True)
    return mounted


def _warn(text: str) -> None:
    print(f"lazyfs: warning: {text}", file=sys.stderr, flush=True)


def umount(args: argparse.Namespace) -> int:
    from lazyfs.mounting.unmount import umount

    umount(args.target, lazy=args.lazy, wait=args.wait)
    return 0
