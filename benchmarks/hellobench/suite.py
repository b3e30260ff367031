"""A whole run: for every link and workload the rounds that the results file does not have yet."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import host
from benchmarks.hellobench import images, longrun, pages, sandbox, warm, whole
from benchmarks.hellobench.catalogue import EVERY, HELD_BACK, QUICK, WORKLOADS
from benchmarks.hellobench.estimate import Remaining, missing_rounds
from benchmarks.hellobench.hosts import Hosts
from benchmarks.hellobench.journal import Journal
from benchmarks.hellobench.links import LINKS, Link, Route, connected, measured
from benchmarks.hellobench.machine import facts
from benchmarks.hellobench.modes import BEFORE, DEPLOYMENT, MODES, OPERATIONS
from benchmarks.hellobench.preparation import Preparation
from benchmarks.hellobench.rounds import Round
from benchmarks.hellobench.summary import OURS
from benchmarks.hellobench.workloads import Output, Workload
from tests.servers import RegistryServer

WARM_PAIRS = 10
REGISTRY_BYTES = 8 << 30  # at most; what is not used takes no memory
# Containers that every cache may have seen before, on a slim base and on a fat one; the second if the first is itself.
_NEIGHBOURS = {False: ("python", "perl"), True: ("python-fat", "ruby-fat")}
_console = Console(stderr=True)


def chosen(args: argparse.Namespace) -> list[Workload]:
    names = args.workload or [*(QUICK if args.quick else ()), *(HELD_BACK if args.held_back else ())]
    return [EVERY[name] for name in dict.fromkeys(names or WORKLOADS)]


def neighbour(workload: Workload) -> Workload:
    """A workload of another image on the same base whose container ends by itself."""
    first, second = (WORKLOADS[name] for name in _NEIGHBOURS[workload.fat])
    other = second if workload.name == first.name else first
    assert isinstance(other.ready, Output)
    return other


def chosen_modes(args: argparse.Namespace) -> list[str]:
    """Those that were asked for; of all, the other build only if there is one."""
    modes = args.mode or [mode for mode in MODES if mode != BEFORE]
    return list(dict.fromkeys([*modes, *([BEFORE] if args.before else [])]))


def with_neighbours(workloads: Sequence[Workload], modes: Sequence[str]) -> list[Workload]:
    """The workloads whose images are needed: their own, and those that caches are warmed with."""
    wanted = {workload.name: workload for workload in workloads}
    if any(MODES[mode].shares for mode in modes):
        wanted |= {other.name: other for other in map(neighbour, workloads)}
    return list(wanted.values())


def measures_warm(args: argparse.Namespace) -> bool:
    """What `lazyfs run` adds to a warm start is measured with any deployment by lazyfs."""
    return args.command == "run" and OURS in chosen_modes(args) and DEPLOYMENT in (args.operation or OPERATIONS)


def build(args: argparse.Namespace) -> None:
    """Build the images that are missing."""
    if args.command == "long":
        wanted = [workload for part in (longrun, whole, pages) for workload in part.workloads()]
    else:
        wanted = with_neighbours(chosen(args), chosen_modes(args))
        if measures_warm(args):
            wanted = list({w.name: w for w in [*wanted, warm.workload()]}.values())
    with progress() as bar:
        task = bar.add_task("images", total=len(wanted))

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, description=f"image {name}", completed=done, total=total)

        images.ensure(wanted, advance)


@contextlib.contextmanager
def place(results: Path) -> Iterator[tuple[Preparation, Journal]]:
    """A work directory and a registry that holds its data in memory, as a busy registry's page cache would."""
    sandbox.remove_abandoned()
    journal = Journal(results, f"{os.uname().nodename}-{secrets.token_hex(3)}")
    with host.work_directory() as directory:
        memory = directory / "registry"
        memory.mkdir()
        host.run("mount", "-t", "tmpfs", "-o", f"size={REGISTRY_BYTES}", "tmpfs", memory)
        with RegistryServer(memory) as registry:
            journal.write([{"record": "host", "machine": facts()}])
            yield Preparation(directory, registry), journal


def say(line: str) -> None:
    """A line about the time that is left, where no bar says it."""
    if line and not _console.is_terminal:
        _console.print(line)


