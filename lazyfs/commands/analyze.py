"""`lazyfs analyze IMAGE [-- CMD]`: where the data lies, what a start reads, and what the cache has already.

A start is measured in a container with a cache of its own, which has the index only, so that it fetches exactly what
the start needs. None of the image's data is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import trio

from lazyfs.cache import places
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.scans import copy_index
from lazyfs.commands.bars import layer_bars
from lazyfs.commands.containers import container_mount, say
from lazyfs.commands.report import human_bytes, table
from lazyfs.containers.roots import MountedRoots
from lazyfs.containers.run import RunRequest, run
from lazyfs.containers.spec import SpecOptions
from lazyfs.containers.store import ContainerStore
from lazyfs.control import query, rundir
from lazyfs.core.index.analysis import ImageAnalysis, analyse
from lazyfs.core.layer.blocks import BlockTable
from lazyfs.core.oci.digests import ContentRoot, Digest
from lazyfs.errors import HostError
from lazyfs.images.config import load_config
from lazyfs.images.documents import Found, Missing, find_index
from lazyfs.images.resolve import close_source
from lazyfs.indexing.missing import DOCUMENTS_S, build, resolved_image, run_async
from lazyfs.mounting.options import MountOptions, quote
from lazyfs.mounting.owndaemon import end_daemon


def analyze(args: argparse.Namespace) -> int:
    """The command. Its exit code is the container's if one was run. Raises LazyfsError."""
    options: MountOptions = args.options
    if args.plot:
        from lazyfs.commands import plot  # before the work, because matplotlib may be missing
    cache = CacheDirectory(places.cache_directory(options.cache))
    reference, manifest_digest, index = _index(cache, args.image, options)
    layers = [(layer.head.record, BlockTable(layer.head.table())) for _, layer in sorted(index.layers.items())]
    own = {record.content_root for record, _ in layers}
    analysis = analyse(index.namespace, layers, functools.partial(_present, cache), _blocks_of_others(cache, own))
    report: dict[str, Any] = {"image": reference, "manifest_digest": manifest_digest, **asdict(analysis)}
    code = 0
    if args.command:
        code, report["start"] = _start(cache, manifest_digest, args)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        sys.stdout.write(_text(report, analysis))
    if args.plot:
        plot.plot(args.plot, reference, analysis, report.get("start"))
    return code


def _index(cache: CacheDirectory, image: str, options: MountOptions) -> tuple[str, Digest, Found]:
    """Reference, manifest digest and index of an image. An index that is neither cached nor attached is made and kept,
    but no data."""
    found: list[tuple[str, Digest, Found]] = []

    async def work() -> None:
        async with resolved_image(cache, image, options.access) as resolved:
            with trio.fail_after(DOCUMENTS_S):
                index = await find_index(cache, resolved, offline=options.access.offline, all_layers=True)
            if isinstance(index, Missing):
                await build(cache, resolved, fill=False, bars=layer_bars)
                index = await find_index(cache, resolved, offline=True, all_layers=True)
            else:
                with trio.fail_after(DOCUMENTS_S):
                    await load_config(cache, resolved)
            if isinstance(index, Missing):
                raise HostError("the index that was just made is not in the cache", "check the cache's disk")
            await close_source(index.source)
            found.append((str(resolved.reference), resolved.manifest_digest, index))

    run_async(work)
    return found[0]


def _present(cache: CacheDirectory, content_root: ContentRoot, table: BlockTable) -> Sequence[int]:
    entry = cache.peek(content_root)
    return bytes(table.count) if entry is None else entry[1]


def _blocks_of_others(cache: CacheDirectory, own: set[ContentRoot]) -> set[bytes]:
    """sha256 of all blocks that the cache has of layers that this image, which has `own`, does not have."""
    digests: set[bytes] = set()
    for content_root in cache.content_roots():
        entry = None if content_root in own else cache.peek(content_root)
        if entry is not None:
            table, marks = entry
            digests.update(table.digest(block) for block, mark in enumerate(marks) if mark)
    return digests


