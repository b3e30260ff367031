"""`lazyfs inspect`: what an image is, and whether it has an index and a startup pack."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import trio

from lazyfs.cache import places
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.images import forget_packs
from lazyfs.commands.report import human_bytes, table
from lazyfs.core.erofs.reader import ErofsReader
from lazyfs.core.oci.documents import parse_config
from lazyfs.core.starts.profile import Profile
from lazyfs.errors import ImageError, LazyfsError
from lazyfs.images.attached import Attached
from lazyfs.images.config import load_config
from lazyfs.images.documents import Missing, find_index
from lazyfs.images.packs import find_packs, load_head
from lazyfs.images.resolve import close_source
from lazyfs.indexing.missing import DOCUMENTS_S, resolved_image, run_async
from lazyfs.mounting.options import MountOptions


def inspect(args: argparse.Namespace) -> int:
    """`lazyfs inspect IMAGE`: layers, sizes, whether an index is cached or attached, and whole; the startup pack."""
    options: MountOptions = args.options
    cache = CacheDirectory(places.cache_directory(options.cache))
    report: dict[str, Any] = {}

    async def work() -> None:
        async with resolved_image(cache, args.image, options.access) as resolved:
            with trio.fail_after(DOCUMENTS_S):
                config = parse_config(await load_config(cache, resolved))
            report.update(
                image=str(resolved.reference),
                manifest_digest=resolved.manifest_digest,
                platform=f"{config.os}/{config.architecture}",
                image_bytes=sum(layer.size_bytes for layer in resolved.manifest.layers),
            )
            attached = Attached(cache, resolved)
            try:
                report.update(await _index_report(attached, options.access.offline))
                report.update(await _pack_report(attached))
            finally:
                await attached.aclose()

    run_async(work)
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    _print(report)
    return 0


async def _index_report(attached: Attached, offline: bool) -> dict[str, Any]:
    resolved = attached.resolved
    with trio.fail_after(DOCUMENTS_S):
        found = await find_index(attached.cache, resolved, offline=offline, attached=attached)
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
    return {
        "index": state,
        "index_repository": place or None,
        "index_reasons": reasons,
        "layers": [
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
    }


async def _pack_report(attached: Attached) -> dict[str, Any]:
    """The pack that a mount takes, asked for anew; of those that are of no use, why."""
    forget_packs(attached.cache, attached.resolved.manifest_digest)
    reasons = []
    with trio.move_on_after(DOCUMENTS_S):
        for found in await find_packs(attached):
            try:
                head = await load_head(found)
                starts = Profile.decode(head.profile).starts
            except LazyfsError as error:
                reasons.append(f"{found.artifact.digest[:19]}: {error.message}")
                continue
            pack = {
                "artifact_digest": found.artifact.digest,
                "repository": found.place or None,
                "size_bytes": found.size_bytes,
                "plain_bytes": sum(frame.plain_bytes for frame in head.frames),
                "blocks": len(head.block_numbers),
                "starts": starts,
            }
            return {"pack": pack, "pack_reasons": reasons}
    return {"pack": None, "pack_reasons": reasons}


def _print(report: dict[str, Any]) -> None:
    print(f"{report['image']}  {report['platform']}  {human_bytes(report['image_bytes'])}")
    print(f"manifest  {report['manifest_digest']}")
    hint = {"none": " (lazyfs index --push attaches one)", "damaged": " (lazyfs index --push attaches a sound one)"}
    where = f", from {report['index_repository']}" if report["index_repository"] else ""
    print(f"index     {report['index']}{where}{hint.get(report['index'], '')}")
    for reason in report["index_reasons"]:
        print(f"          passed over: {reason}")
    print(f"pack      {_pack_line(report['pack'])}")
    for reason in report["pack_reasons"]:
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


def _pack_line(pack: dict[str, Any] | None) -> str:
    if pack is None:
        return "none (lazyfs record --push attaches one)"
    where = f", from {pack['repository']}" if pack["repository"] else ""
    starts = "1 start needs" if pack["starts"] == 1 else f"{pack['starts']} starts need"
    size, plain = human_bytes(pack["size_bytes"]), human_bytes(pack["plain_bytes"])
    return f"attached, {size}: {pack['blocks']} blocks of {plain}, as {starts} them{where}"
