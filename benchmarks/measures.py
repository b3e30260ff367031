"""The measures of the table. Each yields results; sides alternate in one run, so that drift hits both."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import command, containers, host
from benchmarks.command import Lazyfs
from benchmarks.containers import PYTHON_LONG_START, PYTHON_START, ext4_copy, lazy_bundle, overlay, plain_bundle
from benchmarks.image import LARGE_FILE_NAME, BenchmarkImage
from benchmarks.record import Result, ratio, seconds
from tests.servers import FaultProxy

# Times faster than containerd, which pulls everything: a mount, and a start that reads a part of the image.
MOUNT_FASTER, FIRST_START_FASTER = 20.0, 4.0
_serial = itertools.count()


@dataclass(frozen=True)
class Place:
    """Where and what to measure: references in the local registry, and both sides' directories."""

    directory: Path
    repetitions: int
    indexed: str  # the interpreters' image with its index attached
    plain: str  # the same image in another repository, without
    large: str  # the image of one large file, indexed
    interpreters: BenchmarkImage
    large_file: BenchmarkImage

    def fresh(self, name: str) -> Path:
        """A path that does not exist yet."""
        return self.directory / f"{name}-{next(_serial)}"


@contextlib.contextmanager
def cold(place: Place, backend: str) -> Iterator[Lazyfs]:
    """lazyfs with an empty cache and no daemon; both are gone afterwards."""
    lazyfs = Lazyfs(place.fresh("cache"), backend)
    try:
        yield lazyfs
    finally:
        lazyfs.wait_until_ended()
        shutil.rmtree(lazyfs.cache)


def mounting(place: Place, backend: str) -> Iterator[Result]:
    """`lazyfs mount` with an empty cache, with and without an index, against `ctr image pull`.

    Before each sample everything is forgotten, programs too (`host.drop_page_cache` says why). containerd runs before
    it is asked, so the comparison with it is made with our daemon running, and without.
    """
    with host.Containerd(place.fresh("containerd")) as containerd:

        def pairs(reference: str, *, running: bool = False) -> tuple[list[float], list[float]]:
            ours, theirs = [], []
            for _ in range(place.repetitions):
                with cold(place, backend) as lazyfs, contextlib.ExitStack() as stack:
                    if running:
                        stack.enter_context(lazyfs.daemon())
                    target = place.fresh("root")
                    host.drop_page_cache()
                    ours.append(lazyfs.mount(reference, target))
                    lazyfs.umount(target)
                host.drop_page_cache()
                theirs.append(containerd.pull(reference))
                containerd.remove(reference)
            return ours, theirs

        ours, theirs = pairs(place.indexed)
        median = statistics.median(ours)
        yield Result(
            "mount", "`lazyfs mount`, indexed, cache empty, page cache cold, no daemon running", "0.5 s", backend,
            median, 0.5, seconds(ours), ours=ours,
        )  # fmt: skip
        title = "the same, against `ctr image pull`"
        informative = backend == "kernel"
        yield _times_faster("mount-pull-alone", title, backend, ours, theirs, MOUNT_FASTER, informative)
        if backend == "kernel":
            title = "the same with its daemon running, as containerd is, against `ctr image pull`"
            yield _times_faster("mount-pull", title, backend, *pairs(place.indexed, running=True), times=MOUNT_FASTER)
        title = "first mount without an index, against pull and unpack"
        yield ratio("mount-plain", title, backend, *pairs(place.plain), 1.0, "faster")


def _times_faster(
    key: str, title: str, backend: str, ours: list[float], theirs: list[float], times: float, informative: bool = False
) -> Result:
    value = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return Result(
        key, title, "" if informative else f"{times:g}x faster", backend, value, times,
        f"{value:.{0 if value >= 10 else 1}f}x ({seconds(ours)} / {seconds(theirs)})",
        smaller_is_better=False, unit="x", ours=ours, theirs=theirs, informative=informative,
    )  # fmt: skip


def first_start(place: Place, backend: str) -> Iterator[Result]:
    """The first container of an indexed image, from an empty cache: `lazyfs run` alone, its mount included.

    Bytes are counted by a proxy before the registry, index and manifests too; times are taken without it. Fewer bytes
    are no aim by themselves: the start must be quick, too, so the same start is compared with what fetches everything.
    """
    host_name, _, name = place.indexed.partition("/")
    for start, key, informative in ((PYTHON_START, "fetched", False), (PYTHON_LONG_START, "fetched-more", True)):
        parts, times = [], []
        for _ in range(place.repetitions):
            with cold(place, backend) as lazyfs, FaultProxy(host_name) as proxy:
                lazyfs.run_container(f"{proxy.host}/{name}", *start)
                parts.append(proxy.bytes_sent / place.interpreters.compressed_bytes)
            with cold(place, backend) as lazyfs:
                started = host.now()
                lazyfs.run_container(place.indexed, *start)
                times.append(host.now() - started)
        share = statistics.median(parts)
        shown = f"{share:.1%}, {seconds(times)}"
        what = "python3 start with imports" if not informative else "the same with OpenSSL and SQLite"
        yield Result(
            key, f"{what} by `lazyfs run`, cache empty: bytes fetched", "" if informative else "below 20 %",
            backend, share, 0.2, shown, unit="of the compressed image", ours=parts, informative=informative,
        )  # fmt: skip
    title = "the first of these, page cache cold, daemon running, against `ctr image pull` and `ctr run`"
    yield _times_faster("first-start", title, backend, *_against_ctr(place, backend), times=FIRST_START_FASTER)


