"""`make bench-against BEFORE=DIR`: this build and that of another checkout (after its `make setup`), side by side.

Each row is measured with both in turn, in one run on one machine, so that drift hits both; what counts is the median
of the ratios of pairs. Both get the same images, each in repositories of its own, since formats may differ.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks import command, host, image, manyfiles
from benchmarks.attached import index_bytes
from benchmarks.command import PROGRAM, Lazyfs
from benchmarks.containers import PYTHON_START
from benchmarks.image import LARGE_FILE_NAME
from benchmarks.measures import read_all
from tests.layout import push
from tests.servers import FaultProxy, RegistryServer

_serial = itertools.count()
Sample = dict[str, float]  # by row
# Rows that may not be slower than this; the machine's noise is about as large.
ALLOWED = 1.03


@dataclass(frozen=True)
class Build:
    """One side: its command, and the prefix of its repositories."""

    name: str
    program: Path
    base: str
    registry_url: str
    directory: Path

    def reference(self, name: str, host_name: str | None = None, tag: str = image.TAG) -> str:
        own, _, path = self.base.partition("/")
        return f"{host_name or own}/{path}/{name}:{tag}"

    def fresh(self, name: str) -> Path:
        return self.directory / f"{self.name}-{name}-{next(_serial)}"

    @contextlib.contextmanager
    def cold(self, backend: str) -> Iterator[Lazyfs]:
        """lazyfs with an empty cache and no daemon; both are gone afterwards."""
        lazyfs = Lazyfs(self.fresh("cache"), backend, self.program)
        try:
            yield lazyfs
        finally:
            lazyfs.wait_until_ended()
            shutil.rmtree(lazyfs.cache)

    @contextlib.contextmanager
    def proxy(self) -> Iterator[FaultProxy]:
        with FaultProxy(self.base.partition("/")[0]) as proxy:
            yield proxy


@dataclass
class Row:
    """Samples of both sides, pair by pair; all are better when smaller."""

    title: str
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(a / b if b else 1.0 for a, b in zip(self.after, self.before, strict=True))


def mounting(build: Build, backend: str) -> Sample:
    """Cold mounts with and without a daemon and an index; a mount that joins, with the client's CPU."""
    found: Sample = {}
    for title, name, running in (
        ("mount, cache empty, page cache cold, no daemon: s", "indexed", False),
        ("the same with its daemon running: s", "indexed", True),
        ("first mount without an index: s", "plain", False),
    ):
        with build.cold(backend) as lazyfs, contextlib.ExitStack() as stack:
            if running:
                stack.enter_context(lazyfs.daemon())
            target = build.fresh("root")
            host.drop_page_cache()
            found[title] = lazyfs.mount(build.reference(name), target)
            lazyfs.umount(target)
    with build.cold(backend) as lazyfs, lazyfs.mounted(build.reference("indexed"), build.fresh("root")):
        walls, cpus = [], []
        for _ in range(10):  # some tens of milliseconds each
            target = build.fresh("root")
            before = _children_cpu_s()
            walls.append(lazyfs.mount(build.reference("indexed"), target))
            cpus.append(_children_cpu_s() - before)
            lazyfs.umount(target)
        found["joining mount: s"] = statistics.median(walls)
        found["joining mount: CPU of the client, s"] = statistics.median(cpus)
    return found


def starts(build: Build, backend: str) -> Sample:
    """The first container from an empty cache, with bytes and requests; later ones."""
    found: Sample = {}
    with build.proxy() as proxy, build.cold(backend) as lazyfs:
        lazyfs.run_container(build.reference("indexed", proxy.host), *PYTHON_START)
        found["first python3 start: bytes fetched"] = proxy.bytes_sent
        found["first python3 start: requests"] = len(proxy.requests)
    with build.cold(backend) as lazyfs:
        started_s = host.now()
        lazyfs.run_container(build.reference("indexed"), *PYTHON_START)
        found["first python3 start by `lazyfs run`, cache empty: s"] = host.now() - started_s
        with lazyfs.mounted(build.reference("indexed"), build.fresh("root")):
            host.drop_page_cache()
            started_s = host.now()
            lazyfs.run_container(build.reference("indexed"), *PYTHON_START)
            found["the same, block cache warm, page cache cold: s"] = host.now() - started_s
            warm = []
            for _ in range(6):
                started_s = host.now()
                lazyfs.run_container(build.reference("indexed"), *PYTHON_START)
                warm.append(host.now() - started_s)
            found["the same, all warm: s"] = statistics.median(warm)
    return found


def reading(build: Build, backend: str) -> Sample:
    """Walks and reads of the whole tree, sequential reads, and the memory after all that."""
    found: Sample = {}
    with build.cold(backend) as lazyfs:
        with lazyfs.mounted(build.reference("indexed"), build.fresh("root")) as target:
            found["all files read, cache empty: s"] = read_all(target)
            for title, printing in (("find", False), ("stat of all files", True)):
                host.drop_page_cache()
                arguments = ("-printf", "%s\n") if printing else ()
                found[f"{title}, page cache cold: s"] = host.timed("find", target, "-xdev", *arguments)
            host.drop_page_cache()
            found["all files read, block cache warm: s"] = read_all(target)
            found["all files read, warm: s"] = read_all(target)
            found["memory of all processes after that: MB"] = lazyfs.memory_bytes() / 1e6
        with lazyfs.mounted(build.reference("large"), build.fresh("root")) as target:
            copy = ["dd", f"if={target / LARGE_FILE_NAME}", "of=/dev/null", "bs=1M", "status=none"]
            host.timed(*copy)
            times = []
            for _ in range(3):
                host.drop_page_cache()
                times.append(host.timed(*copy))
            found["cached 500 MB file in order, page cache cold: s"] = statistics.median(times)
    return found


