"""What starts are to reach, and what the results say: one table, every bar with the figure that decides on it.

Medians over workloads of medians over samples, unless a row says otherwise; ratios are medians of pairs of one round.
Workloads of the paper (class E); the held-back ones stand in rows of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.hellobench import cells
from benchmarks.hellobench.catalogue import HELD_BACK
from benchmarks.hellobench.summary import (
    BEFORE,
    DEPLOYMENT,
    NOINDEX,
    OURS,
    PACK,
    PROFILE,
    Results,
    median,
    p95,
)
from benchmarks.hellobench.workloads import SAME

# What cannot be below the limit by much: of these, being as quick as others would say nothing.
SMALL = ("busybox", "hello-world")
SMALL_FASTER = 1.2
# It needs less than its manifest: no ratio of bytes says anything of it.
LEAST = "hello-world"


@dataclass(frozen=True)
class Goal:
    """One row. `value` is compared with `bar`; `shown` is what was measured, in words and figures."""

    title: str
    link: str
    bar: float
    value: float
    shown: str
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.bar if self.at_least else self.value <= self.bar


@dataclass(frozen=True)
class PerLink:
    """A bar that is another one over each link."""

    lan: float
    wan: float

    def of(self, link: str) -> float | None:
        return {"lan": self.lan, "wan": self.wan}.get(link)


FASTER_THAN_CTR = PerLink(6.0, 8.0)
FASTER_THAN_BEFORE = PerLink(1.8, 1.8)
# Over loopback and 200 Mbit/s, of the held-back ones.
PROFILED_FASTER_THAN_BEFORE = {"loopback": 2.0, "wan": 2.5}
MOST_REQUESTS = 12
DATA_OF_NEEDED = 1.6
MEDIAN_OF_LIMIT, MEDIAN_BEYOND_S = 1.25, 0.12
P95_OF_LIMIT, P95_BEYOND_S = 1.6, 0.2
WARM_RUN = 1.25
CPU_MS = 2.0


def goals(results: Results) -> list[Goal]:
    """The rows for which there are results."""
    names = results.workloads(SAME)
    found: list[Goal] = []
    for link in results.link_names:
        found += _against_ctr(results, link, names)
        found += _against_limit(results, link, names)
        found += _requests(results, link, names)
        found += _bytes(results, link, names)
        found += _every_image(results, link, names)
        found += _against_before(results, link, names)
        found += _held_back(results, link)
        found += _cpu(results, link, names)
    return [*found, *_warm(results)]


def markdown(results: Results) -> str:
    """The table; bold where a bar is missed."""
    rows = [
        [
            goal.title,
            goal.link,
            f"{'at least' if goal.at_least else 'at most'} {goal.bar:g}",
            goal.shown if goal.met else f"**{goal.shown}**",
        ]
        for goal in goals(results)
    ]
    text = "Bold: missed. Ranges are from the least to the greatest over workloads."
    table = cells.table(["measure", "link", "bar", "measured"], rows, left=4)
    return cells.section("## What starts are to reach", text, table) if rows else ""


def _known(names: Sequence[str], value: Callable[[str], float | None]) -> dict[str, float]:
    """Of the workloads that have it."""
    return {name: found for name in names if (found := value(name)) is not None}


def _faster(results: Results, link: str, names: Sequence[str], theirs: str, ours: str) -> dict[str, float]:
    return _known(names, lambda name: results.speedup(name, link, DEPLOYMENT, theirs, ours).ratio)


def _median(found: dict[str, float]) -> float:
    value = median(found.values())
    assert value is not None
    return value


def _spread(found: dict[str, float]) -> str:
    return f"{cells.spread(list(found.values()))}, workloads: {len(found)}"


def _worst(found: dict[str, float], highest: bool = True) -> str:
    return (max if highest else min)(found, key=lambda name: found[name])


def _against_ctr(results: Results, link: str, names: Sequence[str]) -> Iterator[Goal]:
    bar, found = FASTER_THAN_CTR.of(link), _faster(results, link, names, "ctr", PACK)
    if bar is not None and found:
        yield Goal("deployment with a pack, times faster than ctr", link, bar, _median(found), _spread(found), True)


def _against_limit(results: Results, link: str, names: Sequence[str]) -> Iterator[Goal]:
    def beyond(seconds: float) -> dict[str, float]:
        def multiple(name: str) -> float | None:
            limit, time = results.limit(name, link), results.cell(name, link, PACK, DEPLOYMENT).median
            return (time - seconds) / limit if limit and time is not None else None

        return _known(names, multiple)

    found = beyond(MEDIAN_BEYOND_S)
    if not found or link not in ("lan", "wan"):
        return
    title = f"deployment with a pack less {MEDIAN_BEYOND_S:g} s, of the limit, median"
    yield Goal(title, link, MEDIAN_OF_LIMIT, _median(found), _spread(found))
    found = beyond(P95_BEYOND_S)
    value = p95(list(found.values()))
    assert value is not None
    worst = _worst(found)
    shown = f"{cells.times(value)}; the worst is {worst}, {cells.times(found[worst])}"
    title = f"the same less {P95_BEYOND_S:g} s, 95th percentile over workloads"
    yield Goal(title, link, P95_OF_LIMIT, value, shown)


def _requests(results: Results, link: str, names: Sequence[str]) -> Iterator[Goal]:
    found = _known(names, lambda name: results.of("link_requests", name, link, PACK, DEPLOYMENT))
    if found:
        worst = _worst(found)
        shown = f"{found[worst]:.0f} ({worst}); median {_median(found):.0f}, workloads: {len(found)}"
        title = "requests until ready with a pack, as the link counts, the most of all workloads"
        yield Goal(title, link, MOST_REQUESTS, found[worst], shown)


def _bytes(results: Results, link: str, names: Sequence[str]) -> Iterator[Goal]:
    def share(name: str) -> float | None:
        fetched, image = results.of("data_bytes", name, link, PACK, DEPLOYMENT), results.images.get(name)
        return None if fetched is None or image is None else fetched / image.needed_compressed_bytes

    found = _known([name for name in names if name != LEAST], share)
    if found:
        title = f"bytes until ready with a pack, without the index, of what is needed (without {LEAST})"
        yield Goal(title, link, DATA_OF_NEEDED, _median(found), _spread(found))


def _every_image(results: Results, link: str, names: Sequence[str]) -> Iterator[Goal]:
    for theirs in (NOINDEX, "ctr"):
        found = _faster(results, link, names, theirs, PACK)
        slow = sorted((n for n in found if found[n] <= 1), key=lambda name: found[name])
        if found:
            named = "".join(f"; not {name} ({cells.times(found[name])})" for name in slow)
            shown = f"{len(found) - len(slow)} of {len(found)} workloads{named}"
            title = f"workloads that start faster with a pack than by {theirs}"
            yield Goal(title, link, len(found), len(found) - len(slow), shown, True)
        small = {name: ratio for name, ratio in found.items() if name in SMALL}
        if small:
            shown = ", ".join(f"{name} {cells.times(ratio)}" for name, ratio in small.items())
            yield Goal(f"{' and '.join(small)}: times faster than {theirs}", link, SMALL_FASTER,
                       min(small.values()), shown, True)  # fmt: skip


def _against_before(results: Results, link: str, names: Sequence[str]) -> Iterator[Goal]:
    bar, found = FASTER_THAN_BEFORE.of(link), _faster(results, link, names, BEFORE, OURS)
    if bar is not None and found:
        title = "cold without pack or profile, times faster than the build before"
        yield Goal(title, link, bar, _median(found), _spread(found), True)


def _held_back(results: Results, link: str) -> Iterator[Goal]:
    for ours, what in ((OURS, "without pack or profile"), (PROFILE, "with a profile")):
        found = _faster(results, link, HELD_BACK, BEFORE, ours)
        bar = PROFILED_FASTER_THAN_BEFORE.get(link) if ours == PROFILE else FASTER_THAN_BEFORE.of(link)
        if found and bar is not None:
            shown = ", ".join(f"{name} {cells.times(ratio)}" for name, ratio in found.items())
            title = f"held-back images {what}, times faster than the build before, each"
            yield Goal(title, link, bar, min(found.values()), shown, True)


def _cpu(results: Results, link: str, names: Sequence[str]) -> Iterator[Goal]:
    found = _known(names, lambda name: results.of("cpu_s_per_request", name, link, OURS, DEPLOYMENT))
    if found and link == "lan":
        in_ms = {name: 1000 * value for name, value in found.items()}
        shown = f"{cells.spread(list(in_ms.values()), '')}, workloads: {len(in_ms)}"
        parts = _cpu_parts(results, link, list(found))
        if parts is not None:
            # Requests for much at once cost more than small ones.
            shown += f"; by least squares {cells.digits(parts[0])} ms a request and {cells.digits(parts[1])} ms a MB"
        yield Goal("CPU of the daemon for a request without a pack, ms", link, CPU_MS, _median(in_ms), shown)


def _cpu_parts(results: Results, link: str, names: Sequence[str]) -> tuple[float, float] | None:
    """(ms a request, ms a fetched MB) that explain the workloads' CPU time best; None if they cannot be told apart."""
    counts = ("requests", "bytes_fetched", "daemon_cpu_s")
    rows = [[results.of(count, name, link, OURS, DEPLOYMENT) or 0.0 for count in counts] for name in names]
    points = [(requests, fetched / 1e6, 1000 * cpu_s) for requests, fetched, cpu_s in rows]
    aa, ab, bb = (sum(p[i] * p[j] for p in points) for i, j in ((0, 0), (0, 1), (1, 1)))
    ac, bc = (sum(p[i] * p[2] for p in points) for i in (0, 1))
    determinant = aa * bb - ab * ab
    if determinant <= 1e-9 * aa * bb:
        return None
    return (ac * bb - bc * ab) / determinant, (aa * bc - ab * ac) / determinant


def _warm(results: Results) -> Iterator[Goal]:
    ratio = median(one.run_s / one.by_hand_s for one in results.warms)
    if ratio is not None:
        run_s = _milliseconds(one.run_s for one in results.warms)
        by_hand_s = _milliseconds(one.by_hand_s for one in results.warms)
        shown = f"{cells.times(ratio)} ({run_s} / {by_hand_s} ms, {len(results.warms)} pairs)"
        yield Goal("warm `lazyfs run` against mount, runc and umount by hand", cells.DASH, WARM_RUN, ratio, shown)


def _milliseconds(seconds: Iterable[float]) -> str:
    value = median(seconds)
    return cells.DASH if value is None else f"{1000 * value:.0f}"