def run(args: argparse.Namespace) -> int:
    """Measure starts. Returns the exit code: 1 if samples failed."""
    workloads, modes = chosen(args), chosen_modes(args)
    operations = args.operation or list(OPERATIONS)
    failed = 0
    with place(args.results) as (preparation, journal), progress() as bar:
        hosts = Hosts(preparation, args.before)
        links = [LINKS[name] for name in args.link or ["loopback"]]
        task = bar.add_task("starting", total=len(links) * len(workloads) * args.samples * (len(modes) + 1))
        remaining = Remaining(links, workloads, modes, operations, args.samples, journal)
        if remaining.introduction:
            _console.print(remaining.introduction)
        if measures_warm(args) and not journal.has(warm.RECORD, warm.WORKLOAD, WARM_PAIRS - 1):
            journal.write(warm.measure(preparation, WARM_PAIRS))
        for link in links:
            with connected(link, preparation.registry.host) as route:
                journal.write([link_record(link, route, preparation.registry)])
                for workload in workloads:
                    bar.update(task, description=f"{link.name:8} {workload.name}")
                    suite = _Suite(preparation, hosts, journal, route, workload, modes, operations, bar, task)
                    failed += suite.run(args.samples)
                    say(remaining.after(link, workload))
    if failed:
        _console.print(f"{failed} samples failed; see `error` in {args.results}")
    return 1 if failed else 0


def run_long(args: argparse.Namespace) -> int:
    """Measure long runs, whole images and memory."""
    with place(args.results) as (preparation, journal), progress() as bar:
        task = bar.add_task("long runs", total=None)

        def report(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total)

        for records in (
            longrun.measure(preparation, args.rounds, args.seconds, report, journal.has),
            whole.measure(preparation, args.rounds, report, journal.has),
            pages.measure(preparation, report, journal.has),
        ):
            for record in records:
                journal.write([record])
    return 0


def link_record(link: Link, route: Route, registry: RegistryServer) -> dict[str, Any]:
    bytes_s, rtt_s = measured(route, registry)
    rate = f"{bytes_s * 8 / 1e6:,.0f} Mbit/s"
    _console.print(f"link {link.name}: {link.title}; a plain download got {rate}, a round trip {rtt_s * 1e3:.1f} ms")
    return {
        "record": "link",
        "link": link.name,
        "nominal_bits_s": link.bits_s,
        "nominal_rtt_s": link.rtt_s,
        "bytes_s": bytes_s,
        "rtt_s": rtt_s,
    }


class _Suite:
    """All rounds of one workload over one link."""

    def __init__(
        self,
        preparation: Preparation,
        hosts: Hosts,
        journal: Journal,
        route: Route,
        workload: Workload,
        modes: Sequence[str],
        operations: Sequence[str],
        bar: Progress,
        task: Any,
    ) -> None:
        self._preparation, self._hosts, self._journal = preparation, hosts, journal
        self._route, self._workload = route, workload
        self._modes, self._operations = modes, operations
        self._bar, self._task = bar, task

    def run(self, samples: int) -> int:
        """Measure what is missing. Returns how many samples failed."""
        failed = self._local(samples)
        missing = missing_rounds(
            self._journal, self._route.link, self._workload, self._modes, self._operations, samples
        )
        self._bar.advance(self._task, (samples - len(missing)) * len(self._modes))
        for number in missing:
            # All of the round, also what is there already: ratios are of one time.
            self._prepare()
            records = self._round(number).run(self._modes, self._operations, lambda _: self._bar.advance(self._task))
            pack = self._hosts.pack_record(self._workload)
            if pack is not None and not self._journal.has("pack", self._workload.name):
                self._journal.write([pack])
            self._journal.write(records)
            failed += sum(not record["ok"] for record in records)
        return failed

    def _local(self, samples: int) -> int:
        """The image's facts and the start without any fetching, which do not depend on the link."""
        missing = [n for n in range(samples) if not self._journal.has_local(self._workload.name, n)]
        self._bar.advance(self._task, samples - len(missing))
        failed = 0
        if missing or not self._journal.has_image(self._workload.name):
            with self._preparation.unpacked(self._workload) as root:
                if not self._journal.has_image(self._workload.name):
                    self._journal.write([self._preparation.facts(self._workload, root)])
                for number in missing:
                    record = self._round(number).run_local(root)
                    self._journal.write([record])
                    failed += not record["ok"]
                    self._bar.advance(self._task)
        return failed

    def _prepare(self) -> None:
        for workload in with_neighbours([self._workload], self._modes):
            self._preparation.pushed(workload)

    def _round(self, number: int) -> Round:
        other = neighbour(self._workload)
        return Round(self._preparation, self._hosts, self._workload, other, self._route, number)


def progress() -> Progress:
    """Bars on a terminal; nothing elsewhere."""
    times = TimeElapsedColumn(), TimeRemainingColumn()
    columns = TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, *times, console=_console, disable=not _console.is_terminal)
