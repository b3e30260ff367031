"""One round of a workload: every mode once, in random order, each on a host that was cold before.

Ratios are taken within a round: what disturbs the machine for a while disturbs both sides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.hellobench import images, readiness
from benchmarks.hellobench.eager import LocalRunner
from benchmarks.hellobench.hosts import Hosts
from benchmarks.hellobench.links import Counts, Route
from benchmarks.hellobench.modes import DEPLOYMENT, DEVELOPMENT, MODES, SECOND, operations_of
from benchmarks.hellobench.preparation import TAG, Preparation
from benchmarks.hellobench.runners import INDEXED, Counters, Runner, unique
from benchmarks.hellobench.workloads import Workload
from benchmarks.host import drop_page_cache, now

Record = dict[str, Any]
LOG_TAIL_CHARACTERS = 400
# Of a command, of a workload, and of either in time: the sample has failed, the run goes on.
_FAILURES = (RuntimeError, readiness.NotReady, subprocess.TimeoutExpired)


@dataclass
class Sample:
    """Seconds of each step of one operation; None: not part of it."""

    push_s: float | None = None
    pull_s: float | None = None
    create_s: float | None = None
    run_s: float | None = None
    counters: Counters = field(default_factory=Counters)
    # What had come over the link when the container was ready, as the link counted it; `link_index_bytes` of it was the
    # image's index.
    link_bytes: int | None = None
    link_requests: int | None = None
    link_index_bytes: int | None = None

    @property
    def total_s(self) -> float:
        return sum(step or 0.0 for step in (self.push_s, self.pull_s, self.create_s, self.run_s))


@dataclass
class Round:
    """What all samples of a round have in common."""

    preparation: Preparation
    hosts: Hosts
    workload: Workload
    # Another workload on the same base, whose start ends by itself: a cache is warmed by it.
    neighbour: Workload
    route: Route
    number: int

    def run(self, modes: Sequence[str], operations: Sequence[str], advance: Callable[[str], None]) -> list[Record]:
        """The records "sample" of all modes. A failure is a record, too. `advance` is told each mode when it is
        done."""
        records: list[Record] = []
        order = []
        for mode in modes:
            try:
                self.hosts.prepare(self.workload, mode)
                order.append(mode)
            except _FAILURES as failure:
                records.append(self._record(mode, DEPLOYMENT, Sample(), failure))
                advance(mode)
        random.shuffle(order)
        # Files are deleted only after the last mode: see `drop_page_cache`.
        with contextlib.ExitStack() as files, contextlib.ExitStack() as running:
            hosts, services = {}, {}
            for mode in order:
                directory = self.preparation.directory / unique(f"host-{mode}")
                files.callback(shutil.rmtree, directory, ignore_errors=True)
                hosts[mode] = self.hosts.make(self.workload, mode, directory)
                services[mode] = running.enter_context(contextlib.ExitStack())
                services[mode].enter_context(hosts[mode].services())
            if any(MODES[mode].daemon_rests for mode in order):
                time.sleep(command.DAEMON_REST_S)
            for mode in order:
                wanted = [operation for operation in operations_of(mode) if operation in operations]
                if wanted:
                    records += self._measure(hosts[mode], wanted)
                services[mode].close()  # what it still fetches would disturb the next
                advance(mode)
        return records

    def run_local(self, root: Path) -> Record:
        """The record "sample" of mode "local": create and run where everything is in the page cache."""
        directory = self.preparation.directory / unique("host-local")
        runner = LocalRunner(directory, self.preparation.template(self.workload), root)
        try:
            self._start(runner, self.workload, "", Sample())  # for the page cache
            os.sync()
            sample = Sample()
            self._start(runner, self.workload, "", sample)
            return self._record(runner.mode, "local", sample, None)
        except _FAILURES as error:
            return self._record(runner.mode, "local", Sample(), error)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _measure(self, runner: Runner, operations: Sequence[str]) -> list[Record]:
        records = []
        if runner.shares:
            reference = self._reference(self.neighbour, runner, TAG)
            try:
                runner.pull(reference)
                self._start(runner, self.neighbour, reference, Sample())
            except _FAILURES as failure:
                return [self._record(runner.mode, DEPLOYMENT, Sample(), failure)]
        steps = {DEPLOYMENT: self._deploy, SECOND: self._again, DEVELOPMENT: self._develop}
        # A host has an image only after its deployment, whether that is wanted or not.
        for operation in (DEPLOYMENT, *(o for o in operations if o != DEPLOYMENT)):
            sample, before, error = Sample(), runner.counters(), None
            try:
                steps[operation](runner, sample)
                sample.counters = runner.counters().since(before)
            except _FAILURES as failure:
                error = failure
            if operation in operations or error is not None:
                records.append(self._record(runner.mode, operation, sample, error))
            if error is not None:
                break  # the host is not in the state that the next operation begins with
        return records

    def _deploy(self, runner: Runner, sample: Sample) -> None:
        reference = self._reference(self.workload, runner, TAG)
        drop_page_cache()
        before = self.route.counts()
        self._pull(runner, reference, sample)
        self._start(runner, self.workload, reference, sample, before)

    def _again(self, runner: Runner, sample: Sample) -> None:
        drop_page_cache()
        reference, before = self._reference(self.workload, runner, TAG), self.route.counts()
        self._start(runner, self.workload, reference, sample, before)

    def _develop(self, runner: Runner, sample: Sample) -> None:
        tag = unique(f"changed-{self.number}")
        directory = self.preparation.directory / tag
        repository = self.preparation.repository(self.workload, runner.repository)
        reference = self._reference(self.workload, runner, tag)
        before = self.route.counts()
        try:
            changed = images.changed(self.workload.name, f"{runner.mode} {self.route.link.name} {tag}", directory)
            drop_page_cache()
            started = now()
            # Like the host's, the developer's way to the registry is the link.
            self.preparation.push_to(self.route.host, directory, changed, repository, tag)
            if runner.indexed:
                command.index(reference, self.preparation.directory / "indexing", "insecure")
            sample.push_s = now() - started
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        self._pull(runner, reference, sample)
        self._start(runner, self.workload, reference, sample, before)

    def _pull(self, runner: Runner, reference: str, sample: Sample) -> None:
        started = now()
        runner.pull(reference)
        sample.pull_s = now() - started

    def _start(
        self, runner: Runner, workload: Workload, reference: str, sample: Sample, before: Counts | None = None
    ) -> None:
        """Create a container and wait until it is ready. Its end is not measured. `before`: the link's counts when the
        operation began."""
        readiness.check_unused(workload.ready)
        started = now()
        container = runner.create(reference)
        try:
            created = now()
            process = container.start()
            try:
                ready = readiness.wait_until_ready(workload.ready, process, workload.deadline_s)
            except readiness.NotReady as error:
                log = container.log.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:]
                raise readiness.NotReady(f"{error}; standard error ends with: {log}") from None
            sample.create_s, sample.run_s = created - started, ready - created
            self._count(sample, before)
        finally:
            container.kill()
            container.remove()

    def _count(self, sample: Sample, before: Counts | None) -> None:
        counts = None if before is None else self.route.counts()
        if before is None or counts is None:
            return
        sample.link_bytes = counts.bytes_down - before.bytes_down
        sample.link_requests = counts.requests - before.requests
        index = self.preparation.pushed(self.workload).index_blobs
        sample.link_index_bytes = sum(counts.blobs.get(name, 0) - before.blobs.get(name, 0) for name in index)

    def _reference(self, workload: Workload, runner: Runner, tag: str) -> str:
        # The neighbour is in few repositories.
        kind = runner.repository if workload is self.workload else INDEXED
        return f"{self.route.host}/{self.preparation.repository(workload, kind)}:{tag}"

    def _record(self, mode: str, operation: str, sample: Sample, error: Exception | None) -> Record:
        return {
            "record": "sample",
            "workload": self.workload.name,
            "link": self.route.link.name,
            "mode": mode,
            "operation": operation,
            "round": self.number,
            "state": "warm" if operation == "local" else "cold",
            "ok": error is None,
            "error": None if error is None else str(error)[:2000],
            "push_s": sample.push_s,
            "pull_s": sample.pull_s,
            "create_s": sample.create_s,
            "run_s": sample.run_s,
            "total_s": sample.total_s,
            "link_bytes": sample.link_bytes,
            "link_requests": sample.link_requests,
            "link_index_bytes": sample.link_index_bytes,
            **dataclasses.asdict(sample.counters),
        }
