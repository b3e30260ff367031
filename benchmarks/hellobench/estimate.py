"""How long a run will take, from the results of an earlier one: said before it begins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks.hellobench.journal import Journal
from benchmarks.hellobench.links import Link
from benchmarks.hellobench.modes import DEPLOYMENT, operations_of
from benchmarks.hellobench.summary import BEFORE, OURS, PACK, PROFILE, Results, load
from benchmarks.hellobench.workloads import Workload

# Beside what is timed, as the committed results' times of day tell: a round's daemons come to rest, and hosts are made
# and given up.
ROUND_S = 4.0
OPERATION_S = 0.8
# What is done once for each workload: pushing, indexing, the facts about the image, and the same for each local start.
WORKLOAD_S = 12.0
PREPARED_S = 8.0  # for a pack, a profile, another build's index
LOCAL_S = 2.5
UNKNOWN_S = 5.0  # of a deployment, when nothing at all is known

COMMITTED = Path(__file__).resolve().parents[1] / "results/hellobench/results.jsonl"


class Estimate:
    """Seconds of rounds, by the samples of an earlier run; what was not measured there is taken from what was."""

    def __init__(self, known: Results) -> None:
        self._known = known
        self._seconds: dict[tuple[str, str], dict[str, float]] = {}

    def round_s(self, workload: str, link: str, modes: Sequence[str], operations: Sequence[str]) -> float:
        """One round: every mode once."""
        total = ROUND_S
        for mode in modes:
            wanted = [one for one in operations_of(mode) if one in operations]
            # A deployment comes first, whether it is wanted or not.
            for operation in {DEPLOYMENT, *wanted} if wanted else ():
                total += OPERATION_S + self._operation_s(workload, link, mode, operation)
        return total

    def workload_s(self, modes: Sequence[str], samples: int) -> float:
        """What is done once, before the rounds."""
        return WORKLOAD_S + LOCAL_S * samples + PREPARED_S * sum(mode in (PACK, PROFILE, BEFORE) for mode in modes)

    def _operation_s(self, workload: str, link: str, mode: str, operation: str) -> float:
        # A lazy mode that was never measured takes at most what lazyfs took.
        stand_in = mode if self._best(mode) else OURS
        found = self._known.cell(workload, link, stand_in, operation).median
        return self._scaled_s(workload, link, stand_in) if found is None else found

    def _scaled_s(self, workload: str, link: str, mode: str) -> float:
        """Of a deployment, by the link on which the most was measured, and by those that both links have."""
        known = self._best(mode)
        here = self._deployments(link, mode)
        common = [name for name in here if name in known]
        factor = sum(here[name] for name in common) / sum(known[name] for name in common) if common else 1.0
        return factor * known.get(workload, mean(known.values()) if known else UNKNOWN_S)

    def _best(self, mode: str) -> dict[str, float]:
        return max((self._deployments(link, mode) for link in self._known.link_names), key=len, default={})

    def _deployments(self, link: str, mode: str) -> dict[str, float]:
        """Workload -> seconds."""
        if (link, mode) not in self._seconds:
            names = [workload for kind in self._known.kinds for workload in self._known.workloads(kind)]
            medians = {name: self._known.cell(name, link, mode, DEPLOYMENT).median for name in names}
            self._seconds[link, mode] = {name: time for name, time in medians.items() if time is not None}
        return self._seconds[link, mode]


def committed() -> Estimate:
    """By the results that the project keeps; raises ResultsError, OSError."""
    return Estimate(load(COMMITTED))


def spoken(seconds: float) -> str:
    """For people: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Remaining:
    """How long a run will take: before it, and after each workload by what those before it really took."""

    def __init__(
        self,
        links: Sequence[Link],
        workloads: Sequence[Workload],
        modes: Sequence[str],
        operations: Sequence[str],
        samples: int,
        journal: Journal,
    ) -> None:
        known = committed()
        self._parts: dict[tuple[str, str], float] = {}  # link and workload -> seconds
        rounds = 0
        for link in links:
            for workload in workloads:
                missing = len(missing_rounds(journal, link, workload, modes, operations, samples))
                each_s = known.round_s(workload.name, link.name, modes, operations)
                once_s = known.workload_s(modes, samples) if missing and not journal.has_image(workload.name) else 0.0
                self._parts[link.name, workload.name] = missing * each_s + (once_s if link is links[0] else 0.0)
                rounds += missing
        self._expected_s, self._spent_s = 0.0, 0.0
        self._last = time.monotonic()
        self.introduction = ""  # nothing to say where nothing is missing
        if rounds:
            counted = f"{len(workloads)} workloads over {', '.join(link.name for link in links)}, {len(modes)} modes"
            about = spoken(sum(self._parts.values()))
            self.introduction = f"{counted}: {rounds} rounds are missing and will take about {about}"

    def after(self, link: Link, workload: Workload) -> str:
        """What to say when a workload is done over a link; "" if there was nothing to do."""
        now, expected_s = time.monotonic(), self._parts.pop((link.name, workload.name))
        spent_s, self._last = now - self._last, now
        if not expected_s:
            return ""
        self._expected_s += expected_s
        self._spent_s += spent_s
        left_s = sum(self._parts.values()) * self._spent_s / self._expected_s
        return f"{link.name} {workload.name}: done; about {spoken(left_s)} left"


def missing_rounds(
    journal: Journal, link: Link, workload: Workload, modes: Sequence[str], operations: Sequence[str], samples: int
) -> list[int]:
    """The numbers of those that lack a sample."""

    def has(mode: str, number: int) -> bool:
        wanted = (operation for operation in operations_of(mode) if operation in operations)
        return all(journal.has_sample(workload.name, link.name, mode, operation, number) for operation in wanted)

    return [number for number in range(samples) if not all(has(mode, number) for mode in modes)]
