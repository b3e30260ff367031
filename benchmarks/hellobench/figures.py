"""Figures of a results file as PNG, in the manner of the paper "Slacker" (FAST'16).

One colour for each mode and one for each category in all of them, which also those tell apart who do not see red
or green as others do. Workloads of the paper's own software (class E) are drawn; the relatives only if
there is nothing else, and every title says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.hellobench import startfigures
from benchmarks.hellobench.lines import Image
from benchmarks.hellobench.linktables import hit_share
from benchmarks.hellobench.palette import (
    CATEGORY_COLOURS,
    CATEGORY_MARKERS,
    GREY,
    MODE_COLOURS,
    drawing,
    plain_log,
)
from benchmarks.hellobench.summary import DEPLOYMENT, OURS, PACK, SECOND, Results, median, order
from benchmarks.hellobench.workloads import CATEGORIES

OVERLAYFS = "overlayfs"
MB = 1e6


@dataclass(frozen=True)
class Chosen:
    """The workloads of the figures, and how their titles call them."""

    names: Sequence[str]
    title: str


def chosen(results: Results) -> Chosen:
    """The first class that ran: E before N."""
    for kind in results.kinds:
        if names := results.workloads(kind):
            return Chosen(names, f"class {kind}")
    return Chosen([], "")


Figure = Callable[[Results, Chosen], Any | None]


def draw(results: Results, directory: Path) -> list[Path]:
    """Write what there are results for; figures without any are left out. Raises OSError, and ImportError
    without matplotlib."""
    choice = chosen(results)
    jobs: list[tuple[str, Figure]] = []
    for link in results.link_names:
        jobs.append((f"start-{link}", lambda r, c, link=link: startfigures.start(r, c.names, c.title, link)))  # type: ignore[misc]
    jobs += [
        ("speedups", lambda r, c: startfigures.speedups(r, c.names, c.title)),
        ("limit", lambda r, c: startfigures.limit(r, c.names, c.title)),
        ("bytes", needed_bytes),
    ]
    for link in results.link_names:
        jobs.append((f"second-{link}", lambda r, c, link=link: second(r, c, link)))  # type: ignore[misc]
    jobs += [("depth", depth), ("throughput", lambda r, _: throughput(r))]
    paths = []
    with drawing() as pyplot:
        for name, figure in jobs:
            picture = figure(results, choice)
            if picture is not None:
                paths.append(directory / f"{name}.png")
                picture.savefig(paths[-1], dpi=110)
                pyplot.close(picture)
    return paths


_CAPTIONS = {
    "start": "Start time by category over the link {}: means over workloads of the median phases",
    "speedups": "Distribution of speed-ups of lazyfs against containerd with overlayfs",
    "limit": "Deployment as a multiple of the limit, one point a workload",
    "bytes": "Bytes that a start needs, and that lazyfs fetched, against the image's size (both compressed)",
    "second": "Second run over the link {}: time, and the share of the first start's bytes not fetched again",
    "depth": "Data of images and what of it a start reads, by layer depth",
    "throughput": "Throughput of long runs over time, one line a round",
}


def caption(path: Path) -> str:
    """What a figure that `draw` wrote shows, in one line."""
    kind, _, link = path.stem.partition("-")
    return _CAPTIONS[kind].format(link)


def _byte_panels(results: Results, images: Sequence[Image]) -> list[tuple[str, Mapping[str, float | None]]]:
    """(title, workload -> bytes), of the panels with any."""

    def counted(attribute: str, mode: str) -> dict[str, float | None]:
        links = results.link_names
        return {
            image.workload: median(results.of(attribute, image.workload, link, mode, DEPLOYMENT) for link in links)
            for image in images
        }

    panels: list[tuple[str, Mapping[str, float | None]]] = [
        ("needed by the start", {image.workload: image.needed_compressed_bytes for image in images}),
        (f"fetched by {OURS}, deployment", counted("bytes_fetched", OURS)),
        (f"when ready, {PACK}, without index", counted("data_bytes", PACK)),
    ]
    return [(title, values) for title, values in panels if any(values.values())]


def needed_bytes(results: Results, choice: Chosen) -> Any | None:
    """Needed and fetched bytes by image size, logarithmic: one point a workload, hollow if fat."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    images = [results.images[name] for name in choice.names if name in results.images]
    panels = _byte_panels(results, images)
    # An image of no size would have no place on a logarithmic axis.
    sizes = [image.compressed_bytes / MB for image in images if image.compressed_bytes]
    if not panels or not sizes:
        return None
    figure, rows = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 5), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    drawn = [value / MB for _, values in panels for value in values.values() if value]
    left, right = min(sizes) / 1.5, max(sizes) * 1.5
    for axes, (title, values) in zip(rows[0], panels, strict=True):
        for part, label in ((1, "all of it"), (10, "1/10"), (100, "1/100")):
            axes.plot([left, right], [left / part, right / part], color="0.8", linewidth=1, zorder=0)
            axes.annotate(
                label, (right, right / part), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7,
                color="0.45",
            )  # fmt: skip
        for image in images:
            value = values[image.workload]
            if value and image.compressed_bytes:
                colour = CATEGORY_COLOURS.get(image.category, GREY)
                axes.scatter(
                    image.compressed_bytes / MB, value / MB, s=38, linewidths=1.3, edgecolors=colour,
                    marker=CATEGORY_MARKERS.get(image.category, "o"), facecolors="none" if image.fat else colour,
                )  # fmt: skip
        axes.set_xlim(left, right)
        axes.set_ylim(min(drawn) / 2, max(right, 1.5 * max(drawn)))  # more than the image: its index is fetched, too
        plain_log(axes, "both")
        axes.set_xlabel("image, MB compressed")
        axes.set_title(f"{title} ({choice.title}, n = {sum(bool(v) for v in values.values())})")
    rows[0][0].set_ylabel("MB compressed")
    handles = [
        Line2D([], [], linestyle="", marker=CATEGORY_MARKERS.get(c, "o"), color=CATEGORY_COLOURS.get(c, GREY))
        for c in order((image.category for image in images), CATEGORIES)
    ]
    labels = order((image.category for image in images), CATEGORIES)
    if any(image.fat for image in images):
        handles.append(Line2D([], [], linestyle="", marker="o", color="0.3", markerfacecolor="none"))
        labels.append("hollow: fat flavour")
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


