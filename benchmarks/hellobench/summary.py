"""What follows from the results: medians, ratios of pairs, and the limit that no system could beat.

All times are seconds, all sizes bytes. `None` is "not measured" everywhere; nothing is guessed from other cells.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

from benchmarks.hellobench.lines import (
    Host,
    Image,
    Link,
    Pack,
    Pages,
    ResultsError,
    Sample,
    Throughput,
    Warm,
    Whole,
    read,
)
from benchmarks.hellobench.workloads import CATEGORIES, HELD_BACK, RELATIVE, SAME

__all__ = ["Cell", "Results", "ResultsError", "Speedup", "load", "median", "p95"]

DEPLOYMENT, SECOND, DEVELOPMENT = "deployment", "second", "development"
# Computed from the two: the push of a development, then a deployment on a host that has nothing.
FRESH = "development, fresh host"
OPERATIONS = (DEPLOYMENT, SECOND, DEVELOPMENT)
OURS = "lazyfs"
EAGER = ("ctr", "umoci")
NOINDEX, PACK, PROFILE, BEFORE = "lazyfs-noindex", "lazyfs-pack", "lazyfs-profile", "lazyfs-before"
MODES = (*EAGER, OURS, NOINDEX, "lazyfs-shared", PACK, PROFILE, BEFORE)
LOCAL = "local"
LINKS = ("loopback", "lan", "wan", "home")
KINDS = (SAME, RELATIVE, HELD_BACK)
# Without which nothing can be fetched: connect, ask for the tag, ask for data.
ROUND_TRIPS = 3
# A mode measured on fewer of the workloads than this stays out of averages over workloads.
COVERAGE = 0.8


def median(values: Iterable[float | None]) -> float | None:
    """Of those that were measured; None if none was."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


