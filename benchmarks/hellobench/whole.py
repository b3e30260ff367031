"""The other end of lazy mounts: reading everything. All bytes of an image from cold, against pull, unpack and read.

A lazy mount cannot win much here: it fetches all, too, and inflates it. This shows what it costs.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import command, host
from benchmarks.command import Lazyfs
from benchmarks.hellobench.catalogue import WORKLOADS
from benchmarks.hellobench.images import Report
from benchmarks.hellobench.longrun import LAZYFS, Known, Record
from benchmarks.hellobench.needed import regular_files
from benchmarks.hellobench.preparation import TAG, Preparation
from benchmarks.hellobench.runners import INDEXED, unique
from benchmarks.hellobench.workloads import Workload
from benchmarks.measures import read_all

CTR = "ctr"
MODES = (LAZYFS, CTR)
# A small image, one of few large files, and one of many small ones.
IMAGES = ("python", "postgres", "golang")


def workloads() -> list[Workload]:
    """Those whose images are needed."""
    return [WORKLOADS[name] for name in IMAGES]


def measure(preparation: Preparation, rounds: int, report: Report, known: Known = lambda *_: False) -> Iterator[Record]:
    """The records "whole", as longrun.measure gives its own. `bytes`: of all regular files, hard links once."""
    total, done = len(IMAGES) * rounds * len(MODES), 0
    for workload in workloads():
        for number in range(rounds):
            if all(known("whole", workload.name, mode, number) for mode in MODES):
                done += len(MODES)
                continue
            report(f"{workload.name}: whole image", done, total)
            preparation.pushed(workload)
            reference = f"{preparation.registry.host}/{preparation.repository(workload, INDEXED)}:{TAG}"
            sizes = {}
            for mode in MODES if number % 2 == 0 else reversed(MODES):
                report(f"{workload.name}: whole image, {mode}", done, total)
                directory = preparation.directory / unique(f"whole-{mode}")
                directory.mkdir()
                try:
                    seconds, sizes[mode] = _SIDES[mode](directory, reference)
                finally:
                    shutil.rmtree(directory, ignore_errors=True)
                yield {
                    "record": "whole", "workload": workload.name, "mode": mode, "round": number,
                    "seconds": seconds, "bytes": sizes[mode],
                }  # fmt: skip
                done += 1
            if len(set(sizes.values())) != 1:
                raise RuntimeError(f"{workload.name}: the sides have not read the same: {sizes}")
    report("", total, total)


def _lazily(directory: Path, reference: str) -> tuple[float, int]:
    """Seconds to mount an image with an index and to read it; the daemon is at rest and its cache empty."""
    lazyfs, target = Lazyfs(directory / "cache"), directory / "root"
    with lazyfs.daemon():
        host.drop_page_cache()
        started = host.now()
        with lazyfs.mounted(reference, target):
            read_all(target)
            seconds = host.now() - started
            size = _size_bytes(target)
    lazyfs.wait_until_ended()
    return seconds, size


def _eagerly(directory: Path, reference: str) -> tuple[float, int]:
    """Seconds to pull an image with unpacking, to mount its snapshot and to read it; containerd is at rest."""
    target = directory / "root"
    target.mkdir()
    with host.Containerd(directory / "containerd") as containerd:
        time.sleep(command.DAEMON_REST_S)
        host.drop_page_cache()
        started = host.now()
        containerd.pull(reference)
        host.run(*containerd.ctr("image", "mount", "--snapshotter", "overlayfs", reference, str(target)))
        try:
            read_all(target)
            seconds = host.now() - started
            size = _size_bytes(target)
        finally:
            host.run(*containerd.ctr("image", "unmount", str(target)))
    return seconds, size


_SIDES: dict[str, Callable[[Path, str], tuple[float, int]]] = {LAZYFS: _lazily, CTR: _eagerly}


def _size_bytes(root: Path) -> int:
    """The bytes of all regular files; each inode once."""
    sizes = {}
    for path in regular_files(root):
        facts = os.lstat(path)
        sizes[facts.st_ino] = facts.st_size
    return sum(sizes.values())
