"""Parses the usual words of `lazyfs mount`, `umount`, `run`, `bundle` and `index` without argparse.

argparse, with re and gettext, takes a quarter of a mount's time. It gets whatever does not have exactly the forms
below: help, mistakes, abbreviations, "-ooptions", "-it". Tests compare the two.
"""

from __future__ import annotations

from lazyfs.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace as Words
    from collections.abc import Mapping, Sequence
else:

    class Words:
        """Stands for argparse's namespace: an attribute for each argument."""

        def __init__(self, **values):
            self.__dict__.update(values)


class _Form(NamedTuple):
    """One command's words. `plain`: the names of those without a dash, in their order. Others lead from the word to a
    name: `flags`; `lists`, which have a value and may be repeated; `texts`, with one value, the last of which counts.
    `defaults`: what is not None, False or empty without them. `rest`: takes all that follows the last plain one."""

    plain: tuple[str, ...]
    flags: Mapping[str, str]
    lists: Mapping[str, str] = {}
    texts: Mapping[str, str] = {}
    defaults: Mapping[str, object] = {}
    rest: str = ""


_CONTAINER_FLAGS = {"-t": "tty", "--tty": "tty", "--read-only": "read_only"}
_CONTAINER_LISTS = {"-e": "env", "--env": "env", "-v": "volume", "--volume": "volume", "--tmpfs": "tmpfs",
                    "-o": "options", "--options": "options", "--security-opt": "security_opt"}  # fmt: skip
_CONTAINER_TEXTS = {"-w": "workdir", "--workdir": "workdir", "-u": "user", "--user": "user",
                    "--entrypoint": "entrypoint", "--hostname": "hostname"}  # fmt: skip
_RUN_FLAGS = {"--rm": "rm", "-i": "interactive", "--interactive": "interactive"}

_USUAL = {
    "mount": _Form(
        ("image", "target"),
        {"-v": "verbose", "--verbose": "verbose", "-s": "sloppy", "--sloppy": "sloppy", "--push-index": "push_index"},
        {"-o": "option_texts"},
    ),
    "umount": _Form(("target",), {"-l": "lazy", "--lazy": "lazy", "--wait": "wait"}),
    "index": _Form(
        ("image",),
        {"--push": "push", "--json": "json"},
        {"-o": "option_texts"},
        {"--push-to": "push_to", "--output": "output"},
    ),
    "run": _Form(
        ("image",),
        {**_CONTAINER_FLAGS, **_RUN_FLAGS},
        _CONTAINER_LISTS,
        {**_CONTAINER_TEXTS, "--name": "name"},
        {"workdir": "", "stop_timeout": 10.0},
        "command",
    ),
    "bundle": _Form(
        ("image", "directory"), _CONTAINER_FLAGS, _CONTAINER_LISTS, _CONTAINER_TEXTS, {"workdir": ""}, "command"
    ),
}


def parse(words: Sequence[str]) -> Words | None:
    """What argparse would make of the words of a command line; None: argparse has to parse them."""
    if not words or words[0] not in _USUAL or "--" in words:
        return None
    form = _USUAL[words[0]]
    values: dict[str, object] = {"version": False, "subcommand": words[0]}
    values.update(dict.fromkeys(form.flags.values(), False))
    values.update(dict.fromkeys(form.texts.values()))
    values.update(form.defaults)
    lists: dict[str, list[str]] = {name: [] for name in form.lists.values()}
    plain: list[str] = []
    rest = list(words[1:])
    while rest and not (form.rest and len(plain) == len(form.plain)):
        word = rest.pop(0)
        if not word.startswith("-"):
            plain.append(word)
        elif word in form.flags:
            values[form.flags[word]] = True
        elif not rest or rest[0].startswith("-"):
            return None
        elif word in form.lists:
            lists[form.lists[word]].append(rest.pop(0))
        elif word in form.texts:
            values[form.texts[word]] = rest.pop(0)
        else:
            return None
    if len(plain) != len(form.plain):
        return None
    if form.rest:
        values[form.rest] = rest
    return Words(**values, **lists, **dict(zip(form.plain, plain, strict=True)))