def p95(values: Sequence[float]) -> float | None:
    """By nearest rank: the smallest sample that at least 95 % do not exceed. Up to 19 samples: the largest."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1] if values else None


def order(values: Iterable[str], known: Sequence[str]) -> list[str]:
    """The distinct values, those known first and in that order."""
    found = set(values)
    return [value for value in known if value in found] + sorted(found.difference(known))


@dataclass(frozen=True)
class Cell:
    """The times of one workload, link, mode and operation that succeeded."""

    values: tuple[float, ...]

    @property
    def median(self) -> float | None:
        return median(self.values)

    @property
    def p95(self) -> float | None:
        return p95(self.values)


@dataclass(frozen=True)
class Speedup:
    """Pairs (ours, theirs) in seconds, both of one round; more than 1: ours is faster."""

    pairs: tuple[tuple[float, float], ...]

    @property
    def ratio(self) -> float | None:
        """The median of theirs / ours."""
        return median(theirs / ours for ours, theirs in self.pairs if ours > 0)

    @property
    def slower(self) -> int:
        """Pairs in which ours took longer."""
        return sum(ours > theirs for ours, theirs in self.pairs)

    @property
    def behind_s(self) -> float | None:
        """The median of ours - theirs."""
        return median(ours - theirs for ours, theirs in self.pairs)


class _Measured(Protocol):
    @property
    def run(self) -> str: ...
    @property
    def round(self) -> int: ...


_M = TypeVar("_M", bound=_Measured)


def paired(ours: Iterable[_M], theirs: Iterable[_M], value: Callable[[_M], float | None]) -> Speedup:
    """Both sides of the same round of the same run, one pair a round: the last run's that has both. Samples of two
    runs are no pair: the machine was another one between them."""
    sides: tuple[dict[int, dict[str, float]], dict[int, dict[str, float]]] = (defaultdict(dict), defaultdict(dict))
    for side, samples in zip(sides, (ours, theirs), strict=True):
        for sample in samples:
            if (number := value(sample)) is not None:
                of_run = side[sample.round]
                of_run.pop(sample.run, None)  # so that the last one measured is the last one here
                of_run[sample.run] = number
    pairs = []
    for round_number in sorted(set(sides[0]) & set(sides[1])):
        left, right = (side[round_number] for side in sides)
        both = [run for run in left if run in right]
        if both:
            pairs.append((left[both[-1]], right[both[-1]]))
    return Speedup(tuple(pairs))


@dataclass(frozen=True)
class Results:
    """A results file. `unknown`: lines of kinds that this version does not read."""

    hosts: list[Host] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    images: dict[str, Image] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    packs: dict[str, Pack] = field(default_factory=dict)
    warms: list[Warm] = field(default_factory=list)
    pages: list[Pages] = field(default_factory=list)
    wholes: list[Whole] = field(default_factory=list)
    throughputs: list[Throughput] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)

    @cached_property
    def _good(self) -> dict[tuple[str, str, str, str], list[Sample]]:
        found: dict[tuple[str, str, str, str], list[Sample]] = defaultdict(list)
        for sample in self.samples:
            if sample.ok and sample.total_s is not None:
                found[sample.workload, sample.link, sample.mode, sample.operation].append(sample)
        return dict(found)

    def good(self, workload: str, link: str, mode: str, operation: str) -> list[Sample]:
        """The samples that succeeded."""
        return self._good.get((workload, link, mode, operation), [])

    @property
    def failures(self) -> list[Sample]:
        return [sample for sample in self.samples if not sample.ok]

    @cached_property
    def link_names(self) -> list[str]:
        return order((s.link for s in self.samples if s.mode != LOCAL), LINKS)

    def modes(self, link: str, operation: str, workloads: Iterable[str]) -> list[str]:
        """Those with at least one good sample of these workloads."""
        wanted = set(workloads)
        return order((m for w, n, m, o in self._good if n == link and o == operation and w in wanted), MODES)

    def category(self, workload: str) -> str:
        return self.images[workload].category if workload in self.images else "other"

    def workloads(self, kind: str) -> list[str]:
        """Of one class, by category and name. A workload without an image record is of class "?"."""
        names = {s.workload for s in self.samples} | set(self.images)
        found = [name for name in names if self.kind(name) == kind]
        rank = {category: i for i, category in enumerate(order(map(self.category, found), CATEGORIES))}
        return sorted(found, key=lambda name: (rank[self.category(name)], name))

    def kind(self, workload: str) -> str:
        return self.images[workload].kind if workload in self.images else "?"

    @cached_property
    def kinds(self) -> list[str]:
        return order(map(self.kind, {s.workload for s in self.samples} | set(self.images)), KINDS)

    def cell(self, workload: str, link: str, mode: str, operation: str) -> Cell:
        samples = self.good(workload, link, mode, operation)
        return Cell(tuple(s.total_s for s in samples if s.total_s is not None))

    def of(self, attribute: str, workload: str, link: str, mode: str, operation: str) -> float | None:
        """The median of another field of the samples, such as "pull_s" or "requests"."""
        return median(getattr(s, attribute) for s in self.good(workload, link, mode, operation))

    def speedup(self, workload: str, link: str, operation: str, theirs: str, ours: str = OURS) -> Speedup:
        """Of the total times, ours against theirs."""
        left, right = (self.good(workload, link, mode, operation) for mode in (ours, theirs))
        return paired(left, right, lambda sample: sample.total_s)

    def fresh(self, workload: str, link: str, mode: str) -> float | None:
        """A development whose run is on a host that has nothing: computed, the sum of two medians."""
        push = self.of("push_s", workload, link, mode, DEVELOPMENT)
        deployment = self.cell(workload, link, mode, DEPLOYMENT).median
        return None if push is None or deployment is None else push + deployment

    def gain(self, workload: str, link: str, operation: str, theirs: str, ours: str = OURS) -> float | None:
        """How many times faster ours is: the median over pairs; for FRESH, of the two computed times."""
        if operation != FRESH:
            return self.speedup(workload, link, operation, theirs, ours).ratio
        mine, other = self.fresh(workload, link, ours), self.fresh(workload, link, theirs)
        return other / mine if mine and other is not None else None

    def bytes_s(self, link: str) -> float | None:
        return median(record.bytes_s for record in self.links if record.link == link)

    def rtt_s(self, link: str) -> float | None:
        return median(record.rtt_s for record in self.links if record.link == link)

    @cached_property
    def _local(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = defaultdict(list)
        for (workload, _link, mode, _operation), samples in self._good.items():
            if mode == LOCAL:
                found[workload].extend(s.total_s for s in samples if s.total_s is not None)
        return dict(found)

    def local_times(self, workload: str) -> list[float]:
        """Starts of the image unpacked and in memory, which no link has a part in."""
        return self._local.get(workload, [])

    def local(self, workload: str) -> float | None:
        """Their median: the part of the limit that is no transfer."""
        return median(self.local_times(workload))

    def limit(self, workload: str, link: str) -> float | None:
        """Seconds that no system could beat: what a start needs at the link's measured speed, the round trips that
        cannot be avoided, and the local start."""
        image, local = self.images.get(workload), self.local(workload)
        speed, trip = self.bytes_s(link), self.rtt_s(link)
        if image is None or local is None or not speed or trip is None:
            return None
        return image.needed_compressed_bytes / speed + ROUND_TRIPS * trip + local

    def over_limit(self, workload: str, link: str, mode: str) -> float | None:
        """A deployment's median time as a multiple of the limit."""
        limit, time = self.limit(workload, link), self.cell(workload, link, mode, DEPLOYMENT).median
        return time / limit if limit and time is not None else None

    def comparable(self, link: str, operation: str, workloads: Sequence[str]) -> tuple[list[str], list[str]]:
        """(modes, workloads): the modes that cover nearly all of the workloads, and those workloads that all these
        modes have, so that averages over workloads compare like with like."""
        covered = {
            mode: {w for w in workloads if self.good(w, link, mode, operation)}
            for mode in self.modes(link, operation, workloads)
        }
        most = max(map(len, covered.values()), default=0)
        modes = [mode for mode, found in covered.items() if len(found) >= COVERAGE * most]
        return modes, [w for w in workloads if modes and all(w in covered[mode] for mode in modes)]


def load(path: Path) -> Results:
    """Read a results file. Of an image described twice the last description counts. Raises ResultsError (version,
    damaged line, missing field), OSError."""
    records, unknown = read(path)
    results = Results(unknown=unknown)
    for record in records:
        match record:
            case Host():
                results.hosts.append(record)
            case Link():
                results.links.append(record)
            case Image():
                results.images[record.workload] = record
            case Sample():
                results.samples.append(record)
            case Pack():
                results.packs[record.workload] = record
            case Warm():
                results.warms.append(record)
            case Pages():
                results.pages.append(record)
            case Whole():
                results.wholes.append(record)
            case Throughput():
                results.throughputs.append(record)
    return results
