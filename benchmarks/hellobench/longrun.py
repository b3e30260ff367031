"""Long runs: the throughput of servers after their start, on lazyfs and on overlayfs over ext4, in turn.

Both sides have the same runc configuration, and write to an empty upper directory on the same ext4. The page cache
is empty when the container starts. The lazyfs side has mounted the image and has fetched nothing of it before; the
registry is on the same host. The overlayfs side has the image unpacked: what its pull takes is measured elsewhere.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.hellobench import images, readiness
from benchmarks.hellobench.catalogue import WORKLOADS
from benchmarks.hellobench.eager import LocalRunner
from benchmarks.hellobench.images import Report
from benchmarks.hellobench.lazy import LazyRunner
from benchmarks.hellobench.loads import LOADS, Load, Server, mean
from benchmarks.hellobench.preparation import TAG, Preparation
from benchmarks.hellobench.runners import INDEXED, Runner, unique
from benchmarks.hellobench.workloads import Workload
from benchmarks.host import drop_page_cache, now, run

LAZYFS, OVERLAYFS = "lazyfs", "overlayfs"
MODES = (LAZYFS, OVERLAYFS)
Record = dict[str, Any]
# Whether a record is known already, by its kind and its keys in the order of journal.Journal.has.
Known = Callable[..., bool]


def workloads() -> list[Workload]:
    """Those whose images are needed."""
    return [WORKLOADS[load.workload] for load in LOADS]


def measure(
    preparation: Preparation,
    rounds: int,
    seconds: float,
    report: Report,
    known: Known = lambda *_: False,
) -> Iterator[Record]:
    """The records "throughput". In each round both sides run, the other one first each time. A round of which a
    side is not `known` is measured as a whole. `report` is told what begins, and how many of how many are done."""
    total, done = len(LOADS) * rounds * len(MODES), 0
    for load in LOADS:
        missing = [n for n in range(rounds) if not all(known("throughput", load.benchmark, m, n) for m in MODES)]
        done += (rounds - len(missing)) * len(MODES)
        if not missing:
            continue
        report(f"{load.benchmark}: image", done, total)
        workload = WORKLOADS[load.workload]
        preparation.pushed(workload)
        with unpacked(preparation, workload) as root:
            for number in missing:
                for mode in MODES if number % 2 == 0 else reversed(MODES):
                    report(f"{load.benchmark} {mode}", done, total)
                    yield _sample(preparation, workload, load, mode, root, number, seconds)
                    done += 1
    report("", total, total)


@contextlib.contextmanager
def unpacked(preparation: Preparation, workload: Workload) -> Iterator[Path]:
    """The image's root in the work directory, as umoci makes it; gone at the end."""
    bundle = preparation.directory / unique("unpacked")
    try:
        run("umoci", "unpack", "--image", f"{images.layout()}:{workload.name}", bundle)
        yield bundle / "rootfs"
    finally:
        shutil.rmtree(bundle, ignore_errors=True)


@contextlib.contextmanager
def host(preparation: Preparation, workload: Workload, mode: str, root: Path) -> Iterator[tuple[Runner, str]]:
    """A host of either side that has the image, for overlayfs in `root`; and the image's name for its runner."""
    directory = preparation.directory / unique(f"host-{mode}")
    template = preparation.template(workload)
    reference = f"{preparation.registry.host}/{preparation.repository(workload, INDEXED)}:{TAG}"
    runner = LazyRunner(directory, template) if mode == LAZYFS else LocalRunner(directory, template, root)
    try:
        with runner.services():
            if runner.daemon_rests:
                time.sleep(command.DAEMON_REST_S)
            runner.pull(reference)
            yield runner, reference
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _sample(
    preparation: Preparation, workload: Workload, load: Load, mode: str, root: Path, number: int, seconds: float
) -> Record:
    port = readiness.port_of(workload.ready)
    assert port is not None
    scratch = preparation.directory / unique("load")
    scratch.mkdir()
    with host(preparation, workload, mode, root) as (runner, reference):
        readiness.check_unused(workload.ready)
        container = runner.create(reference)
        try:
            drop_page_cache()
            started = now()
            process = container.start()
            ready = readiness.wait_until_ready(workload.ready, process, workload.deadline_s)
            points = load.drive(Server(port, root, scratch), seconds)
        finally:
            container.kill()
            container.remove()
    shutil.rmtree(scratch)
    return {
        "record": "throughput",
        "benchmark": load.benchmark,
        "mode": mode,
        "round": number,
        "points": [[round(at, 3), round(per_s, 1)] for at, per_s in points],
        "mean_per_s": mean(points),
        "first_s": ready - started,
    }
