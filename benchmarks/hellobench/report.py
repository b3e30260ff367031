"""The report of a results file, as Markdown: written for a reader who doubts it.

First what measured, what the links gave, what ran and what did not; then the numbers, both classes of workloads
apart; then where lazyfs falls behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.hellobench import behind, cells, goals, linktables, ran
from benchmarks.hellobench.summary import (
    EAGER,
    MODES,
    OPERATIONS,
    OURS,
    PACK,
    PROFILE,
    Results,
    load,
    median,
    order,
    paired,
)

OVERLAYFS = "overlayfs"

DEFINITIONS = f"""\
How to read it: *deployment* is pull + create + run on a host that has nothing; *second* is create + run again on \
the host that has the image, or of a lazy one what was fetched, with the page cache dropped; *development* is \
push + pull + create + run of an image with one file changed, on a host that has the previous version. *Fresh host* \
is computed, not measured: the median push of the development plus the median deployment. A time is the median \
with the 95th percentile in brackets (nearest rank: with fewer than 20 samples the slowest), and n where there are \
fewer than {cells.ENOUGH} samples. "Faster by" is the median of the ratios of pairs from the same round; below 1x \
{OURS} is slower. The *limit* is the time no system could beat: needed bytes (compressed) / measured bandwidth + \
3 measured round trips + the start of the unpacked image in memory; deployments carry their multiple of it; \
lazyfs-shared can be below 1x, since another image has brought a part of the bytes. In lazyfs-pack the registry \
has a startup pack, recorded from one start elsewhere; in lazyfs-profile the host has started the image before, \
and everything but the profile was evicted; lazyfs-before is another build. *Hits* are of the bytes that the \
first start fetched, the share that the second run did not fetch again. \
MB are 1,000,000 bytes; image and needed MB are compressed. "{cells.DASH}" was not measured."""


def markdown(results: Results, figures: Sequence[tuple[str, str]] = ()) -> str:
    """The whole report. `figures`: (file name, caption) of what was drawn, to be shown."""
    parts = [
        "# HelloBench: what was measured\n\n",
        ran.machine(results),
        ran.links(results),
        ran.samples(results),
        ran.failures(results),
        ran.missing(results),
        f"{DEFINITIONS}\n\n" if results.samples else "",
        goals.markdown(results),
        limits(results),
        *(of_link(results, link) for link in results.link_names),
        memory(results),
        reading(results),
        throughput(results),
        behind.markdown(results) if results.samples else "",
        cells.section("## Figures", *(f"![{text}]({name})\n\n*{text}*" for name, text in figures)),
    ]
    return "".join(parts).rstrip("\n") + "\n"


def limits(results: Results) -> str:
    """One table of all links for each class."""
    tables = [(kind, linktables.limits(results, results.workloads(kind))) for kind in results.kinds]
    return cells.section(
        "## The limit: what no system could beat", *(_titled(ran.class_title(kind), body) for kind, body in tables)
    )


def of_link(results: Results, link: str) -> str:
    """All tables of a link, one class after the other."""
    speed, trip = results.bytes_s(link), results.rtt_s(link)
    facts = f" ({cells.digits(8 * speed / 1e6)} Mbit/s, {trip * 1000:.3g} ms measured)" if speed and trip else ""
    parts = [_of_class(results, link, kind) for kind in results.kinds if results.workloads(kind)]
    return cells.section(f"## Link {link}{facts}", *parts)


def _of_class(results: Results, link: str, kind: str) -> str:
    names = results.workloads(kind)
    each = [
        cells.folded(f"Phases of each {operation}", linktables.phases_of_each(results, link, operation, names))
        for operation in OPERATIONS
    ]
    body = [
        _titled("Summary over workloads", linktables.speedups(results, link, names)),
        _titled("Distance from the limit", linktables.over_limit(results, link, names)),
        _titled("Phases, medians over workloads", linktables.phases(results, link, names)),
        _titled("Deployment: median s (p95), multiple of the limit", linktables.deployment(results, link, names)),
        _titled("Deployment with a startup pack", linktables.recorded(results, link, names)),
        _titled("Second run", linktables.second(results, link, names)),
        _titled("Development", linktables.development(results, link, names)),
        *each,
        _titled("Counts of a deployment, medians over workloads", linktables.counts_of_modes(results, link, names)),
        *(
            _titled(f"Counts of a deployment by {mode}", linktables.counts(results, link, mode, names))
            for mode in (OURS, PACK, PROFILE)
        ),
    ]
    return cells.section(f"### {ran.class_title(kind)}", *body)


def _titled(title: str, table: str) -> str:
    return f"**{title}**\n\n{table}" if table else ""


def memory(results: Results) -> str:
    """Page cache of the host, and the daemon's share of memory, by number of containers."""
    counts = sorted({one.containers for one in results.pages})
    modes = order((one.mode for one in results.pages), (OURS, OVERLAYFS))
    header, rows = ["workload"], []
    for count in counts:
        header += [f"{mode} x {count}: page cache MB" for mode in modes]
    header += [f"daemon x {count}: memory MB" for count in counts]
    for workload in sorted({one.workload for one in results.pages}):
        row = [linktables.named(results, workload)]
        found = [one for one in results.pages if one.workload == workload]
        for count in counts:
            for mode in modes:
                chosen = [one.page_cache_bytes for one in found if (one.containers, one.mode) == (count, mode)]
                row.append(cells.megabytes(median(chosen)))
        ours = [one for one in found if one.mode == OURS]
        for count in counts:
            row.append(cells.megabytes(median(one.memory_bytes for one in ours if one.containers == count)))
        rows.append(row)
    return cells.section("## Memory with one container and with several of one image", cells.table(header, rows))


