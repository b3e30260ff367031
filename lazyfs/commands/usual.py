"""Parses the usual words of `lazyfs mount` and `lazyfs umount` without argparse.

argparse, with re and gettext, takes a quarter of a mount's time. It gets whatever does not have exactly the forms
below: help, mistakes, abbreviations, "-ooptions". Tests compare the two.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace as Words
    from collections.abc import Sequence
else:

    class Words:
        """Stands for argparse's namespace: an attribute for each argument."""

        def __init__(self, **values):
            self.__dict__.update(values)


# Of each command: its words in their order, its flags, and its options, which have a value and may be repeated.
_USUAL: dict[str, tuple[tuple[str, ...], dict[str, str], dict[str, str]]] = {
    "mount": (
        ("image", "target"),
        {"-v": "verbose", "--verbose": "verbose", "-s": "sloppy", "--sloppy": "sloppy", "--push-index": "push_index"},
        {"-o": "option_texts"},
    ),
    "umount": (("target",), {"-l": "lazy", "--lazy": "lazy", "--wait": "wait"}, {}),
}


def parse(words: Sequence[str]) -> Words | None:
    """What argparse would make of the words of a command line; None: argparse has to parse them."""
    if not words or words[0] not in _USUAL:
        return None
    names, flags, options = _USUAL[words[0]]
    values: dict[str, object] = {"version": False, "subcommand": words[0]}
    values.update(dict.fromkeys(flags.values(), False))
    texts: dict[str, list[str]] = {name: [] for name in options.values()}
    plain: list[str] = []
    rest = iter(words[1:])
    for word in rest:
        if not word.startswith("-"):
            plain.append(word)
        elif word in flags:
            values[flags[word]] = True
        elif word in options and not (value := next(rest, "-")).startswith("-"):
            texts[options[word]].append(value)
        else:
            return None
    if len(plain) != len(names):
        return None
    return Words(**values, **texts, **dict(zip(names, plain, strict=True)))