def _against_ctr(place: Place, backend: str) -> tuple[list[float], list[float]]:
    """Seconds from an empty host with its service running until a program has ended, for lazyfs and containerd."""
    ours, theirs = [], []
    with host.Containerd(place.fresh("containerd")) as containerd:
        for _ in range(place.repetitions):
            with cold(place, backend) as lazyfs, lazyfs.daemon():
                host.drop_page_cache()
                started = host.now()
                lazyfs.run_container(place.indexed, *PYTHON_START)
                ours.append(host.now() - started)
            host.drop_page_cache()
            started = host.now()
            containerd.pull(place.indexed)
            containerd.run_container(place.indexed, f"bench-{next(_serial)}", *PYTHON_START)
            theirs.append(host.now() - started)
            containerd.remove(place.indexed)
    return ours, theirs


def starts(place: Place, backend: str) -> Iterator[Result]:
    """Container starts with a warm block cache, against the same image unpacked on ext4: by runc on both sides, and by
    each side's own command, which is `ctr run` there."""
    copy = ext4_copy(place.interpreters.root_tar, place.fresh("copy"))
    with contextlib.ExitStack() as stack:
        lazyfs = stack.enter_context(cold(place, backend))
        first = stack.enter_context(lazy_bundle(lazyfs, place.indexed, place.fresh("bundle")))
        second = stack.enter_context(lazy_bundle(lazyfs, place.indexed, place.fresh("bundle")))
        on_ext4 = plain_bundle(first, place.fresh("bundle"), copy)
        layered = stack.enter_context(overlay(copy, place.fresh("overlay")))
        on_overlay = plain_bundle(first, place.fresh("bundle"), layered)
        containers.start(first)  # fills the block cache
        containerd = stack.enter_context(host.Containerd(place.fresh("containerd")))
        containerd.pull(place.indexed)

        def whole() -> float:
            started = host.now()
            lazyfs.run_container(place.indexed, *PYTHON_START)
            return host.now() - started

        def by_ctr() -> float:
            started = host.now()
            containerd.run_container(place.indexed, f"bench-{next(_serial)}", *PYTHON_START)
            return host.now() - started

        def mounted_overlay() -> float:
            started = host.now()
            with overlay(copy, place.fresh("overlay")) as root:
                bundle = plain_bundle(first, place.fresh("bundle"), root)
                containers.start(bundle)
            return host.now() - started

        ours, theirs = alternate(
            place.repetitions, lambda: containers.start(first), lambda: containers.start(on_ext4)
        )
        title = "the same, block cache warm, page cache cold, against an ext4 copy (runc on both)"
        yield ratio("start-cold", title, backend, ours, theirs, 1.3, "1.3x")
        title = "the same by `lazyfs run` against `ctr run` on ext4 (each with its mount and clean-up)"
        yield ratio("run-cold-ctr", title, backend, *alternate(place.repetitions, whole, by_ctr), 1.3, "1.3x")
        ours, theirs = alternate(place.repetitions, whole, lambda: containers.start(on_ext4))
        title = "the same by `lazyfs run` against runc alone on ext4"
        yield ratio("run-cold", title, backend, ours, theirs, 1.3, "", informative=True)
        containers.start(on_overlay)
        ours, theirs = alternate(
            10 * place.repetitions,  # a few milliseconds decide
            lambda: containers.start(second),
            lambda: containers.start(on_overlay),
            drop=False,
        )
        title = "second container of the image, warm, against overlayfs on ext4 (runc on both)"
        yield ratio("start-warm", title, backend, ours, theirs, 1.05, "1.05x")
        title = "the same by `lazyfs run` against `ctr run`"
        samples = alternate(2 * place.repetitions, whole, by_ctr, drop=False)
        yield ratio("run-warm-ctr", title, backend, *samples, 1.05, "", informative=True)
        ours, theirs = alternate(2 * place.repetitions, whole, mounted_overlay, drop=False)
        title = "the same by `lazyfs run`, against mount, runc and umount"
        yield ratio("run-warm", title, backend, ours, theirs, 1.25, "1.25x")
    shutil.rmtree(copy)


