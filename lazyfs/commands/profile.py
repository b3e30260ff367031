"""`lazyfs profile show IMAGE`: what starts of an image touch, as this host saw it."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

import trio

from lazyfs.cache import places
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.profiles import load_profile
from lazyfs.commands.report import human_bytes, print_json, table
from lazyfs.control import client, query, rundir
from lazyfs.core.oci.digests import ContentRoot, Digest
from lazyfs.core.starts.profile import Profile
from lazyfs.core.starts.summary import TouchedFile, TouchedLayer, by_file, by_layer
from lazyfs.errors import LazyfsError, NotFound
from lazyfs.images.documents import Missing, find_index
from lazyfs.images.resolve import Resolved, close_source
from lazyfs.indexing.missing import DOCUMENTS_S, resolved_image, run_async
from lazyfs.mounting.options import MountOptions
from lazyfs.sources.access import Access

_ANSWER_S = 30.0
_NO_FILE = "(not in a file of the root)"


@dataclass(frozen=True, slots=True)
class _Named:
    """An image, and where its layers are in it, as far as an index in the cache says so."""

    reference: str
    manifest_digest: Digest
    layers: dict[ContentRoot, tuple[int, Digest]]  # depth, 1 is the bottom, and digest of the blob


def profile(args: argparse.Namespace) -> int:
    """`lazyfs profile show`. Raises LazyfsError."""
    options: MountOptions = args.options
    if args.plot:
        from lazyfs.commands import plot  # before the work, because matplotlib may be missing
    cache = CacheDirectory(places.cache_directory(options.cache))
    named = _named(cache, args.image, options.access)
    _end_trace(cache, named.manifest_digest)
    found = load_profile(cache, named.manifest_digest)
    if found is None or not found.touches:
        raise NotFound(
            f"no start of {named.reference} was seen on this host",
            "it is traced when it is mounted, unless learn=off, or all of it is in the cache and sealed",
        )
    layers, files = by_layer(found), by_file(found)
    if args.json:
        print_json(_report(named, found, layers, files))
    else:
        sys.stdout.write(_text(named, found, layers, files))
    if args.plot:
        labels = [" ".join(_layer(named, one.content_root)) for one in layers]
        plot.plot_profile(args.plot, named.reference, found, labels)
    return 0


def _named(cache: CacheDirectory, image: str, access: Access) -> _Named:
    """The image as it is known on this host; a registry is asked only if it is not."""
    found: list[_Named] = []

    async def work() -> None:
        here = access if access.offline else access._replace(pull="missing")
        async with resolved_image(cache, image, here) as resolved:
            layers = await _layers(cache, resolved)
            found.append(_Named(str(resolved.reference), resolved.manifest_digest, layers))

    run_async(work)
    return found[0]


async def _layers(cache: CacheDirectory, resolved: Resolved) -> dict[ContentRoot, tuple[int, Digest]]:
    try:
        with trio.fail_after(DOCUMENTS_S):
            index = await find_index(cache, resolved, offline=True)
    except LazyfsError:
        return {}
    if isinstance(index, Missing):
        return {}
    await close_source(index.source)
    records = {number: layer.head.record for number, layer in index.layers.items()}
    return {record.content_root: (number + 1, record.blob_digest) for number, record in sorted(records.items())}


def _end_trace(cache: CacheDirectory, manifest_digest: Digest) -> None:
    """A start that is being traced counts as over, so that it is shown."""
    runtime = rundir.runtime_directory(cache.path)
    for path in rundir.all_sockets():
        if os.path.dirname(path) != runtime:
            continue
        with contextlib.suppress(LazyfsError):  # it died, or is of an earlier version
            for entry in query.mounts_of(client.ask_once(path, {"op": "list"}, query.ANSWER_S)):
                if entry.get("manifest_digest") == manifest_digest:
                    client.ask_once(path, {"op": "profile", "dev": str(entry.get("dev"))}, _ANSWER_S)


def _layer(named: _Named, content_root: str) -> tuple[str, str]:
    """Depth and name of a layer; its content root where no index tells the blob's digest."""
    depth, digest = named.layers.get(ContentRoot(content_root), ("-", ""))
    return str(depth), digest.removeprefix("sha256:")[:12] or f"root {content_root[:12]}"


def _report(
    named: _Named, found: Profile, layers: list[TouchedLayer], files: list[TouchedFile]
) -> dict[str, Any]:
    """What --json prints. Paths that are not UTF-8 have surrogate escapes, as everywhere in JSON of lazyfs."""

    def place(root: str) -> dict[str, Any]:
        depth, digest = named.layers.get(ContentRoot(root), (None, None))
        return {"depth": depth, "digest": digest}

    return {
        "image": named.reference,
        "manifest_digest": named.manifest_digest,
        "starts": found.starts,
        "blocks": len(found.touches),
        "size_bytes": sum(layer.size_bytes for layer in layers),
        "last_ms": max(touch.at_ms for touch in found.touches),
        "layers": [{**asdict(layer), **place(layer.content_root)} for layer in layers],
        "files": [{**asdict(file), "path": _path(file.path)} for file in files],
        "touches": [{**one._asdict(), "digest": one.digest.hex(), "path": _path(one.path)} for one in found.touches],
    }


def _text(named: _Named, found: Profile, layers: list[TouchedLayer], files: list[TouchedFile]) -> str:
    size_bytes = sum(layer.size_bytes for layer in layers)
    last_ms = max(touch.at_ms for touch in found.touches)
    starts = f"{found.starts} starts touch" if found.starts > 1 else "1 start touched"
    layer_rows = [
        [
            *_layer(named, layer.content_root),
            human_bytes(layer.size_bytes),
            f"{100 * layer.size_bytes / max(1, size_bytes):.1f} %",
            f"{layer.blocks:,}",
            f"{layer.files:,}",
        ]
        for layer in layers
    ]
    file_rows = [
        [
            _seconds(file.first_ms),
            _seconds(file.last_ms),
            f"{file.starts}/{found.starts}",
            human_bytes(file.size_bytes),
            f"{file.blocks:,}",
            _layer(named, found.layers[file.layer])[0],
            _path(file.path) or _NO_FILE,
        ]
        for file in files
    ]
    return "".join(
        (
            f"{named.reference}  {starts} {human_bytes(size_bytes)} in {len(found.touches):,} blocks "
            f"within {_seconds(last_ms)}\n",
            table(["DEPTH", "LAYER", "TOUCHED", "SHARE", "BLOCKS", "FILES"], sorted(layer_rows), range(2, 6)),
            "\n",
            table(["FIRST", "LAST", "STARTS", "TOUCHED", "BLOCKS", "DEPTH", "FILE"], file_rows, range(6)),
        )
    )


def _path(path: bytes) -> str | None:
    return f"/{os.fsdecode(path)}" if path else None


def _seconds(ms: int) -> str:
    return f"{ms / 1000:.3f} s"
