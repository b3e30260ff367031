"""From a reference to the manifest of an image, which is fetched once and kept in the cache.

    <cache>/indexes/<manifest digest, hex>/           see cache/images.py
    <cache>/refs/<sha256 of reference and platform>   the manifest digest that the reference led to last time
"""

from __future__ import annotations

import hashlib
import json
import os
import platform as host
from collections.abc import Callable
from dataclasses import dataclass

import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.images import index_directory, make_index_directory, read_file
from lazyfs.core.oci.digests import Digest, is_digest, sha256_digest
from lazyfs.core.oci.documents import MAX_INDEX_DEPTH, Manifest, parse_manifest
from lazyfs.core.oci.platforms import host_platform, parse_platform, select_platform
from lazyfs.core.oci.reference import Reference, parse_reference
from lazyfs.errors import ImageError, UserError
from lazyfs.sources.access import Access
from lazyfs.sources.source import Source, Sources, open_source

_OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@dataclass(slots=True)
class Resolved:
    """An image manifest that a reference led to. `source` belongs to the holder, who closes it.

    `open_beside` opens another source in the same way; the caller closes it. `listed`: an image index has it as the
    image for `platform`; else its config has to say so. `stale`: why it was not looked up whether the reference means
    another one by now; empty if it was.
    """

    reference: Reference
    manifest_digest: Digest
    manifest_bytes: bytes
    manifest: Manifest
    source: Source
    access: Access
    patience_s: float
    open_beside: Callable[[Reference], Source]
    platform: str
    listed: bool
    stale: str = ""


async def resolve(
    cache: CacheDirectory,
    text: str,
    access: Access,
    known: str | None = None,
    sources: Sources | None = None,
    patience_s: float = 30.0,
) -> Resolved:
    """Finds the manifest that a reference means, with as few requests as possible: none for a digest in the cache.

    `known`: the manifest's digest, if it was resolved before (by a predecessor of this daemon). `sources`: opens
    sources that share connections; `patience_s` as for Sources.open(). Raises LazyfsError; UserError if
    `access.offline` and the reference was never seen. With access.pull "missing" nothing is asked about a known tag.
    """
    reference = parse_reference(text)
    wanted = str(parse_platform(access.platform or host_platform(host.machine())))
    key = hashlib.sha256(f"{reference} {wanted}".encode()).hexdigest()
    note = cache.reference_path(key)

    def open_one(one: Reference) -> Source:
        return sources.open(one, access, patience_s) if sources else open_source(one, access)

    source = open_one(reference)
    try:
        if known is None and (access.pull != "always" or is_digest(reference.selector)):
            known = (read_file(note) or b"").decode("ascii", "replace")
        if known and is_digest(known):
            digest = Digest(known)
            found = read_file(os.path.join(index_directory(cache, digest), "manifest"))
            if found is not None and sha256_digest(found) == digest:
                manifest = _image_manifest(found)
                listed = reference.selector != digest
                return Resolved(
                    reference, digest, found, manifest, source, access, patience_s, open_one, wanted, listed
                )
        if access.offline:
            raise UserError(f"{reference} is not in the cache", "mount it once without 'offline'")
        digest, raw, listed = await _ask(source, reference, wanted)
        manifest = _image_manifest(raw)
        directory = make_index_directory(cache, digest)
        for path, content in ((os.path.join(directory, "manifest"), raw), (note, digest.encode())):
            if read_file(path) != content:
                cache.write_atomically(path, content)
        return Resolved(reference, digest, raw, manifest, source, access, patience_s, open_one, wanted, listed)
    except BaseException:
        await close_source(source)
        raise


async def _ask(source: Source, reference: Reference, platform: str) -> tuple[Digest, bytes, bool]:
    """The manifest, and whether an index listed it."""
    name = reference.selector
    for depth in range(MAX_INDEX_DEPTH):
        raw, media_type = await source.manifest(name)
        parsed = parse_manifest(raw, media_type)
        if isinstance(parsed, Manifest):
            return sha256_digest(raw), raw, depth > 0
        name = select_platform(parsed, platform).digest
    raise ImageError(f"{reference}: image indexes are nested too deep")


def _image_manifest(raw: bytes) -> Manifest:
    declared = json.loads(raw).get("mediaType") or _OCI_MANIFEST
    parsed = parse_manifest(raw, declared)
    if not isinstance(parsed, Manifest):
        raise ImageError("the manifest in the cache is not that of an image", "remove it: lazyfs cache prune")
    return parsed


async def close_source(source: Source) -> None:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
        await source.aclose()
