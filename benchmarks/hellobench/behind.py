"""Where lazyfs falls behind: found in the results, so that nobody has to choose what to admit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.hellobench import cells
from benchmarks.hellobench.linktables import PHASES, named
from benchmarks.hellobench.summary import (
    DEPLOYMENT,
    EAGER,
    OPERATIONS,
    OURS,
    Results,
    Speedup,
    paired,
)

# A deployment that takes more than this many times the limit is named.
FACTOR = 3.0
SHOWN = 10


@dataclass(frozen=True)
class Slower:
    """Where the median of the pairs is to the disadvantage of lazyfs; `factor` > 1: that of the times."""

    where: str
    operation: str
    link: str
    theirs: str
    speedup: Speedup

    @property
    def factor(self) -> float:
        ratio = self.speedup.ratio
        return 1 / ratio if ratio else 1.0


def slower(results: Results) -> list[Slower]:
    """Every workload, link and operation in which lazyfs takes longer than an eager mode; the worst first."""
    found = [one for one in _compared(results) if one.speedup.ratio is not None and one.speedup.ratio < 1]
    return sorted(found, key=lambda one: -one.factor)


def _compared(results: Results) -> Iterator[Slower]:
    workloads = [name for kind in results.kinds for name in results.workloads(kind)]
    for name in workloads:
        for theirs in EAGER:
            for link in results.link_names:
                for operation in OPERATIONS:
                    yield Slower(name, operation, link, theirs, results.speedup(name, link, operation, theirs))
            yield Slower(name, "whole image read", cells.DASH, theirs, reading(results, name, theirs))


def reading(results: Results, workload: str, theirs: str) -> Speedup:
    """Pairs of reading the whole image."""
    of_workload = [one for one in results.wholes if one.workload == workload]
    sides = ([one for one in of_workload if one.mode == mode] for mode in (OURS, theirs))
    ours, others = sides
    return paired(ours, others, lambda one: one.seconds)


def over_limit(results: Results, factor: float = FACTOR) -> list[tuple[float, str, str]]:
    """(multiple of the limit, workload, link) of deployments over `factor` times the limit; the worst first."""
    found = []
    for name in dict.fromkeys(sample.workload for sample in results.samples):
        for link in results.link_names:
            over = results.over_limit(name, link, OURS)
            if over is not None and over > factor:
                found.append((over, name, link))
    return sorted(found, reverse=True)


def markdown(results: Results) -> str:
    """Both lists; says so if one is empty."""
    behind = slower(results)
    rows = [
        [
            named(results, one.where),
            one.operation,
            one.link,
            one.theirs,
            cells.times(one.factor),
            cells.digits(one.speedup.behind_s),
            f"{one.speedup.slower} of {len(one.speedup.pairs)}",
        ]
        for one in behind
    ]
    header = ["workload", "operation", "link", "slower than", "by", "by s", "pairs in which it is slower"]
    always = sum(one.speedup.slower == len(one.speedup.pairs) for one in behind)
    first = f"{OURS} is slower than an eager mode (median of the pairs of one round) in {len(rows)} cases"
    first += f", in {always} of them in every pair" if rows else ""
    parts = [f"{first}; the {SHOWN} worst, as factors:" if len(rows) > SHOWN else f"{first}:" if rows else f"{first}."]
    parts.append(cells.table(header, rows[:SHOWN], left=4))
    parts.append(cells.folded(f"The other {len(rows) - SHOWN}", cells.table(header, rows[SHOWN:], left=4)))
    over = over_limit(results)
    known = sum(
        results.over_limit(w, link, OURS) is not None
        for w in {s.workload for s in results.samples}
        for link in results.link_names
    )
    second = f"Of {known} deployments with a known limit, {len(over)} take {OURS} more than {FACTOR:g}x the limit"
    parts.append(f"{second}; the worst by ratio, {SHOWN} at most:" if over else f"{second}.")
    parts.append(cells.table(_OVER, [_over_row(results, *one) for one in over[:SHOWN]], left=2))
    return cells.section("## Where lazyfs falls behind", *parts)


_OVER = ["workload", "link", "limit s", f"{OURS} s", "ratio", "pull s", "create s", "run s", "local start s"]


def _over_row(results: Results, over: float, name: str, link: str) -> list[str]:
    return [
        named(results, name),
        link,
        cells.digits(results.limit(name, link)),
        cells.time(results.cell(name, link, OURS, DEPLOYMENT)),
        cells.times(over),
        *(cells.digits(results.of(phase, name, link, OURS, DEPLOYMENT)) for phase in PHASES[1:]),
        cells.digits(results.local(name)),
    ]
