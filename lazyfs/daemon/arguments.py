"""The command line of keeper, worker and fuse process."""

from __future__ import annotations

from lazyfs.errors import UserError


def parse_arguments(arguments: list[str]) -> dict[str, str]:
    """{"cache": ..., "runtime": ..., ...}. Parsed by hand, because argparse takes more memory than all the rest of the
    keeper. What follows "--" is for ps(1). Raises UserError."""
    options: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        if word == "--":
            break
        name, separator, value = word.removeprefix("--").partition("=")
        if name == "foreground" and not separator:
            options[name] = "yes"
        elif word.startswith("--") and name in ("cache", "runtime", "linger", "worker", "status-fd"):
            options[name] = value if separator else next(words, "")
        else:
            raise UserError(f"unknown argument {word}", "see python -m pydoc lazyfs.daemon.keeper")
    for name in ("cache", "runtime"):
        if not options.get(name):
            raise UserError(f"--{name} is missing", "see python -m pydoc lazyfs.daemon.keeper")
    return options
