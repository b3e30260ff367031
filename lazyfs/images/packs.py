"""Startup packs of an image, found beside its index: in its own repository, or else in an index repository.

What is listed as attached says which blob the pack is, so nothing but that is fetched. That is no more than a hint: the
head of a pack says which image it is of, and each block is verified by the block tables.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import trio

from lazyfs.cache.images import forget_packs, note_packs, noted_packs
from lazyfs.core.oci.digests import Digest
from lazyfs.core.oci.documents import Descriptor, Manifest, parse_descriptor, parse_manifest
from lazyfs.core.oci.reference import parse_reference
from lazyfs.core.oci.referrers import first_blob, listed_blob
from lazyfs.core.starts.pack import (
    MAX_PACK_BYTES,
    PACK_ARTIFACT_TYPE,
    PACK_MEDIA_TYPE,
    PREFIX_BYTES,
    PackHead,
    head_size,
    parse_head,
)
from lazyfs.errors import ImageError, LazyfsError
from lazyfs.images.attached import Attached, of_type
from lazyfs.sources.source import Source
from lazyfs.tasks import beside, together

# Annotations of a pack's artifact.
STARTS, REVISION = "vnd.lazyfs.pack.starts", "vnd.lazyfs.pack.revision"
_MAX_NUMBER = 1 << 31
MAX_PACKS = 8  # of one place that are looked at
HEAD_GUESS_BYTES = 64 << 10  # the head of a start of 2,000 blocks takes half of it


class FoundPack(NamedTuple):
    """A pack as it is said to be; nothing is verified. `source` is open as long as what is attached.

    `place`: index repository, "" for the image's own. `starts`: of how many it tells. `revision`: one more than that of
    the packs it was merged from. `artifact`: as it is listed.
    """

    source: Source
    place: str
    manifest_digest: Digest  # of the image
    digest: Digest
    size_bytes: int
    starts: int
    revision: int
    artifact: Descriptor


async def find_packs(attached: Attached) -> list[FoundPack]:
    """The packs of the first place that has some, the best first: the last revision, then the one of most starts.

    Takes no longer than the patience of the image's source; who fails has none. Never raises a LazyfsError. What was
    found, or that there is nothing, is remembered for some minutes.
    """
    cache, resolved = attached.cache, attached.resolved
    if resolved.access.offline:
        return []
    noted = noted_packs(cache, resolved.manifest_digest)
    if noted is not None:
        try:
            return [_from_note(attached, fields) for fields in json.loads(noted)]
        except (ValueError, KeyError, TypeError, RecursionError, LazyfsError):
            forget_packs(cache, resolved.manifest_digest)
    search = functools.partial(_search, attached)
    with trio.move_on_after(resolved.patience_s):
        found, sure = await beside(search, background=attached.ask_repositories)
        if sure:
            note_packs(cache, resolved.manifest_digest, json.dumps([_note(one) for one in found]).encode())
        return found
    return []


async def _search(attached: Attached) -> tuple[list[FoundPack], bool]:
    """The packs; and whether no place failed that may have some."""
    resolved = attached.resolved
    sure = True
    try:
        if found := await listed_packs(resolved.source, "", resolved.manifest_digest, await attached.own()):
            return found, True
    except LazyfsError:
        sure = False
    sources = [resolved.source]
    for one in attached.repositories:
        artifacts = await one.answer()
        sure = sure and not one.problem
        if one.source is not None:
            if found := await listed_packs(one.source, one.place, resolved.manifest_digest, artifacts):
                return found, sure
            sources.append(one.source)
    return [], sure and not any(source.counters.retries for source in sources)  # one that stumbled did not say no


async def listed_packs(
    source: Source, place: str, manifest_digest: Digest, artifacts: Sequence[Descriptor]
) -> list[FoundPack]:
    """Those of `artifacts` that are packs, the best first. If the list lacks the annotations of one, its manifest is
    fetched; what cannot be fetched is left out."""
    packs: list[FoundPack] = []

    async def look(artifact: Descriptor) -> None:
        blob, annotations = listed_blob(artifact, PACK_MEDIA_TYPE), artifact.annotations
        try:
            if blob is None:
                blob, annotations = await _from_manifest(source, manifest_digest, artifact.digest)
            packs.append(_described(source, place, manifest_digest, artifact, blob, annotations))
        except LazyfsError:
            pass

    candidates = sorted(of_type(artifacts, PACK_ARTIFACT_TYPE), key=_merit, reverse=True)
    await together(*(functools.partial(look, artifact) for artifact in candidates[:MAX_PACKS]))
    return sorted(packs, key=lambda pack: (pack.revision, pack.starts, pack.artifact.digest), reverse=True)


def _merit(artifact: Descriptor) -> tuple[int, int, str]:
    return _number(artifact.annotations, REVISION), _number(artifact.annotations, STARTS), artifact.digest


def _number(annotations: Mapping[str, str], name: str) -> int:
    """A number of an annotation, at most _MAX_NUMBER; 0 if there is none."""
    text = annotations.get(name, "")
    return min(int(text), _MAX_NUMBER) if len(text) < 20 and text.isascii() and text.isdigit() else 0


def _described(
    source: Source,
    place: str,
    manifest_digest: Digest,
    artifact: Descriptor,
    blob: Descriptor,
    annotations: Mapping[str, str],
) -> FoundPack:
    """Raises ImageError: it can be none."""
    if not PREFIX_BYTES < blob.size_bytes <= MAX_PACK_BYTES:
        raise ImageError("it is no startup pack")
    starts, revision = _number(annotations, STARTS), _number(annotations, REVISION)
    return FoundPack(source, place, manifest_digest, blob.digest, blob.size_bytes, starts, revision, artifact)


async def _from_manifest(
    source: Source, manifest_digest: Digest, artifact_digest: Digest
) -> tuple[Descriptor, Mapping[str, str]]:
    """Blob and annotations of a pack's artifact. Raises ImageError, RemoteError, NotFound."""
    raw, declared = await source.manifest(artifact_digest)
    manifest = parse_manifest(raw, declared)
    if not isinstance(manifest, Manifest) or not manifest.layers or manifest.layers[0].media_type != PACK_MEDIA_TYPE:
        raise ImageError("it is no startup pack of a version that lazyfs knows")
    if manifest.subject is None or manifest.subject.digest != manifest_digest:
        raise ImageError("it is the startup pack of another image")
    return manifest.layers[0], manifest.annotations


