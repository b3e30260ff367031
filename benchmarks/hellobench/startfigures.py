"""The figures of start times: by category, as speed-ups, and beside the limit."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.hellobench.linktables import PHASES
from benchmarks.hellobench.palette import GREY, LINK_STYLES, MODE_COLOURS, plain_log
from benchmarks.hellobench.summary import (
    DEPLOYMENT,
    DEVELOPMENT,
    FRESH,
    LOCAL,
    MODES,
    OURS,
    PACK,
    Results,
    order,
)
from benchmarks.hellobench.workloads import CATEGORIES

# How dark a phase is drawn in its mode's colour.
_SHADES = {"push_s": 0.25, "pull_s": 0.5, "create_s": 0.75, "run_s": 1.0}
ALL = "all"


def start(results: Results, names: Sequence[str], title: str, link: str) -> Any | None:
    """Stacked bars by category and mode: deployment above, development below."""
    from matplotlib import pyplot

    panels = []
    for operation in (DEPLOYMENT, DEVELOPMENT):
        modes, common = results.comparable(link, operation, names)
        modes = [mode for mode in modes if mode != LOCAL]
        if modes and common:
            panels.append((operation, modes, common))
    if not panels:
        return None
    figure, grid = pyplot.subplots(
        len(panels), 1, figsize=(11, 3.6 * len(panels) + 0.5), squeeze=False, layout="constrained"
    )
    for axes, (operation, modes, common) in zip(grid.flat, panels, strict=True):
        _bars(axes, results, link, operation, modes, common)
        axes.set_title(
            f"{operation}, link {link} ({title}, {len(common)} workloads that all these modes have)", fontsize=10
        )
    _legend(figure, order((mode for _, modes, _ in panels for mode in modes), MODES), [p for p, _, _ in panels])
    return figure


def _bars(axes: Any, results: Results, link: str, operation: str, modes: Sequence[str], common: Sequence[str]) -> None:
    groups = {
        c: [w for w in common if results.category(w) == c] for c in order(map(results.category, common), CATEGORIES)
    }
    groups[ALL] = list(common)
    width = 0.84 / len(modes)
    highest = 0.0
    for place, members in enumerate(groups.values()):
        for number, mode in enumerate(modes):
            x = place + (number - (len(modes) - 1) / 2) * width
            bottom = 0.0
            for phase, shade in _SHADES.items():
                values = [results.of(phase, w, link, mode, operation) or 0.0 for w in members]
                height = sum(values) / len(values)
                if height:
                    colour = _lighter(MODE_COLOURS.get(mode, GREY), shade)
                    axes.bar(x, height, width * 0.92, bottom, color=colour, linewidth=0)
                bottom += height
            places = 2 if bottom < 0.995 else 1 if bottom < 9.95 else 0
            axes.annotate(
                f"{bottom:.{places}f}", (x, bottom), xytext=(0, 2), textcoords="offset points", ha="center",
                fontsize=6.5, rotation=90 if len(modes) > 3 else 0,
            )  # fmt: skip
            highest = max(highest, bottom)
    axes.set_ylim(0, highest * 1.12 or 1)
    axes.set_xticks(
        range(len(groups)), [f"{name}\n(n = {len(members)})" for name, members in groups.items()], fontsize=8
    )
    axes.axvline(len(groups) - 1.5, color="0.8", linewidth=1)
    axes.set_ylabel("mean of medians, s")


def _lighter(colour: str, shade: float) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - shade * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def _legend(figure: Any, modes: Sequence[str], operations: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    phases = PHASES if DEVELOPMENT in operations else PHASES[1:]
    handles = [Patch(color=MODE_COLOURS.get(mode, GREY), label=mode) for mode in modes]
    handles += [Patch(color=_lighter("#000000", 0.85 * _SHADES[p]), label=p.removesuffix("_s")) for p in phases]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)


def cumulative(axes: Any, values: Sequence[float], left: float, right: float, **style: Any) -> None:
    """The empirical distribution of sorted values as steps, drawn from `left` to `right`."""
    parts = [(number + 1) / len(values) for number in range(len(values))]
    axes.step([left, *values, right], [0.0, *parts, 1.0], where="post", **style)


def speedups(results: Results, names: Sequence[str], title: str) -> Any | None:
    """The distribution over workloads, a line for each link; a thin one for developments run on a fresh host."""
    from matplotlib import pyplot

    panels = []
    for heading, operation, ours in (
        (DEPLOYMENT, DEPLOYMENT, OURS),
        (DEPLOYMENT + ", with a startup pack", DEPLOYMENT, PACK),
        (DEVELOPMENT + ", host with the previous version", DEVELOPMENT, OURS),
        (DEVELOPMENT + ", fresh host (computed)", FRESH, OURS),
    ):
        gains = {}
        for link in results.link_names:
            found = [gain for w in names if (gain := results.gain(w, link, operation, "ctr", ours))]
            if found:
                gains[link] = sorted(found)
        if gains:
            panels.append((heading, gains))
    if not panels:
        return None
    everything = [gain for _, gains in panels for values in gains.values() for gain in values]
    left, right = min(*everything, 1.0) / 1.3, max(*everything, 1.0) * 1.3
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(4.3 * len(panels) + 0.3, 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (heading, gains) in zip(grid.flat, panels, strict=True):
        for number, (link, values) in enumerate(gains.items()):
            middle = statistics.median(values)
            cumulative(
                axes, values, left, right, color=_lighter(MODE_COLOURS["lazyfs"], 0.55 + 0.45 * number / len(gains)),
                linestyle=LINK_STYLES.get(link, "-"), linewidth=1.8,
                label=f"{link}: median {middle:.3g}x (n = {len(values)})",
            )  # fmt: skip
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlim(left, right)
        axes.set_ylim(0, 1)
        plain_log(axes, "x")
        axes.grid(color="0.92")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set_xlabel("times faster than ctr (left of 1: slower)")
        axes.set_title(heading, fontsize=10)
        axes.legend(fontsize=7.5, loc="upper left" if values[0] > 3 else "lower right")
    grid[0][0].set_ylabel(f"workloads of {title}, cumulative")
    return figure


def limit(results: Results, names: Sequence[str], title: str) -> Any | None:
    """A column of points for each mode, with the median as a bar, a panel for each link."""
    from matplotlib import pyplot

    panels = {}
    for link in results.link_names:
        modes = [mode for mode in results.modes(link, DEPLOYMENT, names) if mode != LOCAL]
        columns = {mode: [over for w in names if (over := results.over_limit(w, link, mode))] for mode in modes}
        if any(columns.values()):
            panels[link] = {mode: values for mode, values in columns.items() if values}
    if not panels:
        return None
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(2.9 * len(panels) + 0.6, 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (link, columns) in zip(grid.flat, panels.items(), strict=True):
        for place, (mode, values) in enumerate(columns.items()):
            colour = MODE_COLOURS.get(mode, GREY)
            # Beside each other rather than at random: the same figure from the same results.
            spots = [place + 0.5 * ((number * 0.618) % 1 - 0.5) for number in range(len(values))]
            axes.scatter(spots, values, s=14, color=colour, alpha=0.6, linewidths=0)
            middle = statistics.median(values)
            axes.plot([place - 0.38, place + 0.38], [middle, middle], color="black", linewidth=2)
            axes.annotate(
                f"{middle:.3g}x", (place, 1), xycoords=("data", "axes fraction"), ha="center", fontsize=8, color=colour,
                fontweight="bold",
            )  # fmt: skip
        axes.set_xticks(
            range(len(columns)), [f"{m} ({len(v)})" for m, v in columns.items()], rotation=35, ha="right", fontsize=8
        )
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set_title(f"link {link}; medians:", fontsize=10, pad=14)
    plain_log(grid[0][0], "y")
    grid[0][0].set_ylabel(f"deployment / limit ({title}); 1: as fast as possible")
    return figure
