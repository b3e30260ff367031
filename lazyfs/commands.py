"""The commands that need the whole machinery: index, inspect, cache. The light ones are in cli.py."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from lazyfs import evict, paths, quickstart
from lazyfs.cache import BlockCache
from lazyfs.core.erofsread import ErofsReader
from lazyfs.core.oci import parse_config
from lazyfs.errors import ImageError, LazyfsError, RemoteError, UserError
from lazyfs.firstindex import make_index
from lazyfs.indexer import BuiltIndex
from lazyfs.options import MountOptions
from lazyfs.progress import LayerBars
from lazyfs.publish import attach_index, write_layout
from lazyfs.report import human_bytes, table
from lazyfs.resolve import (
    ImageOptions,
    NeedsIndexError,
    Resolved,
    has_index,
    load_config,
    load_index,
    resolve,
)

# Finding an image's documents takes a few small requests; reading its layers is bounded by stalls, not in
# all.
DOCUMENTS_S = 120.0


def image_options(options: MountOptions) -> ImageOptions:
    """What of the mount options concerns reaching the image."""
    return ImageOptions(
        offline=options.offline,
        insecure=options.insecure,
        timeout_s=options.timeout_s,
        platform=options.platform,
        ca_files=options.ca_files,
        auth_files=options.auth_files or None,
    )


def index(args: argparse.Namespace) -> int:
    """`lazyfs index IMAGE [--push] [--output DIR]`."""
    options: MountOptions = args.options
    cache = BlockCache(paths.cache_directory(options.cache))
    report: dict[str, Any] = {}

    async def work() -> None:
        started_s = time.monotonic()
        async with Resolving(cache, args.image, options) as resolved:
            built = await build(cache, resolved, fill=False)
            blob_bytes = sum(layer.size_bytes for layer in resolved.manifest.layers)
            report.update(
                image=str(resolved.reference),
                manifest_digest=resolved.manifest_digest,
                image_bytes=blob_bytes,
                tar_bytes=built.tar_bytes,
                index_bytes=len(built.index) + len(built.windows),
                seconds=round(time.monotonic() - started_s, 3),
            )
            if args.output:
                report["output_digest"] = await write_layout(args.output, resolved, built)
            if args.push:
                report["artifact_digest"] = await attach_index(resolved.source, resolved, built)

    run_async(work)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        share = 100 * report["index_bytes"] / max(1, report["image_bytes"])
        rate = report["tar_bytes"] / max(0.001, report["seconds"])
        print(
            f"{report['image']}: index of {human_bytes(report['index_bytes'])} ({share:.2f} % of the image), "
            f"made in "
            f"{report['seconds']:.1f} s ({human_bytes(int(rate))}/s of tar)"
        )
        if args.push:
            print(f"attached as {report['artifact_digest']}")
        if args.output:
            print(f"written to {args.output}")
    return 0


def build_missing_index(image: str, options: MountOptions, push: bool, *, quiet: bool = False) -> None:
    """The pass of a first mount without an index: reads all layers once, fills the cache, keeps the index.
    `quiet`: without a word on standard error."""
    cache = BlockCache(paths.cache_directory(options.cache))

    async def work() -> None:
        async with Resolving(cache, image, options) as resolved:
            built = await build(cache, resolved, fill=True, quiet=quiet)
            if push:
                await attach_index(resolved.source, resolved, built)

    run_async(work)


class Resolving:
    """`async with`: the resolved image, its source closed at the end."""

    def __init__(self, cache: BlockCache, image: str, options: MountOptions) -> None:
        self._ask = (cache, image, image_options(options))

    async def __aenter__(self) -> Resolved:
        with trio.fail_after(DOCUMENTS_S):
            self._resolved = await resolve(*self._ask)
        return self._resolved

    async def __aexit__(self, *_: object) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
            await self._resolved.source.aclose()


async def build(
    cache: BlockCache, resolved: Resolved, *, fill: bool, quiet: bool = False
) -> BuiltIndex:
    """Reads all layers once and keeps the index; with `fill`, all data, too. Raises LazyfsError."""
    with trio.fail_after(DOCUMENTS_S):
        config = parse_config(await load_config(cache, resolved))
    # The pass hands the GIL between threads thousands of times a second: 5 ms of waiting for it, Python's
    # default, is too long (measured: 97 against 104 MB/s).
    sys.setswitchinterval(0.0005)
    with LayerBars(None if quiet else sys.stderr) as bars:
        return await make_index(cache, resolved, config, fill=fill, on_progress=bars.update)


def inspect(args: argparse.Namespace) -> int:
    """`lazyfs inspect IMAGE`: layers, sizes, and whether an index is here or attached, and sound."""
    options: MountOptions = args.options
    cache = BlockCache(paths.cache_directory(options.cache))
    report: dict[str, Any] = {}

    async def work() -> None:
        async with Resolving(cache, args.image, options) as resolved:
            with trio.fail_after(DOCUMENTS_S):
                config = parse_config(await load_config(cache, resolved))
                here = has_index(cache, resolved.manifest_digest)
                found, state = None, "damaged" if here else "none"
                try:
                    found, _ = await load_index(cache, resolved, offline=options.offline)
                    state = "in the cache" if here else "attached"
                    await trio.to_thread.run_sync(ErofsReader(found.namespace()).check)
                except NeedsIndexError:
                    pass
                except ImageError:
                    state = "damaged"
            details = found.layers if found else ()
            report.update(
                image=str(resolved.reference),
                manifest_digest=resolved.manifest_digest,
                platform=f"{config.os}/{config.architecture}",
                image_bytes=sum(layer.size_bytes for layer in resolved.manifest.layers),
                index=state,
                layers=[
                    {
                        "digest": layer.digest,
                        "media_type": layer.media_type,
                        "size_bytes": layer.size_bytes,
                        "compression": str(details[number].compression) if found else None,
                        "tar_bytes": details[number].tar_bytes if found else None,
                        "content_root": details[number].content_root if found else None,
                    }
                    for number, layer in enumerate(resolved.manifest.layers)
                ],
            )

    run_async(work)
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"{report['image']}  {report['platform']}  {human_bytes(report['image_bytes'])}")
    print(f"manifest  {report['manifest_digest']}")
    hint = {"none": " (lazyfs index --push attaches one)", "damaged": " (lazyfs index --push attaches a sound one)"}
    print(f"index     {report['index']}{hint.get(report['index'], '')}")
    rows = [
        [
            layer["digest"].removeprefix("sha256:")[:12],
            human_bytes(layer["size_bytes"]),
            human_bytes(layer["tar_bytes"]) if layer["tar_bytes"] is not None else "-",
            layer["compression"] or "-",
            layer["media_type"],
        ]
        for layer in report["layers"]
    ]
    sys.stdout.write(table(["LAYER", "SIZE", "TAR", "STORED", "MEDIA TYPE"], rows, right=(1, 2)))
    return 0


def cache(args: argparse.Namespace) -> int:
    """`lazyfs cache du|verify|prune|gc`."""
    store = BlockCache(paths.cache_directory(args.cache))
    if args.action == "du":
        return _du(store, args.json)
    if args.action == "verify":
        checked, damaged, broken = evict.verify(store)
        if args.json:
            print(
                json.dumps({"checked_blocks": checked, "damaged_blocks": damaged, "broken_entries": broken})
            )
        else:
            print(f"{checked} blocks checked, {damaged} damaged (they will be fetched again)")
            for content_root in broken:
                print(f"the entry of layer {content_root[:12]} cannot be used: lazyfs cache prune removes it")
        return 1 if damaged or broken else 0
    if args.action == "gc" and not args.max_size_bytes:
        raise UserError("gc needs a size to fit", "for example --max-size 20G; prune removes all unused")
    freed, left = evict.collect(store, 0 if args.action == "prune" else args.max_size_bytes)
    if args.json:
        print(json.dumps({"freed_bytes": freed, "left_bytes": left}))
    else:
        print(f"freed {human_bytes(freed)}, {human_bytes(left)} left")
    return 0


def _du(store: BlockCache, as_json: bool) -> int:
    listed = evict.entries(store)
    if as_json:
        rows = [
            {
                "kind": e.kind,
                "name": e.name,
                "size_bytes": e.size_bytes,
                "used_at_s": e.used_at_s,
                "in_use": e.in_use,
            }
            for e in listed
        ]
        print(
            json.dumps(
                {"cache": store.path, "size_bytes": sum(e.size_bytes for e in listed), "entries": rows},
                indent=2,
            )
        )
        return 0
    lines = [
        [
            e.kind,
            e.name[:12],
            human_bytes(e.size_bytes),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(e.used_at_s)),
            "in use" if e.in_use else "",
        ]
        for e in reversed(listed)
    ]
    sys.stdout.write(table(["KIND", "NAME", "SIZE", "LAST USED", ""], lines, right=(2,)))
    print(f"{store.path}: {human_bytes(sum(e.size_bytes for e in listed))}")
    return 0


def run_async(work: Callable[[], Awaitable[None]]) -> None:
    """Runs one async job; an error of a nursery inside comes out as itself."""
    quickstart.finish()
    try:
        trio.run(work)
    except trio.TooSlowError:
        raise RemoteError(
            f"the registry did not answer within {DOCUMENTS_S:g} s", "try again later"
        ) from None
    except BaseExceptionGroup as group:
        known = group.subgroup(LazyfsError)
        if known is None:
            raise
        error: BaseException = known
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
