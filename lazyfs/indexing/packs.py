"""Startup packs: made from blocks that the cache has, and attached to their image."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.images import forget_lacking, forget_packs
from lazyfs.cache.layer import CachedLayer
from lazyfs.core.oci.digests import ContentRoot, Digest, sha256_digest
from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.oci.referrers import build_artifact, first_blob
from lazyfs.core.starts.pack import (
    MAX_PACK_BYTES,
    PACK_ARTIFACT_TYPE,
    PACK_MEDIA_TYPE,
    FrameDecoder,
    PackHead,
    build_pack,
    parse_head,
)
from lazyfs.core.starts.profile import Profile, includes, merge
from lazyfs.errors import HostError, ImageError, LazyfsError, NotFound
from lazyfs.images.packs import REVISION, STARTS, FoundPack, listed_packs, load_head
from lazyfs.images.resolve import Resolved
from lazyfs.indexing.publish import place_to_push, subject_of
from lazyfs.sources.source import Source
from lazyfs.tasks import together

_ROUNDS = 6  # of looking again whether somebody else pushed a pack meanwhile
_SETTLE_S = (0.5, 1.5)  # before looking again; not the same for all
_FETCHES_AT_ONCE = 4


async def make_pack(
    cache: CacheDirectory, manifest_digest: Digest, profile: Profile, max_bytes: int = MAX_PACK_BYTES
) -> bytes:
    """The pack of an image whose starts need what `profile` says, of the blocks that are in the cache.

    `max_bytes`: of its frames; what is needed last is left out. HostError: the cache has none of the blocks.
    """
    return await trio.to_thread.run_sync(_make_pack, cache, manifest_digest, profile, max_bytes)


def _make_pack(cache: CacheDirectory, manifest_digest: Digest, profile: Profile, max_bytes: int) -> bytes:
    needed = [(touch.layer, touch.block) for touch in profile.touches]
    with _opened(cache, profile.layers) as layers:

        def content(root: ContentRoot, block: int) -> bytes | None:
            layer = layers.get(root)
            if layer is None or not 0 <= block < layer.table.count:
                return None
            data = layer.read(layer.table.addresses[block], layer.table.lengths[block])
            if data is None or hashlib.sha256(data).digest() != layer.table.digest(block):
                return None
            return bytes(data)

        try:
            return build_pack(
                manifest_digest, profile.layers, needed, content, profile.without_paths().encode(), max_bytes
            )
        except ValueError:
            raise HostError(
                "there is nothing to make a startup pack of: the cache has none of the blocks that a start needs",
                "start the image once, or allow a larger pack",
            ) from None


@contextlib.contextmanager
def _opened(cache: CacheDirectory, roots: Iterable[ContentRoot]) -> Iterator[dict[ContentRoot, CachedLayer]]:
    """Those layers that the cache has."""
    layers: dict[ContentRoot, CachedLayer] = {}
    try:
        for root in roots:
            with contextlib.suppress(ImageError):
                layer = cache.open_layer(root)
                if layer is not None:
                    layers[root] = layer
        yield layers
    finally:
        for layer in layers.values():
            layer.close()


class KnownPack(NamedTuple):
    """A pack that is attached, and what its head says."""

    found: FoundPack
    head: PackHead
    profile: Profile


class ImprovedPack(NamedTuple):
    """A pack that was attached."""

    artifact_digest: Digest
    size_bytes: int
    starts: int


async def improve_pack(
    cache: CacheDirectory,
    resolved: Resolved,
    profile: Profile,
    repository: str = "",
    max_bytes: int = MAX_PACK_BYTES,
) -> ImprovedPack:
    """Attaches a pack of the starts of `profile` and of those that the packs there tell of, in their place.

    Others may do the same at the same time: nobody's starts are lost, as each looks again after he has pushed, and
    merges what he did not know. Contents that the cache lacks come from the packs that are there. Raises LazyfsError.
    """
    seen: set[Digest] = set()
    async with place_to_push(resolved, repository) as (source, place):
        for attempt in range(_ROUNDS):
            there = await _known_packs(source, place, resolved)
            new = [one for one in there if one.found.artifact.digest not in seen]
            if attempt and there and _covers(there[0].profile, [profile, *(one.profile for one in new)]):
                best, *others = (one.found for one in there)
                await _detach(source, resolved, others, {best.digest})
                break
            if not attempt:  # of those that a registry would not delete, the last ones tell of all starts
                new = [one for one in new if one.found.revision == new[0].found.revision]
            profile = merge([profile, *(one.profile for one in new if not includes(profile, one.profile))])
            await _bring(cache, new, profile)
            pack = await make_pack(cache, resolved.manifest_digest, profile, max_bytes)
            seen |= {one.found.artifact.digest for one in there}
            digest = await attach_pack(source, place, resolved, pack, seen)
            seen.add(digest)
            # A list of referrers has no atomic update: who read it before this and writes it now takes this off again.
            await trio.sleep(random.uniform(*_SETTLE_S))
    _note_pushed(cache, resolved, place)
    return ImprovedPack(digest, len(pack), profile.starts)


async def attached_profile(resolved: Resolved, repository: str = "") -> Profile | None:
    """Of which starts the best pack there tells; None if there is none that can be read. Raises LazyfsError."""
    async with place_to_push(resolved, repository) as (source, place):
        there = await _known_packs(source, place, resolved)
        return there[0].profile if there else None


def _covers(profile: Profile, others: Iterable[Profile]) -> bool:
    """Whether a profile has all that others have touched."""
    blocks = set(_blocks(profile))
    return all(block in blocks for other in others for block in _blocks(other))


def _blocks(profile: Profile) -> Iterator[tuple[ContentRoot, int]]:
    return ((profile.layers[touch.layer], touch.block) for touch in profile.touches)


async def _known_packs(source: Source, place: str, resolved: Resolved) -> list[KnownPack]:
    """The packs that are attached there and can be read, the best first."""
    known = []
    for found in await _packs_at(source, place, resolved):
        try:
            head = await load_head(found)
            known.append(KnownPack(found, head, Profile.decode(head.profile)))
        except (ImageError, NotFound):
            continue
    return known


async def _packs_at(source: Source, place: str, resolved: Resolved) -> list[FoundPack]:
    digest = resolved.manifest_digest
    return await listed_packs(source, place, digest, await source.referrers(digest, PACK_ARTIFACT_TYPE))


async def _bring(cache: CacheDirectory, packs: Sequence[KnownPack], profile: Profile) -> None:
    """Fetches blocks of `profile` that the cache lacks, so far as these packs have them. What is damaged stays away."""
    wanted = set(_blocks(profile))
    with _opened(cache, profile.layers) as layers:

        def is_missing(root: ContentRoot, block: int) -> bool:
            layer = layers.get(root)
            return layer is not None and block < layer.table.count and not layer.has(block) and (root, block) in wanted

        def publish(head: PackHead, number: int, stored: bytes) -> None:
            with contextlib.suppress(ImageError):
                for root, block, content in FrameDecoder(head, number).feed(stored):
                    if is_missing(root, block):
                        layers[root].publish(block, content)

        async def fetch(pack: KnownPack, number: int) -> None:
            frame = pack.head.frames[number]
            start, end = frame.offset, frame.offset + frame.stored_bytes
            with contextlib.suppress(ImageError, NotFound):
                stored = await pack.found.source.blob_range(pack.found.digest, start, end)
                await trio.to_thread.run_sync(publish, pack.head, number, stored)

        for pack in packs:
            numbers = [
                number
                for number, frame in enumerate(pack.head.frames)
                if any(is_missing(*block) for block in pack.head.blocks(frame))
            ]
            await together(*(functools.partial(fetch, pack, number) for number in numbers), at_most=_FETCHES_AT_ONCE)


def _note_pushed(cache: CacheDirectory, resolved: Resolved, place: str) -> None:
    forget_packs(cache, resolved.manifest_digest)
    if place:
        forget_lacking(cache, resolved.manifest_digest, place)


async def attach_pack(
    source: Source, place: str, resolved: Resolved, pack: bytes, former: Collection[Digest] = ()
) -> Digest:
    """Attaches a pack to its image at `source`; returns its artifact's digest.

    It takes the place of `former`, artifacts of packs that are there. What others attach meanwhile stays. Nothing but
    the pack and the artifact is uploaded. Safe to repeat. Raises LazyfsError.
    """
    there = await _packs_at(source, place, resolved)
    gone = set(former)
    blob_digest = await trio.to_thread.run_sync(sha256_digest, pack)
    if there and there[0].digest == blob_digest:
        digest = there[0].artifact.digest  # it is the best one already
    else:
        manifest = await trio.to_thread.run_sync(_artifact, resolved, pack, there[0].revision + 1 if there else 1)
        pushes = [functools.partial(source.push_blob, data) for data in (pack, b"{}")]
        await together(*pushes)
        digest = await source.attach(subject_of(resolved), manifest)
    kept = {blob_digest, *(one.digest for one in there if one.artifact.digest not in gone)}
    await _detach(source, resolved, [one for one in there if one.artifact.digest in gone - {digest}], kept)
    return digest


async def _detach(source: Source, resolved: Resolved, packs: Iterable[FoundPack], kept: Collection[Digest]) -> None:
    """Takes packs off that another one replaces, which goes before them anyway: so it may fail. `kept`: blobs that are
    still of use."""
    for one in packs:
        with contextlib.suppress(LazyfsError):
            await source.detach(subject_of(resolved), one.artifact, [one.digest] if one.digest not in kept else [])


def _artifact(resolved: Resolved, pack: bytes, revision: int) -> bytes:
    """The artifact of a pack. The annotations say what one may know of it without fetching it."""
    blob = Descriptor(PACK_MEDIA_TYPE, sha256_digest(pack), len(pack))
    starts = Profile.decode(parse_head(pack, len(pack)).profile).starts
    annotations = first_blob([blob]) | {STARTS: str(starts), REVISION: str(revision)}
    return build_artifact(PACK_ARTIFACT_TYPE, [blob], subject_of(resolved), annotations)
