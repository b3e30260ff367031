"""`lazyfs inspect`: what an image is, and whether it has an index."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import trio

from lazyfs.cache import places
from lazyfs.cache.directory import CacheDirectory
from lazyfs.commands.report import human_bytes, table
from lazyfs.core.erofs.reader import ErofsReader
from lazyfs.core.oci.documents import parse_config
from lazyfs.errors import ImageError
from lazyfs.images.documents import Missing, find_index, load_config
from lazyfs.images.resolve import close_source
from lazyfs.indexing.missing import DOCUMENTS_S, resolved_image, run_async
from lazyfs.mounting.options import MountOptions


def inspect(args: argparse.Namespace) -> int:
    """`lazyfs inspect IMAGE`: layers, sizes, and whether an index is cached or attached, and whole."""
    options: MountOptions = args.options
    cache = CacheDirectory(places.cache_directory(options.cache))
    report: dict[str, Any] = {}

    async def work() -> None:
        async with resolved_image(cache, args.image, options.access) as resolved:
            with trio.fail_after(DOCUMENTS_S):
                config = parse_config(await load_config(cache, resolved))
                found = await find_index(cache, resolved, offline=options.access.offline)
            index, place = None, None
            if isinstance(found, Missing):
                state, reasons = "damaged" if found.damaged else "none", list(found.reasons)
            else:
                index, place, reasons = found.index, found.place, []
                state = "attached" if found.artifact_digest else "in the cache"
                try:
                    await trio.to_thread.run_sync(ErofsReader(found.namespace.buffer).check)
                except ImageError as error:
                    state = "damaged"
                    reasons.append(error.message)
                finally:
                    await close_source(found.source)
            details = index.layers if index else ()
            report.update(
                image=str(resolved.reference),
                manifest_digest=resolved.manifest_digest,
                platform=f"{config.os}/{config.architecture}",
                image_bytes=sum(layer.size_bytes for layer in resolved.manifest.layers),
                index=state,
                index_repository=place or None,
                index_reasons=reasons,
                layers=[
                    {
                        "digest": layer.digest,
                        "media_type": layer.media_type,
                        "size_bytes": layer.size_bytes,
                        "compression": str(details[number].compression) if index else None,
                        "tar_bytes": details[number].tar_bytes if index else None,
                        "content_root": details[number].content_root if index else None,
                    }
                    for number, layer in enumerate(resolved.manifest.layers)
                ],
            )

    run_async(work)
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    _print(report)
    return 0


def _print(report: dict[str, Any]) -> None:
    print(f"{report['image']}  {report['platform']}  {human_bytes(report['image_bytes'])}")
    print(f"manifest  {report['manifest_digest']}")
    hint = {"none": " (lazyfs index --push attaches one)", "damaged": " (lazyfs index --push attaches a sound one)"}
    where = f", from {report['index_repository']}" if report["index_repository"] else ""
    print(f"index     {report['index']}{where}{hint.get(report['index'], '')}")
    for reason in report["index_reasons"]:
        print(f"          passed over: {reason}")
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