# -- what a start reads ----------------------------------------------------------------------------------


class _CountingRoots(MountedRoots):
    """Asks the daemon for its counters before it unmounts."""

    def __init__(self) -> None:
        super().__init__()
        self.counters: dict[str, Any] = {}

    def detach(self, target: str) -> None:
        entry = query.lazyfs_mount(target)
        daemon = query.daemon_of(entry.dev) if entry is not None else None
        if daemon is not None:
            self.counters = daemon.reply
        super().detach(target)


def _start(cache: CacheDirectory, manifest_digest: Digest, args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Runs the command in a container with an empty cache; its exit code, and what it read."""
    with _empty_cache(cache, manifest_digest) as private:
        request = RunRequest(
            args.image,
            SpecOptions(command=tuple(args.command)),
            mount=container_mount([*args.option_texts, f"cache={quote(private.path)}"]),
            remove=True,
        )
        roots = _CountingRoots()
        started_s = time.monotonic()
        with _standard_output_on_error():  # standard output is for the analysis
            code = run(request, ContainerStore(), roots, say)
        seconds = time.monotonic() - started_s
        if not roots.counters:
            raise HostError("the daemon did not say what the container read", "it may have died: try again")
    return code, {
        "command": list(args.command),
        "exit_code": code,
        "seconds": round(seconds, 3),
        "read_bytes": roots.counters["bytes_read"],
        "fetched_bytes": roots.counters["bytes_fetched"],
        "requests": roots.counters["requests"],
    }


@contextlib.contextmanager
def _empty_cache(cache: CacheDirectory, manifest_digest: Digest) -> Iterator[CacheDirectory]:
    """A cache that has an image's index and none of its data. It is removed afterwards, and its daemon ended."""
    directory = tempfile.mkdtemp(prefix="analyze-", dir=cache.tmp)
    try:
        private = CacheDirectory(os.path.join(directory, "cache"))
        copy_index(cache, private, manifest_digest)
        try:
            yield private
        finally:
            end_daemon(rundir.runtime_directory(private.path))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _standard_output_on_error() -> Iterator[None]:
    sys.stdout.flush()
    saved_fd = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(saved_fd, 1)
        os.close(saved_fd)


# -- for people ------------------------------------------------------------------------------------------


def _text(report: dict[str, Any], analysis: ImageAnalysis) -> str:
    layers = analysis.layers
    rows = [
        [
            str(layer.depth),
            layer.blob_digest.removeprefix("sha256:")[:12],
            *map(human_bytes, (layer.blob_bytes, layer.data_bytes, layer.visible_bytes)),
            f"{layer.visible_files:,}",
            *map(human_bytes, (layer.cached_bytes, layer.cached_elsewhere_bytes)),
        ]
        for layer in layers
    ]
    blob_bytes = sum(layer.blob_bytes for layer in layers)
    visible_bytes = sum(layer.visible_bytes for layer in layers)
    lines = [
        f"{report['image']}  {human_bytes(blob_bytes)} in {len(layers)} layers, {analysis.inodes:,} inodes\n",
        table(["DEPTH", "LAYER", "SIZE", "DATA", "VISIBLE", "FILES", "CACHED", "ELSEWHERE"], rows, range(2, 8)),
        "DATA: of files, unpacked; VISIBLE: what of it later layers left; ELSEWHERE: not cached of this layer,\n"
        "but as equal blocks of layers of other images\n",
    ]
    if start := report.get("start"):
        read_bytes, fetched_bytes = start["read_bytes"], start["fetched_bytes"]
        lines.append(
            f"a start reads {human_bytes(read_bytes)} ({_share(read_bytes, visible_bytes)} of what is visible) in "
            f"{start['seconds']:.2f} s,\nfetching {human_bytes(fetched_bytes)} ({_share(fetched_bytes, blob_bytes)} "
            f"of the image) by {start['requests']:,} requests\n"
        )
    return "".join(lines)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f} %"