def reading(results: Results) -> str:
    """All files of the image, from cold."""
    modes = order((one.mode for one in results.wholes), MODES)
    eager = [mode for mode in modes if mode in EAGER] if OURS in modes else []
    rows = []
    for workload in sorted({one.workload for one in results.wholes}):
        found = [one for one in results.wholes if one.workload == workload]
        row = [linktables.named(results, workload), cells.megabytes(median(one.bytes for one in found))]
        for mode in modes:
            chosen = [one.seconds for one in found if one.mode == mode]
            row.append(cells.digits(median(chosen)) + cells.counted(len(chosen)))
        for mode in eager:
            pairs = behind.reading(results, workload, mode)
            row.append(cells.times(pairs.ratio) + cells.counted(len(pairs.pairs)))
        rows.append(row)
    header = [
        "workload",
        "read MB",
        *(f"{mode} s" for mode in modes),
        *(f"{OURS} faster than {mode}" for mode in eager),
    ]
    text = "A lazy mount and a read of every file, against pull, unpack and a read of every file."
    return cells.section("## Reading the whole image from cold", text, cells.table(header, rows)) if rows else ""


def throughput(results: Results) -> str:
    """Long runs after the start: lazyfs `rw` against overlayfs on ext4."""
    rows = []
    for benchmark in sorted({one.benchmark for one in results.throughputs}):
        found = [one for one in results.throughputs if one.benchmark == benchmark]
        ours, theirs = ([one for one in found if one.mode == mode] for mode in (OURS, OVERLAYFS))
        # A Speedup is theirs / ours: of rates that is the other way round.
        rate = paired(theirs, ours, lambda one: one.mean_per_s)
        first = paired(ours, theirs, lambda one: one.first_s)
        rows.append(
            [
                cells.text(benchmark),
                cells.digits(median(one.mean_per_s for one in ours)),
                cells.digits(median(one.mean_per_s for one in theirs)),
                cells.times(rate.ratio) + cells.counted(len(rate.pairs)),
                cells.digits(median(one.first_s for one in ours)),
                cells.digits(median(one.first_s for one in theirs)),
                cells.times(first.ratio) + cells.counted(len(first.pairs)),
            ]
        )
    header = [
        "benchmark", f"{OURS} operations/s", f"{OVERLAYFS} operations/s", f"{OURS} / {OVERLAYFS}",
        f"{OURS} first answer s", f"{OVERLAYFS} first answer s", f"first answer: {OURS} faster by",
    ]  # fmt: skip
    text = "Medians; ratios are medians of the pairs of one round. Above 1x is better for lazyfs in both."
    return cells.section("## Long-running", text, cells.table(header, rows)) if rows else ""


def write(results_path: Path, directory: Path) -> list[Path]:
    """Write report.md and the figures into `directory`, which is made; returns their paths, the report first.

    Raises ResultsError and OSError; ImportError without matplotlib.
    """
    from benchmarks.hellobench import figures

    results = load(results_path)
    directory.mkdir(parents=True, exist_ok=True)
    drawn = figures.draw(results, directory)
    report = directory / "report.md"
    report.write_text(markdown(results, [(path.name, figures.caption(path)) for path in drawn]))
    return [report, *drawn]
