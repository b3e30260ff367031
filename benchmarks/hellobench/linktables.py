"""The report's tables of one link and one class of workloads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.hellobench import cells
from benchmarks.hellobench.cells import table
from benchmarks.hellobench.summary import (
    DEPLOYMENT,
    DEVELOPMENT,
    EAGER,
    FRESH,
    LINKS,
    LOCAL,
    NOINDEX,
    OPERATIONS,
    OURS,
    PACK,
    SECOND,
    Results,
    Speedup,
    median,
    order,
)
from benchmarks.hellobench.workloads import CATEGORIES

PHASES = ("push_s", "pull_s", "create_s", "run_s")
Names = Sequence[str]


def named(results: Results, workload: str) -> str:
    """A workload as the tables call it."""
    return cells.text(workload) + (" (fat)" if workload in results.images and results.images[workload].fat else "")


def modes_of(results: Results, link: str, operation: str, names: Names) -> list[str]:
    return [mode for mode in results.modes(link, operation, names) if mode != LOCAL]


def _having(results: Results, link: str, operation: str, names: Names) -> list[str]:
    """The workloads with at least one sample."""
    modes = modes_of(results, link, operation, names)
    return [name for name in names if any(results.good(name, link, mode, operation) for mode in modes)]


def _eager(modes: Names) -> list[str]:
    return [mode for mode in modes if mode in EAGER] if OURS in modes else []


def _gain(speedup: Speedup) -> str:
    return cells.times(speedup.ratio) + cells.counted(len(speedup.pairs))


def _gains(results: Results, workload: str, link: str, operation: str, eager: Names) -> list[str]:
    return [_gain(results.speedup(workload, link, operation, mode)) for mode in eager]


def _against(eager: Names) -> list[str]:
    return [f"{OURS} faster than {mode}" for mode in eager]


def deployment(results: Results, link: str, names: Names) -> str:
    """Pull, create, run on a host that has nothing, beside the limit."""
    modes = modes_of(results, link, DEPLOYMENT, names)
    eager = _eager(modes)
    rows = []
    for name in _having(results, link, DEPLOYMENT, names):
        image = results.images.get(name)
        times = []
        for mode in modes:
            over = results.over_limit(name, link, mode)
            cell = cells.time(results.cell(name, link, mode, DEPLOYMENT))
            times.append(cell if over is None else f"{cell}, {cells.times(over)}")
        rows.append(
            [
                named(results, name),
                cells.megabytes(image.compressed_bytes if image else None),
                cells.megabytes(image.needed_compressed_bytes if image else None),
                cells.digits(results.limit(name, link)),
                *times,
                *_gains(results, name, link, DEPLOYMENT, eager),
            ]
        )
    header = ["workload", "image MB", "needed MB", "limit s", *(f"{mode} s" for mode in modes), *_against(eager)]
    return table(header, rows)


def limits(results: Results, names: Names) -> str:
    """The limit of each workload on every link whose speed is known, whether it ran there or not, and its parts."""
    links = order((record.link for record in results.links), LINKS)
    rows = []
    for name in names:
        image, found = results.images.get(name), [results.limit(name, link) for link in links]
        if image is not None and any(limit is not None for limit in found):
            needed, local = cells.megabytes(image.needed_compressed_bytes), cells.digits(results.local(name))
            rows.append([named(results, name), needed, local, *map(cells.digits, found)])
    return table(["workload", "needed MB", "local start s", *(f"limit {link} s" for link in links)], rows)


def second(results: Results, link: str, names: Names) -> str:
    """Create and run again on a host that has the image, or what of it was fetched; the page cache is dropped."""
    modes = modes_of(results, link, SECOND, names)
    eager = _eager(modes)
    rows = [
        [
            named(results, name),
            *(cells.time(results.cell(name, link, mode, SECOND)) for mode in modes),
            *_gains(results, name, link, SECOND, eager),
            cells.megabytes(results.of("bytes_fetched", name, link, OURS, SECOND)),
            cells.percent(hit_share(results, name, link)),
        ]
        for name in _having(results, link, SECOND, names)
    ]
    return table(
        ["workload", *(f"{mode} s" for mode in modes), *_against(eager), f"{OURS} fetched MB", "hits"],
        rows,
    )


def hit_share(results: Results, workload: str, link: str) -> float | None:
    """Of the bytes that the first start fetched, the share that the second did not need to fetch."""
    first = results.of("bytes_fetched", workload, link, OURS, DEPLOYMENT)
    again = results.of("bytes_fetched", workload, link, OURS, SECOND)
    if not first or again is None:
        return None
    return max(0.0, 1 - again / first)


def development(results: Results, link: str, names: Names) -> str:
    """Push, pull, create, run after one file changed."""
    modes = modes_of(results, link, DEVELOPMENT, names)
    eager = _eager(modes)
    rows = []
    for name in _having(results, link, DEVELOPMENT, names):
        fresh = [cells.digits(results.fresh(name, link, mode)) for mode in modes]
        rows.append(
            [
                named(results, name),
                *(cells.time(results.cell(name, link, mode, DEVELOPMENT)) for mode in modes),
                *_gains(results, name, link, DEVELOPMENT, eager),
                *fresh,
                *(cells.times(results.gain(name, link, FRESH, mode)) for mode in eager),
            ]
        )
    header = ["workload", *(f"{mode} s" for mode in modes), *_against(eager)]
    computed = [*(f"fresh host, computed: {mode} s" for mode in modes), *(f"computed: {x}" for x in _against(eager))]
    return table([*header, *computed], rows)


def phases(results: Results, link: str, names: Names) -> str:
    """Where the time goes, for each mode: medians over those workloads that all these modes have."""
    rows = []
    for operation in OPERATIONS:
        modes, common = results.comparable(link, operation, names)
        for mode in modes:
            if mode == LOCAL:
                continue
            over = [median(results.of(phase, w, link, mode, operation) for w in common) for phase in PHASES]
            total = median(results.cell(w, link, mode, operation).median for w in common)
            rows.append([operation, mode, str(len(common)), *map(cells.digits, (*over, total))])
    header = ["operation", "mode", "workloads", "push s", "pull s", "create s", "run s", "total s"]
    return table(header, rows, left=2)


def phases_of_each(results: Results, link: str, operation: str, names: Names) -> str:
    """The same for each workload: "pull / create / run" in a cell."""
    modes = modes_of(results, link, operation, names)
    shown = PHASES if operation == DEVELOPMENT else PHASES[2:] if operation == SECOND else PHASES[1:]

    def cell(name: str, mode: str) -> str:
        if not results.good(name, link, mode, operation):
            return cells.DASH
        return " / ".join(cells.digits(results.of(phase, name, link, mode, operation)) for phase in shown)

    what = " / ".join(phase.removesuffix("_s") for phase in shown)
    rows = [
        [named(results, name), *(cell(name, mode) for mode in modes)]
        for name in _having(results, link, operation, names)
    ]
    return table(["workload", *(f"{mode}: {what} s" for mode in modes)], rows)


COUNTS = (
    "bytes_fetched", "requests", "bytes_read", "daemon_cpu_s", "daemon_memory_bytes", "link_bytes", "link_requests",
    "data_bytes",
)  # fmt: skip
_COUNTS_HEADER = [
    "fetched MB", "requests", "read MB", "fetched / needed", "read / needed", "daemon CPU s", "daemon memory MB",
    "when ready: MB on the link", "requests on the link", "without the index / needed",
]  # fmt: skip


def _counts(results: Results, name: str, link: str, mode: str) -> list[float | None]:
    """The counts of a deployment, and its amplifications: fetched by needed, both compressed; read by needed,
    neither; and what had come over the link when the container was ready, without the index, by needed."""
    found = (results.of(a, name, link, mode, DEPLOYMENT) for a in COUNTS)
    fetched, requests, read, cpu, memory, arrived, asked, data = found
    image = results.images.get(name)

    def share(part: float | None, needed: float | None) -> float | None:
        return part / needed if part is not None and needed else None

    needed = image.needed_compressed_bytes if image else None
    read_share = share(read, image.needed_bytes if image else None)
    return [fetched, requests, read, share(fetched, needed), read_share, cpu, memory, arrived, asked,
            share(data, needed)]  # fmt: skip


_SHOW: Sequence[Callable[[float | None], str]] = (
    cells.megabytes, cells.whole, cells.megabytes, cells.times, cells.times, cells.digits, cells.megabytes,
    cells.megabytes, cells.whole, cells.times,
)  # fmt: skip


def _shown(values: Iterable[float | None]) -> list[str]:
    return [show(value) for show, value in zip(_SHOW, values, strict=True)]


def counts(results: Results, link: str, mode: str, names: Names) -> str:
    """What a deployment by one mode of lazyfs fetches and costs, for each workload."""
    rows = []
    for name in names:
        found = _counts(results, name, link, mode)
        if any(value is not None for value in found):
            rows.append([named(results, name), *_shown(found)])
    return table(["workload", *_COUNTS_HEADER], rows)


def recorded(results: Results, link: str, names: Names) -> str:
    """Deployment with a pack, beside the limit and what it is compared with."""
    rows = []
    for name in names:
        if not results.good(name, link, PACK, DEPLOYMENT):
            continue
        image, pack = results.images.get(name), results.packs.get(name)
        rows.append(
            [
                named(results, name),
                cells.megabytes(image.needed_compressed_bytes if image else None),
                cells.megabytes(pack.pack_bytes if pack else None),
                cells.digits(pack.record_s if pack else None),
                cells.digits(results.limit(name, link)),
                cells.time(results.cell(name, link, PACK, DEPLOYMENT)),
                cells.times(results.over_limit(name, link, PACK)),
                *(_gain(results.speedup(name, link, DEPLOYMENT, theirs, PACK)) for theirs in _BESIDE_PACKS),
                cells.whole(results.of("link_requests", name, link, PACK, DEPLOYMENT)),
            ]
        )
    header = ["workload", "needed MB", "pack MB", "record s", "limit s", f"{PACK} s", "of the limit"]
    return table([*header, *(f"faster than {mode}" for mode in _BESIDE_PACKS), "requests until ready"], rows)


_BESIDE_PACKS = ("ctr", NOINDEX, OURS)


def counts_of_modes(results: Results, link: str, names: Names) -> str:
    """The medians over workloads of the same, for each mode."""
    rows = []
    modes, common = results.comparable(link, DEPLOYMENT, names)
    for mode in (mode for mode in modes if mode != LOCAL):
        columns = zip(*(_counts(results, name, link, mode) for name in common), strict=True)
        found = [median(column) for column in columns]
        if any(value is not None for value in found):
            rows.append([mode, str(len(common)), *_shown(found)])
    return table(["mode", "workloads", *_COUNTS_HEADER], rows)


def speedups(results: Results, link: str, names: Names) -> str:
    """How many times faster lazyfs is than each eager mode: over workloads, and the median of each category."""
    categories = [c for c in CATEGORIES if any(results.category(name) == c for name in names)]
    rows = []
    for operation in (*OPERATIONS, FRESH):
        for theirs in EAGER:
            found = {w: g for w in names if (g := results.gain(w, link, operation, theirs)) is not None}
            if not found:
                continue
            faster = sum(gain > 1 for gain in found.values())
            rows.append(
                [
                    operation + (" (computed)" if operation == FRESH else ""),
                    theirs,
                    cells.spread(list(found.values())),
                    f"{faster} of {len(found)}, {cells.percent(faster / len(found))}",
                    *(cells.times(median(g for w, g in found.items() if results.category(w) == c)) for c in categories),
                ]
            )
    return table(["operation", "against", f"median (range): {OURS} faster by", "is faster", *categories], rows, left=2)


def over_limit(results: Results, link: str, names: Names) -> str:
    """Deployment of each mode as a multiple of the limit, over workloads."""
    modes, common = results.comparable(link, DEPLOYMENT, names)
    rows = []
    for mode in (mode for mode in modes if mode != LOCAL):
        found = [over for w in common if (over := results.over_limit(w, link, mode)) is not None]
        if found:
            within = sum(over <= 2 for over in found)
            rows.append([mode, cells.spread(found), f"{within} of {len(found)}"])
    return table(["mode", "deployment / limit: median (range)", "within 2x"], rows)