def tree(place: Place, backend: str) -> Iterator[Result]:
    """Walks and reads of the whole tree, its blocks cached, against ext4; then the daemon's memory."""
    copy = ext4_copy(place.interpreters.root_tar, place.fresh("copy"))
    with cold(place, backend) as lazyfs, lazyfs.mounted(place.indexed, place.fresh("root")) as target:
        read_all(target)

        def pair(job: Callable[[Path], float], drop: bool) -> tuple[list[float], list[float]]:
            return alternate(place.repetitions, lambda: job(target), lambda: job(copy), drop=drop)

        ours, theirs = pair(lambda root: host.timed("find", root, "-xdev"), drop=True)
        yield ratio("find", "`find`, page cache cold, against ext4", backend, ours, theirs, 1.0, "as fast")
        ours, theirs = pair(lambda root: host.timed("find", root, "-xdev", "-printf", "%s\n"), drop=True)
        yield ratio("stat", "`stat` of all files, cold, against ext4", backend, ours, theirs, 1.0, "as fast")
        ours, theirs = pair(read_all, drop=True)
        title = "read of all files, block cache warm, page cache cold, against ext4"
        yield ratio("read-cold", title, backend, ours, theirs, 1.0, "", informative=True)
        read_all(target)
        read_all(copy)
        ours, theirs = pair(read_all, drop=False)
        yield ratio("read", "read of all files, warm, against ext4", backend, ours, theirs, 1.1, "1.1x")
        claimed, used = int(lazyfs.stats(target).get("memory_bytes", 0)), lazyfs.memory_bytes()
        larger = max(claimed, used) / 1e6
        shown = f"{larger:.0f} MB"
        title = "memory after reading everything: the daemon's claim or all its processes, the larger"
        yield Result("memory", title, "below 80 MB", backend, larger, 80, shown, unit="MB", ours=[larger])
    shutil.rmtree(copy)


def sequential(place: Place, backend: str) -> Iterator[Result]:
    """A cached file of 500 MB read in order with a cold page cache, against ext4: by a later mount than the one that
    fetched it, as a host does day by day, and by that one itself."""
    copy = ext4_copy(place.large_file.root_tar, place.fresh("copy"))

    def read(root: Path) -> float:
        return host.timed("dd", f"if={root / LARGE_FILE_NAME}", "of=/dev/null", "bs=1M", "status=none")

    def throughput(lazyfs: Lazyfs, fetch_first: bool) -> tuple[list[float], list[float]]:
        with lazyfs.mounted(place.large, place.fresh("root")) as target:
            if fetch_first:
                read(target)
            samples = alternate(place.repetitions, lambda: read(target), lambda: read(copy))
            if fetch_first and backend == "kernel":
                lazyfs.wait_until_sound()
        lazyfs.wait_until_ended()
        return samples

    with cold(place, backend) as lazyfs:
        same, later = throughput(lazyfs, fetch_first=True), throughput(lazyfs, fetch_first=False)
    yield _throughput_result(place, backend, "sequential", later)
    yield _throughput_result(place, backend, "sequential-same", same, informative=True)
    shutil.rmtree(copy)


def _throughput_result(
    place: Place, backend: str, key: str, samples: tuple[list[float], list[float]], informative: bool = False
) -> Result:
    ours, theirs = samples
    value = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    rates = [place.large_file.tar_bytes / 1e9 / statistics.median(side) for side in samples]
    title = "sequential read of a cached 500 MB file, page cache cold, against ext4"
    if informative:
        title = "the same by the mount that fetched it"
    return Result(
        key, title, "" if informative else "0.85x of its throughput", backend, value, 0.85,
        f"{value:.2f}x ({rates[0]:.2f} / {rates[1]:.2f} GB/s)",
        smaller_is_better=False, unit="x", ours=ours, theirs=theirs, informative=informative,
    )  # fmt: skip


def indexing(place: Place, index_bytes: Callable[[str], int]) -> Iterator[Result]:
    """Time and size of `lazyfs index --push`; the same for both backends."""
    samples = [command.index(place.indexed, place.fresh("index")) for _ in range(place.repetitions)]
    building = [seconds for seconds, _ in samples]
    share = index_bytes(place.indexed) / place.interpreters.compressed_bytes
    rate, whole_rate = (
        place.interpreters.tar_bytes / 1e6 / statistics.median(times) for times in zip(*samples, strict=True)
    )
    yield Result(
        "index-size", "index size", "1 % of the compressed image", "kernel", share, 0.01, f"{share:.2%}",
        unit="of the compressed image", ours=[share],
    )  # fmt: skip
    yield Result(
        "index-speed", "index building", "100 MB/s of tar", "kernel", rate, 100,
        f"{rate:.0f} MB/s ({whole_rate:.0f} MB/s by the whole command)", smaller_is_better=False, ours=building,
    )  # fmt: skip


def read_all(root: Path) -> float:
    """Seconds to read every regular file of a tree."""
    return host.timed("sh", "-c", 'exec find "$1" -xdev -type f -exec cat {} + >/dev/null', "sh", root)


def alternate(
    repetitions: int, ours: Callable[[], float], theirs: Callable[[], float], drop: bool = True
) -> tuple[list[float], list[float]]:
    """Samples of both sides in turn, each with a cold page cache if `drop`."""
    samples: tuple[list[float], list[float]] = ([], [])
    for number in range(repetitions):
        sides = [(samples[0], ours), (samples[1], theirs)]
        for collected, side in sides if number % 2 == 0 else reversed(sides):
            if drop:
                host.drop_page_cache()
            collected.append(side())
    return samples
