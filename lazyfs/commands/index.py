"""`lazyfs index`: makes the index of an image, attaches it or writes it to a directory."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lazyfs.cache import places
from lazyfs.cache.directory import CacheDirectory
from lazyfs.commands.bars import layer_bars
from lazyfs.commands.report import human_bytes
from lazyfs.core.oci.digests import Digest
from lazyfs.indexing.missing import build, resolved_image, run_async
from lazyfs.indexing.publish import index_push, write_layout
from lazyfs.mounting.options import MountOptions, index_repository
from lazyfs.system import startup

if TYPE_CHECKING:
    import argparse


def index(args: argparse.Namespace) -> int:
    """`lazyfs index IMAGE [--push] [--push-to REPO] [--output DIR]`."""
    options: MountOptions = args.options
    push_to = index_repository("--push-to", args.push_to) if args.push_to is not None else None
    cache = CacheDirectory(places.cache_directory(options.cache))
    report: dict[str, Any] = {}

    async def work() -> None:
        started_s = time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            resolved = await stack.enter_async_context(resolved_image(cache, args.image, options.access))
            startup.finish()
            places = ([""] if args.push else []) + ([push_to] if push_to else [])
            pushes = [await stack.enter_async_context(index_push(cache, resolved, place)) for place in places]

            def begin(layers: Mapping[Digest, bytes]) -> None:
                for push in pushes:
                    push.begin(layers)

            built = await build(cache, resolved, fill=False, bars=layer_bars, on_layers=begin)
            blob_bytes = sum(layer.size_bytes for layer in resolved.manifest.layers)
            report.update(
                image=str(resolved.reference),
                manifest_digest=resolved.manifest_digest,
                image_bytes=blob_bytes,
                tar_bytes=built.tar_bytes,
                index_bytes=built.size_bytes,
                seconds=round(time.monotonic() - started_s, 3),
            )
            if args.output:
                report["output_digest"] = await write_layout(args.output, resolved, built)
            for push in pushes:
                report["artifact_digest"] = await push.finish(built)

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
        if args.push or push_to:
            print(f"attached as {report['artifact_digest']}" + (f" in {push_to}" if push_to else ""))
        if args.output:
            print(f"written to {args.output}")
    return 0