def indexing(build: Build, backend: str) -> Sample:
    """Making and pushing an index: of an image, after a small change, and what a second image on a base costs."""
    found: Sample = {}
    _, whole_s = command.index(build.reference("indexed"), build.fresh("index"), program=build.program)
    found["index of the image, whole command: s"] = whole_s
    found["index size: bytes"] = index_bytes(build.registry_url, build.reference("indexed"))
    cache = build.fresh("index")
    # A repository of its own in each round: a registry takes nothing twice.
    many = f"many-{next(_serial)}"
    for tag, layout in zip(("first", "changed"), manyfiles.layouts(build.fresh("layouts")), strict=True):
        push(layout, image.TAG, build.reference(many, tag=tag))
    with build.proxy() as proxy:
        first, changed = (build.reference(many, proxy.host, tag) for tag in ("first", "changed"))
        command.index(first, cache, program=build.program)
        proxy.requests.clear()
        _, whole_s = command.index(changed, cache, program=build.program)
        uploads = [one for one in proxy.requests if one.method in ("PUT", "PATCH", "POST")]
        found["index after a change of one file in 33,000, pushed: s"] = whole_s
        found["the same: bytes pushed"] = sum(int(one.headers.get("content-length", 0)) for one in uploads)
    with build.proxy() as proxy, build.cold(backend) as lazyfs, contextlib.ExitStack() as stack:
        first, changed = (build.reference(many, proxy.host, tag) for tag in ("first", "changed"))
        stack.enter_context(lazyfs.mounted(first, build.fresh("root")))
        before_bytes = proxy.bytes_sent
        stack.enter_context(lazyfs.mounted(changed, build.fresh("root")))
        found["mount of a second image on a cached base: bytes fetched"] = proxy.bytes_sent - before_bytes
    shutil.rmtree(cache)
    return found


GROUPS: dict[str, Callable[[Build, str], Sample]] = {
    "mounting": mounting,
    "starts": starts,
    "reading": reading,
    "indexing": indexing,
}


def _children_cpu_s() -> float:
    times = os.times()
    return times.children_user + times.children_system


def prepare(build: Build) -> None:
    """Pushes the images of one side and indexes them by its own command."""
    pictures = {"indexed": image.interpreters(), "plain": image.interpreters(), "large": image.large_file()}
    for name, picture in pictures.items():
        push(picture.layout, image.TAG, build.reference(name))
    for name in ("indexed", "large"):
        command.index(build.reference(name), build.fresh("prepared"), program=build.program)


def measure(builds: tuple[Build, Build], groups: list[str], backend: str, repetitions: int) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for number in range(repetitions):
        for group in groups:
            sides = list(enumerate(builds)) if number % 2 == 0 else list(reversed(list(enumerate(builds))))
            for side, build in sides:
                print(f"round {number + 1} of {repetitions}: {group}, {build.name}", file=sys.stderr, flush=True)
                for title, value in GROUPS[group](build, backend).items():
                    row = rows.setdefault(title, Row(title))
                    (row.after if side else row.before).append(value)
    return rows


def table(rows: dict[str, Row]) -> str:
    lines = ["| measure | before | now | now / before |", "|---|---|---|---|"]
    for row in rows.values():
        before, after = (f"{statistics.median(side):,.4g}" for side in (row.before, row.after))
        mark = "**" if row.ratio > ALLOWED else ""
        lines.append(f"| {row.title} | {before} | {after} | {mark}{row.ratio:.2f}x{mark} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench-against", description=__doc__)
    parser.add_argument("before", type=Path, help="the other checkout, set up")
    parser.add_argument("--repetitions", type=int, default=5, help="samples per side (default: %(default)s)")
    parser.add_argument("--backend", choices=("kernel", "fuse"), default="kernel")
    parser.add_argument("--only", choices=list(GROUPS), action="append", help="one group of rows (repeatable)")
    parser.add_argument("--output", type=Path, help="write the samples there, as JSON")
    args = parser.parse_args()
    if os.geteuid() != 0:
        print("make bench-against mounts file systems and drops the page cache: run it as root", file=sys.stderr)
        return 1
    started_s = time.monotonic()
    programs = {"before": (args.before / ".venv/bin/lazyfs").resolve(), "now": PROGRAM}
    with host.work_directory() as directory, RegistryServer(directory / "registry") as registry:
        before, after = (
            Build(name, program, f"{registry.host}/{name}", registry.url, directory)
            for name, program in programs.items()
        )
        for build in (before, after):
            prepare(build)
        rows = measure((before, after), args.only or list(GROUPS), args.backend, args.repetitions)
    print(table(rows))
    print(f"{args.repetitions} repetitions, backend={args.backend}, {time.monotonic() - started_s:.0f} s")
    if args.output:
        document = [asdict(row) | {"ratio": row.ratio} for row in rows.values()]
        args.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
