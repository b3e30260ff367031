"""Numbers and tables as Markdown: rounded to what can be read, a dash where nothing was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.hellobench.summary import Cell, median

DASH = "\N{EN DASH}"
# With fewer samples than this a cell says how many it has.
ENOUGH = 5


def digits(value: float | None) -> str:
    """Three significant digits for people: 0.042, 1.25, 12.5, 125, 12,345; a dash for None."""
    if value is None:
        return DASH
    if value and abs(value) < 0.0005:
        return "<0.001" if value > 0 else ">-0.001"
    for below, places in ((0.0995, 3), (9.995, 2), (99.95, 1)):
        if abs(value) < below:
            return f"{value:.{places}f}"
    return f"{value:,.0f}"


def times(value: float | None) -> str:
    """A ratio: 1.25x."""
    return DASH if value is None else f"{digits(value)}x"


def megabytes(count: float | None) -> str:
    """Bytes as MB of 1,000,000, without the unit."""
    if count is not None and 0 < count < 5000:
        return "<0.01"
    return DASH if count is None else "0" if count == 0 else _megabytes(count / 1e6)


def _megabytes(value: float) -> str:
    return f"{value:.2f}" if value < 0.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def whole(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def percent(part: float | None) -> str:
    """A share; never 0 % or 100 % by rounding."""
    if part is None:
        return DASH
    if 0 < part < 0.005:
        return "<1 %"
    return ">99 %" if 0.995 <= part < 1 else f"{100 * part:.0f} %"


def counted(count: int) -> str:
    """Says that there are few samples."""
    return f" n={count}" if 0 < count < ENOUGH else ""


def time(cell: Cell) -> str:
    """The median, (p95), and the number of samples where it is small; no p95 of a single one."""
    if cell.median is None:
        return DASH
    spread = f" ({digits(cell.p95)})" if len(cell.values) > 1 else ""
    return f"{digits(cell.median)}{spread}{counted(len(cell.values))}"


def spread(values: Sequence[float], show: str = "x") -> str:
    """Median, smallest and largest of many: 4.2x (1.1 to 9.0)."""
    if not values:
        return DASH
    return f"{digits(median(values))}{show} ({digits(min(values))} to {digits(max(values))})"


def span(counts: Sequence[int]) -> str:
    """5, or 3 to 5."""
    if not counts:
        return DASH
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def text(value: object, longest: int = 200) -> str:
    """Any text as one line that neither ends a table's cell nor is taken for markup."""
    line = " ".join(str(value).split())
    line = line if len(line) <= longest else line[: longest - 3] + "..."
    for character, written in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`"), ("*", "\\*")):
        line = line.replace(character, written)
    return line


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are text, the others numbers. Empty without rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if not lines:
        return ""
    rule = "|" + "".join("---|" if column < left else "--:|" for column in range(len(header)))
    return "\n".join(["| " + " | ".join(header) + " |", rule, *lines]) + "\n"


def folded(title: str, body: str) -> str:
    """A part that a reader opens; nothing if it is empty."""
    return f"<details><summary>{title}</summary>\n\n{body}\n</details>\n" if body else ""


def section(title: str, *parts: str) -> str:
    """A heading and what is not empty of its parts; nothing if all are."""
    found = [part.rstrip("\n") for part in parts if part]
    return "\n\n".join([title, *found]) + "\n\n" if found else ""