def _note(pack: FoundPack) -> dict[str, object]:
    blob = Descriptor(PACK_MEDIA_TYPE, pack.digest, pack.size_bytes)
    annotations = first_blob([blob]) | {STARTS: str(pack.starts), REVISION: str(pack.revision)}
    return {"place": pack.place, "artifact": pack.artifact._replace(annotations=annotations).to_json()}


def _from_note(attached: Attached, fields: Mapping[str, object]) -> FoundPack:
    """Inverse of _note. Raises ValueError, KeyError, TypeError or LazyfsError."""
    place = str(fields["place"])
    artifact = parse_descriptor(fields["artifact"], "the note")
    blob = listed_blob(artifact, PACK_MEDIA_TYPE)
    if blob is None:
        raise ValueError("not a pack")
    source = attached.open(parse_reference(place)) if place else attached.resolved.source
    return _described(source, place, attached.resolved.manifest_digest, artifact, blob, artifact.annotations)


async def load_head(pack: FoundPack) -> PackHead:
    """The head of a pack that was found. As open_head(); RemoteError, NotFound: it cannot be fetched."""
    data = await pack.source.blob_range(pack.digest, 0, min(pack.size_bytes, HEAD_GUESS_BYTES))
    size = head_size(data)
    if len(data) < size <= pack.size_bytes:
        data += await pack.source.blob_range(pack.digest, len(data), size)
    return open_head(pack, data)


def open_head(pack: FoundPack, data: bytes | memoryview) -> PackHead:
    """The head, from the beginning of the blob (core/starts/pack.py). ImageError if it is damaged, or of another image
    than it was attached to."""
    head = parse_head(data, pack.size_bytes)
    if head.manifest_digest != pack.manifest_digest:
        raise ImageError("the startup pack is that of another image")
    return head