def second(results: Results, choice: Chosen, link: str) -> Any | None:
    """Two points a workload for the time, joined; beside it the share of hits."""
    from matplotlib import pyplot

    modes = [mode for mode in ("ctr", OURS) if mode in results.modes(link, SECOND, choice.names)]
    names = [n for n in choice.names if any(results.good(n, link, mode, SECOND) for mode in modes)]
    if not names:
        return None
    names = names[::-1]  # the first at the top
    figure, (times, hits) = pyplot.subplots(
        1, 2, figsize=(9.5, 1.4 + 0.22 * len(names)), sharey=True, width_ratios=(3, 1), layout="constrained"
    )
    for row, name in enumerate(names):
        both = [results.cell(name, link, mode, SECOND).median for mode in modes]
        known = [value for value in both if value is not None]
        times.plot(known, [row] * len(known), color="0.75", linewidth=1.5, zorder=1)
        share = hit_share(results, name, link)
        if share is not None:
            hits.barh(row, share, color=MODE_COLOURS[OURS], height=0.6)
        else:
            hits.annotate("not measured", (0.02, row), va="center", fontsize=6, color="0.45")
    for mode in modes:
        points = [(results.cell(name, link, mode, SECOND).median, row) for row, name in enumerate(names)]
        found = [(value, row) for value, row in points if value is not None]
        times.scatter(
            [v for v, _ in found], [row for _, row in found], color=MODE_COLOURS[mode], s=28, label=mode,
            marker="s" if mode == OURS else "o", zorder=2,
        )  # fmt: skip
    times.set_yticks(range(len(names)), names, fontsize=8)
    times.set_ylim(-0.7, len(names) - 0.3)
    plain_log(times, "x")
    times.grid(axis="x", color="0.9")
    times.set_xlabel("second run, median s")
    times.set_title(f"Second run, link {link} ({choice.title}, n = {len(names)})", fontsize=10)
    figure.legend(loc="outside lower left", ncols=2, fontsize=8, frameon=False)
    hits.set_xlim(0, 1)
    hits.xaxis.set_major_formatter("{x:.0%}")
    hits.set_xlabel("of the first start's bytes,\nnot fetched again", fontsize=8)
    hits.set_title(f"hits of {OURS}", fontsize=10)
    return figure


