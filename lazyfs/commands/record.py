"""`lazyfs record`: records a start of an image, makes its startup pack and attaches that."""

from __future__ import annotations

import argparse
import os
from typing import Any, NamedTuple

from lazyfs.cache import places
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.profiles import load_profile
from lazyfs.commands.bars import layer_bars
from lazyfs.commands.containers import container_mount, container_spec, say
from lazyfs.commands.report import human_bytes, print_json
from lazyfs.containers import readiness
from lazyfs.containers.readiness import Until
from lazyfs.containers.recording import record_start
from lazyfs.containers.run import RunRequest
from lazyfs.core.index.imageindex import ARTIFACT_TYPE
from lazyfs.core.oci.digests import Digest
from lazyfs.core.starts.profile import Profile
from lazyfs.errors import HostError, UserError
from lazyfs.images.documents import Missing, find_index
from lazyfs.images.resolve import Resolved, close_source
from lazyfs.indexing.missing import build, resolved_image, run_async
from lazyfs.indexing.packs import improve_pack
from lazyfs.indexing.publish import place_to_push, push_index, write_layout
from lazyfs.mounting.lease import Reporter
from lazyfs.mounting.options import index_repository
from lazyfs.serving.bring import bring
from lazyfs.sources.access import Access

DEFAULT_MAX_PACK_BYTES = 256 * 10**6
_MAX_RATIO = 4  # contents take at most so many times what they take in a pack, roughly
_LONGEST_S = 86400.0


class _Place(NamedTuple):
    """Where a pack is attached. `repository`: as improve_pack() takes it; `directory`: of --output."""

    repository: str
    name: str
    directory: str | None = None


def record(args: argparse.Namespace) -> int:
    """The command. 0: recorded, and attached where that was asked for; if the container could not be started, or a
    signal ended it, as `lazyfs run`. Raises LazyfsError."""
    until, timeout_s = _until(args), _seconds("--timeout", args.timeout)
    mount = container_mount(args.options)
    where = _places(args)
    max_pack_bytes = DEFAULT_MAX_PACK_BYTES if args.max_pack_bytes is None else args.max_pack_bytes
    cache = CacheDirectory(places.cache_directory(mount.cache))
    request = RunRequest(
        args.image, container_spec(args), args.user, mount, remove=True, grace_s=args.stop_timeout
    )
    say(f"recording a start of {args.image} until {until}")
    start = record_start(request, until, timeout_s, Reporter(say, layer_bars), say)
    if start.ready_s is None or start.image is None:
        say("nothing was recorded" + (": the start was interrupted" if start.status > 128 else ""))
        return start.status
    profile = load_profile(cache, Digest(start.image.manifest_digest))
    if profile is None:
        raise HostError("the daemon kept no profile of the start", "see `lazyfs doctor`: is the disk full?")
    report: dict[str, Any] = {
        "image": start.image.reference,
        "manifest_digest": start.image.manifest_digest,
        "ready_s": round(start.ready_s, 3),
        "starts": profile.starts,
        "blocks": len(profile.touches),
        "block_bytes": sum(touch.length_bytes for touch in profile.touches),
        "attached": [],
    }
    say(_summary(report))
    if where:
        report["attached"] = _attach(cache, report, mount.access, profile, where, max_pack_bytes)
    else:
        say("this host fetches that ahead from now on; --push, --push-to and --output make a startup pack of it")
    if args.json:
        print_json(report)
    return 0


def _places(args: argparse.Namespace) -> list[_Place]:
    """Where to attach the pack. Raises UserError."""
    where = [_Place("", "the image's repository")] if args.push else []
    if args.push_to is not None:
        repository = index_repository("--push-to", args.push_to)
        where.append(_Place(repository, repository))
    if args.output is not None:
        directory = os.path.abspath(args.output)
        where.append(_Place(index_repository("--output", f"oci:{directory}"), directory, directory))
    return where


def _summary(report: dict[str, Any]) -> str:
    starts = "a start needs" if report["starts"] == 1 else f"{report['starts']} starts need"
    blocks, size = f"{report['blocks']:,} blocks", human_bytes(report["block_bytes"])
    return f"ready after {report['ready_s']:.1f} s; as far as is known here, {starts} {size} in {blocks}"


# -- the pack ----------------------------------------------------------------------------------------------


def _attach(
    cache: CacheDirectory,
    report: dict[str, Any],
    access: Access,
    profile: Profile,
    where: list[_Place],
    max_pack_bytes: int,
) -> list[dict[str, Any]]:
    """Attaches a pack, and the index if this host made it, at each place; what came of it, for each."""
    attached: list[dict[str, Any]] = []

    async def work() -> None:
        async with resolved_image(cache, report["image"], access, report["manifest_digest"]) as resolved:
            await bring(cache, resolved, profile, _MAX_RATIO * max_pack_bytes)
            await _attach_index(cache, resolved, where)
            for place in where:
                pack = await improve_pack(cache, resolved, profile, place.repository, max_pack_bytes)
                attached.append({"place": place.repository, **pack._asdict()})
                starts = "one start" if pack.starts == 1 else f"{pack.starts} starts"
                said = f"startup pack of {human_bytes(pack.size_bytes)}, of {starts}"
                say(f"{said}, attached as {pack.artifact_digest} in {place.name}")

    run_async(work)
    return attached


async def _attach_index(cache: CacheDirectory, resolved: Resolved, where: list[_Place]) -> None:
    """An index that was made here goes where the pack goes: without it the pack is of no use elsewhere."""
    found = await find_index(cache, resolved, offline=True)
    if isinstance(found, Missing):
        return
    await close_source(found.source)
    if found.place is not None:
        return
    for place in where:
        async with place_to_push(resolved, place.repository) as (source, _):
            if await source.referrers(resolved.manifest_digest, ARTIFACT_TYPE):
                continue
        built = await build(cache, resolved, fill=False)  # of what was read for it, which is kept
        if place.directory is not None:
            await write_layout(place.directory, resolved, built)
        else:
            await push_index(cache, resolved, built, place.repository)
        say(f"index of {human_bytes(built.size_bytes)} attached in {place.name}")


# -- arguments ---------------------------------------------------------------------------------------------


def _until(args: argparse.Namespace) -> Until:
    """What was chosen. Raises UserError."""
    if args.until_line is not None:
        return readiness.checked_line(args.until_line)
    if args.until_http is not None:
        return readiness.checked_url(args.until_http)
    if args.until_port is not None:
        return readiness.checked_port(args.until_port)
    if args.seconds is not None:
        return readiness.Seconds(_seconds("--seconds", args.seconds))
    return readiness.Exit()


def _seconds(name: str, value: float) -> float:
    if not 0 < value <= _LONGEST_S:  # false for nan, too
        raise UserError(f"{name} {value:g} is not a time", f"give seconds, up to {_LONGEST_S:g}")
    return value
