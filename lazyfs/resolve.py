"""From a reference to the documents of an image: manifest, config and index, fetched once, kept in the cache.

    <cache>/indexes/<manifest digest, hex>/manifest   the image manifest, verbatim
                                          /config     the image config, verbatim
                                          /index      the index blob (core/index.py)
                                          /windows    digest of the windows blob in the registry, may be empty
                                          /groups/    windows fetched or built so far, one file a group
                                          /lock       as for layers (cache.py)
    <cache>/refs/<sha256 of reference and platform>   manifest digest the reference led to when last asked
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform as host
from collections.abc import Mapping
from dataclasses import dataclass

import trio

from lazyfs.cache import BlockCache
from lazyfs.core.erofsread import ErofsReader
from lazyfs.core.index import ARTIFACT_TYPE, INDEX_MEDIA_TYPE, MAX_INDEX_BYTES, WINDOWS_MEDIA_TYPE, Index
from lazyfs.core.oci import (
    Descriptor,
    Manifest,
    host_platform,
    parse_config,
    parse_manifest,
    select_platform,
)
from lazyfs.core.reference import Reference, is_digest, parse_reference
from lazyfs.credentials import auth_files_of
from lazyfs.errors import HostError, ImageError, RemoteError, UserError
from lazyfs.source import Source, SourceOptions, Sources, open_source

_MAX_CONFIG_BYTES = 8 << 20
_OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """How to reach and open an image. `timeout_s` bounds each read; None for platform means this host's;
    `push_index`: a missing index is made by the client, who pushes it.
    """

    offline: bool = False
    insecure: bool = False
    timeout_s: float = 30.0
    platform: str | None = None
    ca_files: tuple[str, ...] = ()
    auth_files: tuple[str, ...] | None = None
    push_index: bool = False
    environ: Mapping[str, str] | None = None  # of the user the image is opened for; None: this process's

    def source_options(self) -> SourceOptions:
        auth_files = self.auth_files
        if auth_files is None and self.environ is not None:
            auth_files = auth_files_of(self.environ)
        # Half of it, so that a connection that fell silent costs a read time, but does not fail it.
        patience_s = self.timeout_s / 2
        return SourceOptions(
            self.insecure, self.ca_files, auth_files, environ=self.environ, patience_s=patience_s
        )


class NeedsIndexError(Exception):
    """The image has no index, neither here nor in its registry. Carries the manifest digest."""

    def __init__(self, manifest_digest: str) -> None:
        super().__init__(manifest_digest)
        self.manifest_digest = manifest_digest


@dataclass(slots=True)
class Resolved:
    """An image manifest that a reference led to. `source` belongs to the holder, who closes it."""

    reference: Reference
    manifest_digest: str
    manifest_bytes: bytes
    manifest: Manifest
    source: Source


def index_directory(cache: BlockCache, manifest_digest: str) -> str:
    """Where everything about one image manifest is kept."""
    return os.path.join(cache.path, "indexes", manifest_digest.removeprefix("sha256:"))


def make_index_directory(cache: BlockCache, manifest_digest: str) -> str:
    """Makes that place, or notes that it is in use; returns it. HostError: disk."""
    directory = index_directory(cache, manifest_digest)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with open(os.path.join(directory, "lock"), "ab"):  # first: without it the directory counts as rubbish
            os.utime(os.path.join(directory, "lock"))
        os.makedirs(os.path.join(directory, "groups"), mode=0o700, exist_ok=True)
    except OSError as error:
        raise HostError(f"cannot write to the cache: {error.strerror}", "check the disk") from None
    return directory


async def resolve(
    cache: BlockCache,
    text: str,
    options: ImageOptions,
    known: str | None = None,
    sources: Sources | None = None,
) -> Resolved:
    """Finds the manifest a reference means, with as few requests as possible: none for a digest that is here.

    `known`: the manifest's digest, if it was resolved before (a daemon that takes up its predecessor's
    mounts). `sources`: where connections are shared. Raises LazyfsError; UserError if `offline` and
    the reference was never seen.
    """
    reference = parse_reference(text)
    wanted = options.platform or host_platform(host.machine())
    key = hashlib.sha256(f"{reference} {wanted}".encode()).hexdigest()
    note = os.path.join(cache.path, "refs", key)
    source = (sources.open if sources else open_source)(reference, options.source_options())
    try:
        if known is None and (options.offline or _digest_of(reference)):
            known = (read_file(note) or b"").decode("ascii", "replace")
        if known and is_digest(known):
            found = read_file(os.path.join(index_directory(cache, known), "manifest"))
            if found is not None and "sha256:" + hashlib.sha256(found).hexdigest() == known:
                return Resolved(reference, known, found, _image_manifest(found), source)
        if options.offline:
            raise UserError(f"{reference} is not in the cache", "mount it once without 'offline'")
        digest, raw = await _ask(source, reference, wanted)
        manifest = _image_manifest(raw)
        directory = make_index_directory(cache, digest)
        for path, content in ((os.path.join(directory, "manifest"), raw), (note, digest.encode())):
            if read_file(path) != content:
                cache.write_atomically(path, content)
        return Resolved(reference, digest, raw, manifest, source)
    except BaseException:
        await close_source(source)
        raise


async def _ask(source: Source, reference: Reference, platform: str) -> tuple[str, bytes]:
    name = _digest_of(reference) or getattr(reference, "tag", None) or getattr(reference, "ref", None) or ""
    for _ in range(4):  # image indexes may nest; real ones are one deep
        raw, media_type = await source.manifest(name)
        parsed = parse_manifest(raw, media_type)
        if isinstance(parsed, Manifest):
            return "sha256:" + hashlib.sha256(raw).hexdigest(), raw
        name = select_platform(parsed, platform).digest
    raise ImageError(f"{reference}: image indexes are nested too deep")


def _digest_of(reference: Reference) -> str | None:
    digest = getattr(reference, "digest", None)
    return digest if isinstance(digest, str) else None


def _image_manifest(raw: bytes) -> Manifest:
    declared = json.loads(raw).get("mediaType") or _OCI_MANIFEST
    parsed = parse_manifest(raw, declared)
    if not isinstance(parsed, Manifest):
        raise ImageError("the manifest in the cache is not that of an image", "remove it: lazyfs cache prune")
    return parsed


async def load_config(cache: BlockCache, resolved: Resolved) -> bytes:
    """The image config's bytes, from the cache or the source; verified against the manifest."""
    path = os.path.join(index_directory(cache, resolved.manifest_digest), "config")
    wanted = resolved.manifest.config
    kept = read_file(path)
    if kept is not None and "sha256:" + hashlib.sha256(kept).hexdigest() == wanted.digest:
        return kept
    if wanted.size_bytes > _MAX_CONFIG_BYTES:
        raise ImageError(f"the image config is larger than {_MAX_CONFIG_BYTES >> 20} MiB")
    raw = await resolved.source.blob(wanted.digest, wanted.size_bytes)
    parse_config(raw)
    cache.write_atomically(path, raw)
    return raw


