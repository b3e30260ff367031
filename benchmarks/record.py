"""Results of measurements: kept as JSON, shown as a Markdown table and a figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BACKENDS = ("kernel", "fuse")


@dataclass(frozen=True)
class Result:
    """One measure with one backend.

    `value` is compared with `limit`: at most the limit if `smaller_is_better`, else at least. For a
    comparison it is the median of the ratios of pairs taken one after the other in one run, ours to theirs.
    """

    key: str
    title: str
    goal: str
    backend: str
    value: float
    limit: float
    shown: str
    smaller_is_better: bool = True
    unit: str = "s"
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    # Against which the goals of the table are not set: an explanation of another row.
    informative: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.smaller_is_better else self.value >= self.limit


def ratio(
    key: str,
    title: str,
    backend: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    limit: float,
    goal: str,
    *,
    informative: bool = False,
) -> Result:
    """A comparison of times in seconds: ours at most `limit` times theirs."""
    value = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    shown = f"{value:.2f}x ({seconds(ours)} / {seconds(theirs)})"
    return Result(
        key, title, goal, backend, value, limit, shown,
        ours=list(ours), theirs=list(theirs), informative=informative,
    )  # fmt: skip


def seconds(samples: Sequence[float]) -> str:
    """The median of times, for people."""
    median = statistics.median(samples)
    return f"{median:.2f} s" if median >= 1 else f"{median * 1000:.0f} ms"


def markdown(results: Sequence[Result]) -> str:
    """One row per measure, one column per backend; bold where a goal is missed."""
    lines = ["| measure | goal | " + " | ".join(f"`{b}`" for b in BACKENDS) + " |"]
    lines.append("|---|---|" + "---|" * len(BACKENDS))
    titles = {r.key: r for r in results}
    for key, first in titles.items():
        cells = []
        for backend in BACKENDS:
            found = [r for r in results if r.key == key and r.backend == backend]
            cell = found[0].shown if found else ""
            cells.append(cell if not found or found[0].met or found[0].informative else f"**{cell}**")
        lines.append(f"| {first.title} | {first.goal} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def save(directory: Path, results: Sequence[Result], environment: dict[str, Any]) -> list[Path]:
    """Write table.json, table.md and table.png; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment, "results": [asdict(r) | {"met": r.met} for r in results]}
    data, table, figure = (directory / f"table.{suffix}" for suffix in ("json", "md", "png"))
    data.write_text(json.dumps(document, indent=1) + "\n")
    facts = ", ".join(f"{name} {value}" for name, value in environment.items())
    table.write_text(f"{markdown(results)}\n{facts}\n")
    plot(figure, results)
    return [data, table, figure]


def plot(path: Path, results: Sequence[Result]) -> None:
    """Each value against its goal, as bars: 1 is the goal, below is better, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    judged = {r.key for r in results if not r.informative}
    keys = [key for key in dict.fromkeys(r.key for r in results) if key in judged][::-1]
    titles = {r.key: r.title.replace("`", "") for r in results}
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(keys) + 1.4))
    colours = {"kernel": "tab:blue", "fuse": "tab:orange"}
    for offset, backend in ((0.2, "kernel"), (-0.2, "fuse")):
        found = {r.key: r for r in results if r.backend == backend and not r.informative}
        places = [(i + offset, found[k]) for i, k in enumerate(keys) if k in found]
        parts = [r.value / r.limit if r.smaller_is_better else r.limit / r.value for _, r in places]
        axes.barh([p for p, _ in places], parts, height=0.38, color=colours[backend], label=backend)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(keys)), [titles[k] for k in keys])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("measured / goal (left of 1: met)")
    axes.legend(loc="best")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