def depth(results: Results, choice: Chosen) -> Any | None:
    """Mean share of an image's data, and of the data that a start reads, in each layer from the bottom; and how the
    share of the bottom, the largest and the top layer is distributed over images."""
    from matplotlib import pyplot

    images = [results.images[name] for name in choice.names if name in results.images]
    data = [[layer.tar_bytes for layer in image.layers] for image in images]
    data = [column for column in data if sum(column)]
    read = [[layer.read_bytes for layer in image.layers] for image in images]
    read = [column for column in read if sum(column)]
    if not data:
        return None
    figure, (bars, shares) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    deepest = max(map(len, data))
    for offset, columns, colour, label in (
        (-0.2, data, "0.6", f"image data (n = {len(data)})"),
        (0.2, read, MODE_COLOURS[OURS], f"read by a start (n = {len(read)})"),
    ):
        if columns:
            means = [
                sum(column[i] / sum(column) for column in columns if i < len(column)) / len(columns)
                for i in range(deepest)
            ]
            bars.bar([i + 1 + offset for i in range(deepest)], means, width=0.38, color=colour, label=label)
    bars.set_xticks(range(1, deepest + 1, 1 + deepest // 16))
    bars.set_xlabel("layer, 1 = bottom")
    bars.set_ylabel("mean share of bytes")
    bars.yaxis.set_major_formatter("{x:.0%}")
    bars.set_title(f"By layer depth ({choice.title})", fontsize=10)
    bars.legend(fontsize=8)
    lines: list[tuple[str, Callable[[list[float]], float], str, str]] = [
        ("bottom layer", lambda column: column[0], "-", "black"),
        ("largest layer", max, "--", "0.35"),
        ("top layer", lambda column: column[-1], ":", "0.35"),
    ]
    for label, of, style, colour in lines:
        values = sorted(of(column) / sum(column) for column in data)
        startfigures.cumulative(shares, values, 0.0, 1.0, color=colour, linestyle=style, label=label)
    shares.set_xlim(0, 1)
    shares.set_ylim(0, 1)
    for axis in (shares.xaxis, shares.yaxis):
        axis.set_major_formatter("{x:.0%}")
    shares.set_xlabel("share of the image's bytes")
    shares.set_ylabel("images with at most that share")
    shares.set_title(f"How images put their data into layers (n = {len(data)})", fontsize=10)
    shares.legend(fontsize=8)
    return figure


def throughput(results: Results) -> Any | None:
    """A panel for each benchmark, a thin line for each round."""
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    drawn = [one for one in results.throughputs if one.points]
    benchmarks = sorted({one.benchmark for one in drawn})
    if not benchmarks:
        return None
    columns = min(2, len(benchmarks))
    rows = -(-len(benchmarks) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 2.9 * rows), squeeze=False, layout="constrained"
    )
    for axes, benchmark in zip(grid.flat, benchmarks, strict=False):
        notes = []
        for mode in order((one.mode for one in drawn if one.benchmark == benchmark), (OURS, OVERLAYFS)):
            found = [one for one in drawn if (one.benchmark, one.mode) == (benchmark, mode)]
            for one in found:
                axes.plot(
                    [second for second, _ in one.points], [rate for _, rate in one.points], linewidth=1.2, alpha=0.85,
                    color=MODE_COLOURS.get(mode, GREY), linestyle="-" if mode == OURS else "--",
                )  # fmt: skip
            first = median(one.first_s for one in found)
            notes.append(f"{mode} {first:.2f} s" if first is not None else mode)
        axes.set_title(f"{benchmark}; first answer: {', '.join(notes)}", fontsize=8.5)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_ylabel("operations/s", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    for axes in list(grid.flat)[len(benchmarks) :]:
        axes.set_visible(False)
    for axes in list(grid.flat)[max(0, len(benchmarks) - columns) : len(benchmarks)]:
        axes.set_xlabel("seconds since the load began", fontsize=8)
    found_modes = order((one.mode for one in drawn), (OURS, OVERLAYFS))
    handles = [
        Line2D([], [], color=MODE_COLOURS.get(mode, GREY), linestyle="-" if mode == OURS else "--")
        for mode in found_modes
    ]
    figure.legend(handles, found_modes, loc="outside lower center", ncols=len(found_modes), fontsize=8, frameon=False)
    return figure
