"""``/sbin/mount.lazyfs`` and ``/sbin/mount.fuse.lazyfs``: what mount(8) calls for ``-t lazyfs`` and fstab.

    mount.lazyfs SPEC DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE.SUBTYPE]

mount(8), "EXTERNAL HELPERS" gives the arguments, "EXIT STATUS" the codes: 0 success, 1 wrong invocation or
permissions, 2 system error, 8 user interrupt, 32 mount failure.

mount(8) passes `rw` even if the user did not write it. So here, unlike in `lazyfs mount`, `rw` means a writable root
only together with upperdir=; `ephemeral` asks for a root whose changes are thrown away.
"""

from __future__ import annotations

import os
import sys

from lazyfs.commands.end import end
from lazyfs.errors import LazyfsError, UserError
from lazyfs.mounting import mount, options, target
from lazyfs.mounting.lease import Reporter
from lazyfs.records import NamedTuple
from lazyfs.system import startup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lazyfs.mounting.attach import Mounted

USAGE = "mount.lazyfs IMAGE DIRECTORY [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]"


class Invocation(NamedTuple):
    image: str
    target: str
    options: options.MountOptions
    fake: bool  # -f: everything but the mount
    verbose: bool
    namespace: str | None


def parse(arguments: Sequence[str], program: str = "mount.lazyfs") -> Invocation:
    """Parses the helper's command line by hand, because argparse refuses values that begin with "-". Options may stand
    anywhere. Raises UserError."""
    words, flags, values = _split(list(arguments))
    if len(words) != 2:
        raise UserError("an image and a directory are needed", USAGE)
    kinds = (*values["t"][-1:], os.path.basename(program).removeprefix("mount."))
    base = options.MountOptions(backend="fuse" if "fuse.lazyfs" in kinds else "auto")
    parsed = options.parse(values["o"], base, sloppy="s" in flags)
    if parsed.writable and parsed.upperdir is None and not parsed.ephemeral:
        # mount(8) passes `rw` whether or not the user did; the default of lazyfs is read-only.
        parsed = parsed._replace(writable=False)
    namespace = values["N"][-1] if values["N"] else None
    return Invocation(words[0], words[1], parsed, "f" in flags, "v" in flags, namespace)


def _split(rest: list[str]) -> tuple[list[str], set[str], dict[str, list[str]]]:
    """Words, flags, and the values of the options that have one."""
    words: list[str] = []
    flags: set[str] = set()
    values: dict[str, list[str]] = {"o": [], "N": [], "t": []}
    while rest:
        word = rest.pop(0)
        if word == "--":
            return words + rest, flags, values
        if not word.startswith("-") or word == "-":
            words.append(word)
            continue
        letters = word[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter in "sfnv":
                flags.add(letter)
            elif letter not in values:
                raise UserError(f"unknown option -{letter}", USAGE)
            elif not letters and not rest:
                raise UserError(f"option -{letter} needs a value", USAGE)
            else:
                values[letter].append(letters or rest.pop(0))
                letters = ""
    return words, flags, values


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


def _mount(invocation: Invocation, on_attached: Callable[[Mounted], None] | None = None) -> Mounted:
    reporter = Reporter()
    if invocation.verbose:
        from lazyfs.commands.bars import layer_bars

        reporter = Reporter(_say, layer_bars)
    mounted = mount.mount(
        invocation.image,
        invocation.target,
        invocation.options,
        namespace=invocation.namespace,
        reporter=reporter,
        on_attached=on_attached,
    )
    if invocation.verbose:
        _say(f"{mounted.image} mounted on {mounted.target} by backend={mounted.backend}")
    return mounted


def _say(text: str) -> None:
    print(f"lazyfs: {text}", file=sys.stderr)


def main() -> None:
    """Entry point of both helpers. The name of the program says which one is called."""
    startup.command()
    end(run(sys.argv[1:], sys.argv[0]))


if __name__ == "__main__":
    main()
