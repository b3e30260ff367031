"""Hosts that mount an image by lazyfs and fetch what is read."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.command import PROGRAM, Lazyfs
from benchmarks.hellobench.runners import FORMER, INDEXED, PACKED, PLAIN, Counters, RuncContainer, Runner, unique
from benchmarks.host import run


class LazyRunner(Runner):
    """The daemon runs, as containerd does; the cache is empty; the image has its index in the registry.

    A pull is a mount. It stays until the host is given up, as a pulled image stays. To create a container is
    `lazyfs bundle`: it joins the mount, adds a writable overlay and writes the configuration. Like `ctr container
    create` it takes the image as it was pulled, and does not ask the registry what the tag is by now (`offline`).
    """

    mode = "lazyfs"
    repository = INDEXED
    indexed = True
    daemon_rests = True

    def __init__(self, directory: Path, template: Path, program: Path = PROGRAM) -> None:
        super().__init__(directory, template)
        self._lazyfs = Lazyfs(directory / "cache", program=program)
        self._mounts: list[Path] = []

    @property
    def cache(self) -> Path:
        """The host's cache directory, empty so far."""
        return self._lazyfs.cache

    @contextlib.contextmanager
    def services(self) -> Iterator[None]:
        with self._lazyfs.daemon(rest_s=0):
            try:
                yield
            finally:
                for target in reversed(self._mounts):
                    self._lazyfs.umount(target)
        self._lazyfs.wait_until_ended()

    def pull(self, reference: str) -> None:
        target = self.directory / unique("mount")
        self._lazyfs.mount(reference, target, "insecure")
        self._mounts.append(target)

    def create(self, reference: str) -> RuncContainer:
        bundle = self.directory / unique("bundle")
        run(self._lazyfs.program, "bundle", "-o", self._lazyfs.options("rw", "insecure", "offline"), reference, bundle)
        return RuncContainer(bundle, lambda: self._lazyfs.umount(bundle / "rootfs"))

    def counters(self) -> Counters:
        stats = [self._lazyfs.stats(target) for target in self._mounts]
        ticks = sum(cpu_ticks(pid) for pid in self._lazyfs.daemons())
        return Counters(
            sum(image["bytes_fetched"] for image in stats),
            sum(image["requests"] for image in stats),
            # What is read of a layer that two images share counts for both.
            stats[0]["bytes_read"] if len(stats) == 1 else None,
            ticks / os.sysconf("SC_CLK_TCK"),
            self._lazyfs.memory_bytes(),
        )


class UnindexedLazyRunner(LazyRunner):
    """The image has no index: the mount streams its layers once and builds the index meanwhile."""

    mode = "lazyfs-noindex"
    repository = PLAIN
    indexed = False

    def counters(self) -> Counters:
        # The first mount's pass over the layers is not the daemon's.
        return dataclasses.replace(super().counters(), bytes_fetched=None, requests=None)


class SharingLazyRunner(LazyRunner):
    """The cache has what the start of another image read, whose base is the same."""

    mode = "lazyfs-shared"
    shares = True


class PackedLazyRunner(LazyRunner):
    """The image has a startup pack in the registry, too, recorded from one start of it elsewhere."""

    mode = "lazyfs-pack"
    repository = PACKED


class ProfiledLazyRunner(LazyRunner):
    """The image was started on the host, then everything that could be evicted was; there is no pack."""

    mode = "lazyfs-profile"
    profiled = True


class FormerLazyRunner(LazyRunner):
    """Another build of lazyfs, with an index of its own making."""

    mode = "lazyfs-before"
    repository = FORMER


def cpu_ticks(pid: int) -> int:
    """Clock ticks that a process has run, in user and kernel mode (proc(5), stat, fields 14 and 15); 0 if gone."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0
