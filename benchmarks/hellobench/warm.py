"""What lazyfs' own command adds to a container's start when everything is in memory: `lazyfs run` of a mounted image
against an overlay mount, runc and umount by hand on the unpacked image."""

from __future__ import annotations

import shutil
from typing import Any

from benchmarks import host
from benchmarks.command import Lazyfs
from benchmarks.containers import start
from benchmarks.hellobench.catalogue import WORKLOADS
from benchmarks.hellobench.preparation import TAG, Preparation
from benchmarks.hellobench.runners import INDEXED, overlay_container, unique
from benchmarks.hellobench.workloads import Workload
from benchmarks.measures import alternate

WORKLOAD = "python"
RECORD = "warm"


def workload() -> Workload:
    return WORKLOADS[WORKLOAD]


def measure(preparation: Preparation, pairs: int) -> list[dict[str, Any]]:
    """The records "warm", one a pair: seconds of `lazyfs run` and of the same by hand."""
    chosen = workload()
    preparation.pushed(chosen)
    reference = f"{preparation.registry.host}/{preparation.repository(chosen, INDEXED)}:{TAG}"
    template = preparation.template(chosen)
    directory = preparation.directory / unique("warm")
    directory.mkdir()
    lazyfs = Lazyfs(directory / "cache")

    def by_lazyfs() -> float:
        started = host.now()
        lazyfs.run_container(reference)
        return host.now() - started

    try:
        with (
            preparation.unpacked(chosen) as root,
            lazyfs.daemon(),
            lazyfs.mounted(reference, directory / "root"),
        ):

            def by_hand() -> float:
                started = host.now()
                container = overlay_container(root, directory / unique("container"), template)
                try:
                    start(container.bundle)
                finally:
                    container.remove()
                return host.now() - started

            by_lazyfs(), by_hand()  # whatever is read for the first time
            ours, theirs = alternate(pairs, by_lazyfs, by_hand, drop=False)
        lazyfs.wait_until_ended()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return [
        {"record": RECORD, "workload": chosen.name, "round": number, "run_s": run_s, "by_hand_s": by_hand_s}
        for number, (run_s, by_hand_s) in enumerate(zip(ours, theirs, strict=True))
    ]
