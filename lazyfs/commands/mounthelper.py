"""``/sbin/mount.lazyfs`` and ``/sbin/mount.fuse.lazyfs``: what mount(8) calls for ``-t lazyfs`` and fstab.

    mount.lazyfs SPEC DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE.SUBTYPE]

mount(8), "EXTERNAL HELPERS" gives the arguments, "EXIT STATUS" the codes: 0 success, 1 wrong invocation or
permissions, 2 system error, 8 user interrupt, 32 mount failure.

mount(8) passes `rw` also when nobody wrote it. So here, unlike for `lazyfs mount`, `rw` means a writable root only
together with upperdir=; a root whose changes are thrown away is asked for by `ephemeral`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lazyfs.errors import LazyfsError, UserError
from lazyfs.mounting import job, mount, options, target

USAGE = "mount.lazyfs IMAGE DIRECTORY [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]"


class Invocation(NamedTuple):
    image: str
    target: str
    options: options.MountOptions
    fake: bool  # -f: everything but the mount
    verbose: bool
    namespace: str | None


def parse(arguments: Sequence[str], program: str = "mount.lazyfs") -> Invocation:
    """The helper's command line, by hand: argparse would refuse values that begin with "-". Options may stand
    anywhere. Raises UserError."""
    words: list[str] = []
    texts: list[str] = []
    flags: set[str] = set()
    namespace = None
    kind = ""
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            words += rest
            break
        if not word.startswith("-") or word == "-":
            words.append(word)
            continue
        letters = word[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter in "sfnv":
                flags.add(letter)
            elif letter in "oNt":
                if not letters and not rest:
                    raise UserError(f"option -{letter} needs a value", USAGE)
                value = letters or rest.pop(0)
                letters = ""
                if letter == "o":
                    texts.append(value)
                elif letter == "N":
                    namespace = value
                else:
                    kind = value
            else:
                raise UserError(f"unknown option -{letter}", USAGE)
    if len(words) != 2:
        raise UserError("an image and a directory are needed", USAGE)
    by_fuse = "fuse.lazyfs" in (kind, os.path.basename(program).removeprefix("mount."))
    base = options.MountOptions(backend="fuse" if by_fuse else "auto")
    parsed = options.parse(texts, base, sloppy="s" in flags)
    if parsed.writable and parsed.upperdir is None and not parsed.ephemeral:
        # mount(8) says `rw` whether or not the user did, and our default is read-only.
        parsed = parsed._replace(writable=False)
    return Invocation(
        words[0],
        words[1],
        parsed,
        "f" in flags,
        "v" in flags,
        namespace,
    )


def run(arguments: Sequence[str], program: str = "mount.lazyfs") -> int:
    try:
        invocation = parse(arguments, program)
        if invocation.fake:
            from lazyfs.core.oci.reference import parse_reference

            parse_reference(mount.absolute_reference(invocation.image))
            mount.choose_backend(invocation.options, invocation.namespace)
            if invocation.namespace is None:
                target.check_target(invocation.target)
            return 0
        if invocation.options.foreground:
            from lazyfs.mounting.foreground import hold

            hold(lambda on_attached: _mount(invocation, on_attached))
        else:
            _mount(invocation)
        return 0
    except LazyfsError as error:
        print(f"{os.path.basename(program)}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 8
    except OSError as error:
        print(f"{os.path.basename(program)}: {error}", file=sys.stderr)
        return 2


def _mount(
    invocation: Invocation, on_attached: Callable[[job.Mounted], None] | None = None
) -> job.Mounted:
    from lazyfs.commands.bars import layer_bars

    mounted = mount.mount(
        invocation.image,
        invocation.target,
        invocation.options,
        namespace=invocation.namespace,
        on_progress=_say if invocation.verbose else None,
        bars=layer_bars if invocation.verbose else None,
        on_attached=on_attached,
    )
    if invocation.verbose:
        _say(f"{mounted.image} mounted on {mounted.target} by backend={mounted.backend}")
    return mounted


def _say(text: str) -> None:
    print(f"lazyfs: {text}", file=sys.stderr)


def main() -> None:
    """Entry point of both helpers: the name they are called by tells them apart."""
    sys.exit(run(sys.argv[1:], sys.argv[0]))


if __name__ == "__main__":
    main()