async def load_index(cache: BlockCache, resolved: Resolved, *, offline: bool = False) -> tuple[Index, str]:
    """The image's index and the digest of its windows blob, from the cache or attached in the registry.

    An attached index that is damaged, of another version or of another image is passed over, with the next
    one tried. Raises NeedsIndexError if none is left.
    """
    directory = index_directory(cache, resolved.manifest_digest)
    blob = read_file(os.path.join(directory, "index"))
    if blob is not None:
        with contextlib.suppress(ImageError):
            windows_digest = (read_file(os.path.join(directory, "windows")) or b"").decode("ascii", "replace")
            return checked_index(blob, resolved, windows_digest), windows_digest
    if not offline:
        source = resolved.source
        for found in await _referrers(source, resolved.manifest_digest):
            try:
                raw, media_type = await source.manifest(found.digest)
                artifact = parse_manifest(raw, media_type)
                if not isinstance(artifact, Manifest) or not artifact.layers:
                    continue
                tables = artifact.layers[0]
                if tables.media_type != INDEX_MEDIA_TYPE or tables.size_bytes > MAX_INDEX_BYTES:
                    continue
                windows = [one.digest for one in artifact.layers[1:] if one.media_type == WINDOWS_MEDIA_TYPE]
                blob = await source.blob(tables.digest, tables.size_bytes)
                index = checked_index(blob, resolved, windows[0] if windows else "")
            except ImageError:
                continue
            except RemoteError as error:
                if error.temporary:
                    raise
                continue
            keep_index(cache, resolved.manifest_digest, blob, windows[0] if windows else "")
            return index, windows[0] if windows else ""
    raise NeedsIndexError(resolved.manifest_digest)


async def _referrers(source: Source, manifest_digest: str) -> list[Descriptor]:
    """What is attached; nothing if the registry does not say (some forbid the question)."""
    try:
        return await source.referrers(manifest_digest, ARTIFACT_TYPE)
    except RemoteError as error:
        if error.temporary:
            raise
    except ImageError:
        pass
    return []


def checked_index(blob: bytes, resolved: Resolved, windows_digest: str) -> Index:
    """The index, if it is one of this very image: manifest, layers and sizes agree. Else ImageError."""
    index = Index(blob)
    if any(layer.window_groups for layer in index.layers) and not is_digest(windows_digest):
        raise ImageError("the index lacks the windows its spans need")
    ours = [(layer.digest, layer.size_bytes) for layer in resolved.manifest.layers]
    if index.manifest_digest != resolved.manifest_digest or ours != [
        (layer.blob_digest, layer.blob_bytes) for layer in index.layers
    ]:
        raise ImageError("the index belongs to another image")
    ErofsReader(index.namespace())  # of a version we know?
    return index


def has_index(cache: BlockCache, manifest_digest: str) -> bool:
    """Whether an index of that image is in the cache."""
    return os.path.exists(os.path.join(index_directory(cache, manifest_digest), "index"))


def keep_index(cache: BlockCache, manifest_digest: str, blob: bytes, windows_digest: str) -> None:
    """Files an index in the cache; the index itself last, since its presence says that all is there."""
    directory = make_index_directory(cache, manifest_digest)
    cache.write_atomically(os.path.join(directory, "windows"), windows_digest.encode())
    cache.write_atomically(os.path.join(directory, "index"), blob)


async def close_source(source: Source) -> None:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
        await source.aclose()


def read_file(path: str) -> bytes | None:
    """A small file of the cache; None if there is none. HostError: disk."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}", "check the disk") from None
