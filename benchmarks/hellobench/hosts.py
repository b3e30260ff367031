"""Cold hosts, and what is made for a kind of them beforehand: packs, profiles, another build's indexes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import attached, command
from benchmarks.command import PROGRAM, Lazyfs
from benchmarks.hellobench import images, readiness, recording
from benchmarks.hellobench.lazy import FormerLazyRunner, LazyRunner, ProfiledLazyRunner
from benchmarks.hellobench.modes import MODES
from benchmarks.hellobench.preparation import TAG, Preparation
from benchmarks.hellobench.runners import FORMER, INDEXED, PACKED, Runner, unique
from benchmarks.hellobench.workloads import Workload
from benchmarks.host import now, run


@dataclass(frozen=True)
class Pack:
    """A startup pack in the registry, and what recording it took: the start, the pack and its push."""

    pack_bytes: int
    record_s: float


class Hosts:
    """Makes hosts. What several of them need is made once a run. `before`: the checkout of another build, set up."""

    def __init__(self, preparation: Preparation, before: Path | None = None) -> None:
        self._preparation = preparation
        self._before = None if before is None else (before / ".venv/bin/lazyfs").resolve()
        self._packs: dict[str, Pack] = {}
        self._profiles: dict[str, Path] = {}
        self._former: set[str] = set()

    def prepare(self, workload: Workload, mode: str) -> None:
        """Have ready what such a host finds. RuntimeError and what `readiness` raises, if that cannot be made."""
        kind = MODES[mode]
        if kind.repository == PACKED:
            self.pack(workload)
        if kind.repository == FORMER:
            self._index_by_former(workload)
        if kind.profiled:
            self._profile(workload)

    def make(self, workload: Workload, mode: str, directory: Path) -> Runner:
        """A host, cold. After `prepare`; `directory` is made."""
        template = self._preparation.template(workload)
        if mode == FormerLazyRunner.mode:
            return FormerLazyRunner(directory, template, self._former_program())
        runner = MODES[mode](directory, template)
        if isinstance(runner, ProfiledLazyRunner):
            shutil.copytree(self._profile(workload), runner.cache, dirs_exist_ok=True)
        return runner

    def pack(self, workload: Workload) -> Pack:
        """The pack of one start, recorded by `lazyfs record` next to the registry."""
        if workload.name not in self._packs:
            reference = self._push(workload, PACKED)
            command.index(reference, self._preparation.directory / "indexing")
            cache = self._preparation.directory / unique("recording")
            started = now()
            try:
                options = ("-o", Lazyfs(cache).options(), *recording.until(workload.ready))
                run(PROGRAM, "record", *options, "--push", reference)
                record_s = now() - started
            finally:
                shutil.rmtree(cache, ignore_errors=True)
            blobs = attached.blobs(self._preparation.registry.url, reference, attached.PACK)
            if not blobs:
                raise RuntimeError(f"{workload.name}: lazyfs record ended well, but no pack is attached to the image")
            self._packs[workload.name] = Pack(sum(blobs.values()), record_s)
        return self._packs[workload.name]

    def pack_record(self, workload: Workload) -> dict[str, Any] | None:
        """The record "pack" of the pack that was made in this run; None without."""
        made = self._packs.get(workload.name)
        if made is None:
            return None
        return {"record": "pack", "workload": workload.name, "pack_bytes": made.pack_bytes, "record_s": made.record_s}

    def _index_by_former(self, workload: Workload) -> None:
        if workload.name not in self._former:
            program = self._former_program()
            reference = self._push(workload, FORMER)
            command.index(reference, self._preparation.directory / "indexing-before", program=program)
            self._former.add(workload.name)

    def _profile(self, workload: Workload) -> Path:
        """The cache of a host on which the image was started, after everything was evicted that can be."""
        if workload.name not in self._profiles:
            directory = self._preparation.directory / unique("profiling")
            runner = LazyRunner(directory, self._preparation.template(workload))
            reference = f"{self._preparation.registry.host}/{self._preparation.repository(workload, INDEXED)}:{TAG}"
            with runner.services():
                runner.pull(reference)
                container = runner.create(reference)
                try:
                    readiness.wait_until_ready(workload.ready, container.start(), workload.deadline_s)
                finally:
                    container.kill()
                    container.remove()
            run(PROGRAM, "cache", "prune", "--cache", runner.cache)
            profiles = runner.cache / "profiles"
            if not profiles.is_dir() or not any(profiles.iterdir()):
                raise RuntimeError(f"{workload.name}: its start left no profile in the cache")
            self._profiles[workload.name] = runner.cache
        return self._profiles[workload.name]

    def _push(self, workload: Workload, repository: str) -> str:
        """Bring the image to one of the registry's repositories; the reference to it there."""
        host = self._preparation.registry.host
        path = self._preparation.repository(workload, repository)
        self._preparation.push_to(host, images.layout(), workload.name, path, TAG)
        return f"{host}/{path}:{TAG}"

    def _former_program(self) -> Path:
        if self._before is None:
            raise RuntimeError("another build is compared with only by --before DIR")
        return self._before
