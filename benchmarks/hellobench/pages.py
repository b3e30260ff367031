"""Memory of containers of one image: the host's page cache with 1 and with 10 of them, and the daemon's own.

The image is on the host: unpacked on ext4, or in lazyfs' block cache as far as a start reads it. All page cache is
dropped before the containers start, so that what is counted is what running them needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.containers import MANY_IMPORTS
from benchmarks.hellobench.catalogue import WORKLOADS
from benchmarks.hellobench.images import Report
from benchmarks.hellobench.longrun import MODES, Known, Record, host, unpacked
from benchmarks.hellobench.preparation import Preparation
from benchmarks.hellobench.runners import Container, RuncContainer, Runner
from benchmarks.hellobench.workloads import Workload
from benchmarks.host import drop_page_cache

WORKLOAD = "python"
COUNTS = (1, 10)
STARTED_DEADLINE_S = 60.0
# Stays after its imports until it is killed.
COMMAND = ("python3", "-c", f"import {MANY_IMPORTS}, time; print('started', flush=True); time.sleep(3600)")
STARTED = b"started\n"
REPETITIONS = 3  # the smallest counts: what others do on the host adds to its page cache
SETTLE_S = 1.0  # what the start has left to the daemon and to the kernel's write-back


def workloads() -> list[Workload]:
    """Those whose images are needed."""
    return [WORKLOADS[WORKLOAD]]


def measure(preparation: Preparation, report: Report, known: Known = lambda *_: False) -> Iterator[Record]:
    """The records "pages", as longrun.measure gives its own. `memory_bytes`: of lazyfs' processes (PSS)."""
    workload, total, done = WORKLOADS[WORKLOAD], len(MODES) * len(COUNTS), 0
    if all(known("pages", WORKLOAD, mode, count) for mode in MODES for count in COUNTS):
        report("", total, total)
        return
    report("memory: image", done, total)
    preparation.pushed(workload)
    with unpacked(preparation, workload) as root:
        for mode in MODES:
            for count in COUNTS:
                report(f"memory: {count} containers, {mode}", done, total)
                with host(preparation, workload, mode, root) as (runner, reference):
                    with created(runner, reference, 1) as containers:
                        start(containers)  # brings what a start reads to the host
                    used = [_page_cache_used(runner, reference, count) for _ in range(REPETITIONS)]
                    yield {
                        "record": "pages", "workload": WORKLOAD, "mode": mode, "containers": count,
                        "page_cache_bytes": min(size for size, _ in used),
                        "memory_bytes": used[-1][1],
                    }  # fmt: skip
                done += 1
    report("", total, total)


def _page_cache_used(runner: Runner, reference: str, count: int) -> tuple[int, int | None]:
    """Bytes of page cache that containers need, and of the daemon's memory while they run."""
    with created(runner, reference, count) as containers:
        drop_page_cache()
        _read_runc()
        before = page_cache_bytes()
        start(containers)
        time.sleep(SETTLE_S)
        return page_cache_bytes() - before, runner.counters().daemon_memory_bytes


@contextlib.contextmanager
def created(runner: Runner, reference: str, count: int) -> Iterator[list[Container]]:
    """Containers that will run COMMAND; at the end they are killed and removed."""
    containers: list[Container] = []
    try:
        for _ in range(count):
            container = runner.create(reference)
            containers.append(container)
            assert isinstance(container, RuncContainer)
            config = container.bundle / "config.json"
            document = json.loads(config.read_bytes())
            document["process"]["args"] = list(COMMAND)
            config.write_text(json.dumps(document))
        yield containers
    finally:
        for container in containers:
            container.kill()
            container.remove()


def start(containers: Sequence[Container]) -> None:
    """Start all at once, and wait until all have imported their modules."""
    processes = [container.start() for container in containers]
    deadline = time.monotonic() + STARTED_DEADLINE_S
    for process, container in zip(processes, containers, strict=True):
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        line = os.read(process.stdout.fileno(), len(STARTED)) if readable else b""
        if line != STARTED:
            raise RuntimeError(f"a container printed {line!r}; its errors:\n{container.log.read_text()[-2000:]}")


def page_cache_bytes() -> int:
    """The host's page cache without shared memory (proc(5), meminfo)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return (kilobytes["Cached"] - kilobytes["Shmem"]) * 1024


def _read_runc() -> None:
    """The runtime is the host's, on both sides: it is in the page cache before, and so not counted."""
    program = shutil.which("runc")
    assert program is not None
    Path(program).read_bytes()
