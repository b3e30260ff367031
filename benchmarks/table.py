"""`make bench`: measures the table of the README on this machine, both backends, ratios in one run."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command, host, image, measures
from benchmarks.attached import index_bytes
from benchmarks.measures import Place
from benchmarks.record import BACKENDS, Result, save
from tests.layout import push
from tests.servers import RegistryServer

RESULTS = Path(__file__).resolve().parent / "results"
PER_BACKEND = {
    "mounting": measures.mounting,
    "first_start": measures.first_start,
    "starts": measures.starts,
    "tree": measures.tree,
    "sequential": measures.sequential,
}
INDEXING = "indexing"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5, help="samples per side (default: %(default)s)")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="(default: both)")
    groups = [*PER_BACKEND, INDEXING]
    parser.add_argument("--only", choices=groups, action="append", help="one group of rows (repeatable)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory (default: %(default)s)")
    args = parser.parse_args()
    if os.geteuid() != 0:
        print("make bench mounts file systems and drops the page cache: run it as root", file=sys.stderr)
        return 1
    results = []
    with host.work_directory() as directory, RegistryServer(directory / "registry") as registry:
        place = prepare(directory, registry, args.repetitions)
        for result in measure(place, registry, args.only or groups, args.backend or BACKENDS):
            mark = "" if result.informative else ("ok    " if result.met else "MISSED")
            print(f"{mark:6} {result.backend:6} {result.title}: {result.shown}", flush=True)
            results.append(result)
        paths = save(args.output, results, environment(place))
    print("\n".join(f"wrote {path}" for path in paths))
    return 0


def prepare(directory: Path, registry: RegistryServer, repetitions: int) -> Place:
    """Push the images, index two of the three."""
    print("Preparing images (built once per machine) and the registry", flush=True)
    interpreters, large_file = image.interpreters(), image.large_file()
    base = f"{registry.host}/bench"
    indexed, plain, large = (f"{base}/{name}:{image.TAG}" for name in ("indexed", "plain", "large"))
    for reference, picture in ((indexed, interpreters), (plain, interpreters), (large, large_file)):
        push(picture.layout, image.TAG, reference)
    command.index(indexed, directory / "indexing")
    command.index(large, directory / "indexing")
    return Place(directory, repetitions, indexed, plain, large, interpreters, large_file)


def measure(
    place: Place, registry: RegistryServer, groups: Sequence[str], backends: Sequence[str]
) -> Iterator[Result]:
    """All results of the chosen groups of rows; indexing has nothing to do with a backend."""
    for group in groups:
        if group == INDEXING:
            yield from measures.indexing(place, lambda reference: index_bytes(registry.url, reference))
        else:
            for backend in backends:
                yield from PER_BACKEND[group](place, backend)


def environment(place: Place) -> dict[str, Any]:
    """What somebody needs to know to judge the figures."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "Linux": platform.release(),
        "Python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory": f"{memory / 2**30:.0f} GiB",
        "containerd": host.run("containerd", "--version").split()[2],
        "runc": host.run("runc", "--version").split()[2],
        "image": f"{place.interpreters.tar_bytes / 1e6:.0f} MB tar",
        "compressed": f"{place.interpreters.compressed_bytes / 1e6:.0f} MB",
        "entries": place.interpreters.entries,
        "repetitions": place.repetitions,
    }


if __name__ == "__main__":
    sys.exit(main())
