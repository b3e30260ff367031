"""What the report is about: machine, links, and what ran and what did not. Nothing more is claimed elsewhere."""

from __future__ import annotations

from collections import Counter

from benchmarks.hellobench import cells, linktables
from benchmarks.hellobench.summary import LINKS, LOCAL, MODES, OPERATIONS, Results, order
from benchmarks.hellobench.workloads import HELD_BACK, RELATIVE, SAME

CLASSES = {
    SAME: "Class E: the same software as the paper's workload, rebuilt",
    RELATIVE: "Class N: near relatives of the paper's workloads, not the same software",
    HELD_BACK: "Class H: beside the paper's workloads, held back from tuning",
}
PAPER = 57
FAILURES_SHOWN = 30


def class_title(kind: str) -> str:
    """A class of workloads in words."""
    return CLASSES.get(kind, f"Class {cells.text(kind)}")


def machine(results: Results) -> str:
    """Each fact once; where several runs differ, all that it was."""
    facts: dict[str, list[str]] = {}
    for host in results.hosts:
        for name, value in host.machine.items():
            is_size = name.endswith("_bytes") and isinstance(value, (int, float))
            shown = f"{value / 2**30:.1f} GiB" if is_size else cells.text(value)
            known = facts.setdefault(cells.text(name.removesuffix("_bytes")), [])
            if shown not in known:
                known.append(shown)
    runs = list(dict.fromkeys(host.run for host in results.hosts if host.run))
    moments = sorted(host.time for host in results.hosts if host.time)
    if moments:
        facts["begun"] = [moments[0]] if len(moments) == 1 else [moments[0], f"last {moments[-1]}"]
    if len(runs) > 1:
        facts["runs"] = [f"{len(runs)}, of which the file is the union"]
    table = cells.table(["", ""], [[name, "; ".join(values)] for name, values in facts.items()], left=2)
    return cells.section("## Machine and versions", table)


def links(results: Results) -> str:
    """Nominal beside what a plain download gave."""
    rows = []
    for link in order((record.link for record in results.links), LINKS):
        found = [record for record in results.links if record.link == link]
        nominal, trip = found[-1].nominal_bits_s, found[-1].nominal_rtt_s
        speed, rtt = results.bytes_s(link), results.rtt_s(link)
        bits = [8 * record.bytes_s / 1e6 for record in found]
        rows.append(
            [
                link,
                f"{nominal / 1e6:,g}" if nominal else cells.DASH,
                cells.spread(bits, "") if len(bits) > 1 else cells.digits(bits[0]),
                cells.percent(8 * speed / nominal if nominal and speed else None),
                cells.DASH if trip is None else f"{trip * 1000:.3g}",
                cells.DASH if rtt is None else f"{rtt * 1000:.3g}",
                str(len(found)),
            ]
        )
    header = [
        "link", "nominal Mbit/s", "a plain download gave Mbit/s", "of nominal",
        "nominal round trip ms", "measured round trip ms", "times measured",
    ]  # fmt: skip
    return cells.section("## Links", cells.table(header, rows))


def samples(results: Results) -> str:
    """How many workloads, and how many samples of each; nothing more is claimed anywhere below."""
    if not results.samples:
        return "Nothing was measured.\n\n"
    lines = []
    for kind in results.kinds:
        names = [w for w in results.workloads(kind) if any(_ok(results, w, link) for link in results.link_names)]
        fat = [w for w in names if w in results.images and results.images[w].fat]
        count = f"{len(names) - len(fat)}" + (f" of the paper's {PAPER} workloads" if kind == SAME else "")
        flavours = f", and of {len(fat)} fat flavour{'s' * (len(fat) > 1)}" if fat else ""
        lines.append(f"- {class_title(kind)}: at least one sample of {count}{flavours}.")
    rows = []
    for link in results.link_names:
        for mode in order((s.mode for s in results.samples if s.link == link and s.mode != LOCAL), MODES):
            row = [link, mode]
            for operation in OPERATIONS:
                chosen = [s for s in results.samples if (s.link, s.mode, s.operation) == (link, mode, operation)]
                good = Counter(s.workload for s in chosen if s.ok)
                bad = sum(not s.ok for s in chosen)
                text = f"{len(good)} x {cells.span(list(good.values()))}" if good else cells.DASH
                row.append(text + (f", {bad} failed" if bad else ""))
            rows.append(row)
    local = [len(results.local_times(w)) for kind in results.kinds for w in results.workloads(kind)]
    known = [count for count in local if count]
    note = f"The local start, which the limit needs: {len(known)} workloads x {cells.span(known)} samples."
    table = cells.table(["link", "mode", *(f"{operation}: workloads x samples" for operation in OPERATIONS)], rows, 2)
    other = ", ".join(f"{count} of kind {cells.text(kind)}" for kind, count in sorted(results.unknown.items()))
    ignored = f"Lines of the results that this report does not read: {other}." if other else ""
    return cells.section("## What ran", "\n".join(lines), table, note, ignored)


def _ok(results: Results, workload: str, link: str) -> bool:
    return any(
        results.good(workload, link, mode, operation)
        for operation in OPERATIONS
        for mode in results.modes(link, operation, [workload])
    )


def failures(results: Results) -> str:
    """Those that failed, with their error; they are in no median."""
    found = Counter(
        (s.workload, s.link, s.mode, s.operation, cells.text(s.error or "no error given")) for s in results.failures
    )
    rows = [[cells.text(w), link, m, o, error, str(count)] for (w, link, m, o, error), count in sorted(found.items())]
    header = ["workload", "link", "mode", "operation", "error", "samples"]
    rest = cells.folded("The other failures", cells.table(header, rows[FAILURES_SHOWN:], left=5))
    total = f"{len(results.failures)} of {len(results.samples)} samples failed. They are in no median."
    shown = cells.table(header, rows[:FAILURES_SHOWN], left=5)
    return cells.section("## What failed", total, shown, rest) if rows else ""


def missing(results: Results) -> str:
    """Images and cells without a sample, though others of the same link and operation have one."""
    names = [w for kind in results.kinds for w in results.workloads(kind)]
    # What is missing the same workloads stands in one line.
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for link in results.link_names:
        for operation in OPERATIONS:
            for mode in linktables.modes_of(results, link, operation, names):
                absent = [cells.text(w) for w in names if not results.good(w, link, mode, operation)]
                if absent:
                    group = groups.setdefault((link, ", ".join(absent)), {})
                    group.setdefault(operation, []).append(mode)
    lines = []
    for (link, absent_names), found in groups.items():
        what = "; ".join(f"{operation} by {', '.join(modes)}" for operation, modes in found.items())
        lines.append(f"- {link} ({what}): {absent_names}")
    never = [operation for operation in OPERATIONS if not any(s.operation == operation for s in results.samples)]
    if results.samples and never:
        lines.append(f"- no workload at all: {', '.join(never)}")
    return cells.section("## What did not run, or never succeeded", "\n".join(lines))
