"""Numbers and tables for people."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any, TextIO

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_COLOURS = {"ok": "32", "warn": "33", "fail": "31"}


def human_bytes(count: int) -> str:
    """Decimal units, as registries and disks are sold by: 1 MB = 1,000,000 bytes."""
    value = float(count)
    for unit in _UNITS:
        if abs(value) < 999.5 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Columns as wide as their content; those numbered in `right` are right-aligned. Ends with a newline."""
    lines = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    numbers = frozenset(right)
    out = []
    for line in lines:
        cells = [
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("  ".join(cells).rstrip() + "\n")
    return "".join(out)


def fields(values: Mapping[str, Any]) -> str:
    """``name   value`` lines, with readable byte counts; names of inner mappings have a dot. Ends with a newline."""
    values = dict(_flat(values))
    width = max((len(name) for name in values), default=0)
    return "".join(f"{name.ljust(width)}  {_value(name, value)}\n" for name, value in values.items())


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and (name.endswith("_bytes") or name.rpartition(".")[2].startswith("bytes_")):
        return f"{human_bytes(value)} ({value:,})"
    if isinstance(value, int):
        return str(value) if name == "pid" else f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(printable(item) for item in value) or "-"
    return "-" if value is None else printable(value)


def printable(value: object) -> str:
    """Text without control characters for a terminal: metadata of images comes from outside."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(value))


def wants_colour(stream: TextIO) -> bool:
    """no-color.org: any non-empty NO_COLOR turns it off."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def coloured(status: str, stream: TextIO) -> str:
    """`status` (ok, warn, fail), padded, in its colour if the stream shows colours."""
    text = status.ljust(4)
    return f"\x1b[{_COLOURS[status]}m{text}\x1b[0m" if wants_colour(stream) else text


class ProgressLine:
    """One line on a terminal that later texts overwrite; on anything else one line per text."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._shown = False

    def __call__(self, text: str) -> None:
        text = printable(text)
        if self._terminal:
            self._stream.write(f"\r\x1b[K{text[:200]}")
            self._shown = True
        else:
            self._stream.write(f"lazyfs: {text}\n")
        self._stream.flush()

    def clear(self) -> None:
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._shown = False


def print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2))
