"""OCI image layouts as sources: what all kinds share, and those in a directory on this host.

Format: image-spec image-layout.md. File names are built from checked digests only. Artifacts are attached by the
referrers tag schema (an index named sha256-<hex>), as regclient and oras do; but where an image has no name, a further
entry of index.json would make others refuse `oci:DIR`, so there the index is the file referrers/sha256-<hex>. What oras
attaches or copies is listed in index.json itself, and found there.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from lazyfs.core.oci import digests, documents, referrers
from lazyfs.core.oci.digests import Digest, DigestCheck, is_digest
from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.oci.reference import DirectoryReference
from lazyfs.errors import HostError, ImageError, NotFound, UserError
from lazyfs.sources.directory import Directory
from lazyfs.sources.transfer import Take, TransferCounters

READ_CHUNK_BYTES = 1 << 20
MAX_LISTED_ARTIFACTS = 16  # of one search: each is read to see what it belongs to
# Another process changes a list within milliseconds.
LOCK_S = 10.0
LOCK_TRY_S = 0.02
MAX_LAYOUT_FILE_BYTES = 4096  # the oci-layout file holds one short object


class Layout(abc.ABC):
    """What both kinds share: they find manifests by index.json."""

    what: str

    @abc.abstractmethod
    async def _document(self, name: str, max_bytes: int) -> bytes:
        """The file `name` below the layout; NotFound if there is none."""

    @abc.abstractmethod
    async def blob(self, digest: Digest, size_bytes: int) -> bytes:
        """The whole blob in memory; size and digest are verified (ImageError). The caller caps the size."""

    async def manifest(self, reference: str) -> tuple[bytes, str]:
        """The manifest named by `reference`: a name in index.json, a digest, or "" for the only image.

        A layout whose images differ only by platform answers "" with index.json itself.
        """
        raw, index = await self._index()
        if is_digest(reference):
            listed = [d for d in index.manifests if d.digest == reference]
            return await self._by_digest(Digest(reference), listed[0] if listed else None)
        if not reference:
            images = [d for d in index.manifests if d.is_image and not referrers.is_referrers_tag(_name(d))]
            if len({d.digest for d in images}) == 1:
                return await self._by_digest(images[0].digest, images[0])
            if images and all(d.platform is not None for d in images):
                return raw, documents.MEDIA_INDEX
            raise UserError(f"{self.what} holds {len(images)} images", f"name one: {_names(images)}")
        for descriptor in index.manifests:
            if _name(descriptor) == reference:
                return await self._by_digest(descriptor.digest, descriptor)
        raise NotFound(f"{self.what} has no image named {reference}", f"it has: {_names(index.manifests)}")

    async def _index(self) -> tuple[bytes, documents.ImageIndex]:
        layout = documents.load_json(
            await self._document("oci-layout", MAX_LAYOUT_FILE_BYTES), f"{self.what}/oci-layout"
        )
        if layout.get("imageLayoutVersion") != "1.0.0":
            raise ImageError(f"{self.what}: not an OCI image layout of version 1.0.0")
        raw = await self._document("index.json", documents.MAX_MANIFEST_BYTES)
        index = documents.parse_manifest(raw, documents.MEDIA_INDEX)
        assert isinstance(index, documents.ImageIndex)
        return raw, index

    async def _by_digest(self, digest: Digest, descriptor: Descriptor | None) -> tuple[bytes, str]:
        if descriptor is not None:
            if descriptor.size_bytes > documents.MAX_MANIFEST_BYTES:
                raise ImageError(f"{self.what}: the manifest {digest} is too large")
            return await self.blob(digest, descriptor.size_bytes), descriptor.media_type
        raw = await self._document(blob_name(digest), documents.MAX_MANIFEST_BYTES)
        if not digests.digest_matches(raw, digest):
            raise ImageError(f"{self.what}: the manifest {digest} does not match its digest")
        return raw, documents.parse_manifest(raw, "").media_type

    async def referrers(self, subject_digest: Digest, *artifact_types: str) -> list[Descriptor]:
        """What was attached to a manifest, of these artifact types."""
        listed = await self._listed()
        raw = await self._referrers_index(referrers.referrers_tag(subject_digest), listed)
        index = None if raw is None else documents.parse_manifest(raw, documents.MEDIA_INDEX)
        entries = index.manifests if isinstance(index, documents.ImageIndex) else ()
        found = {d.digest: d for d in entries if d.artifact_type in artifact_types}
        others = [d for d in listed if d.artifact_type in artifact_types and d.digest not in found]
        for one in others[:MAX_LISTED_ARTIFACTS]:
            with contextlib.suppress(ImageError, NotFound):
                raw, _ = await self._by_digest(one.digest, one)
                found[one.digest] = referrers.listed_as(raw, subject_digest)
        return list(found.values())

    async def _listed(self) -> tuple[Descriptor, ...]:
        """What index.json lists; nothing if there is none."""
        try:
            return (await self._index())[1].manifests
        except NotFound:
            return ()

    async def _referrers_index(self, tag: str, listed: Sequence[Descriptor]) -> bytes | None:
        """The list of what was attached; None if there is none. `listed`: by index.json."""
        for one in listed:
            if _name(one) == tag:
                with contextlib.suppress(NotFound):
                    return (await self._by_digest(one.digest, one))[0]
        with contextlib.suppress(NotFound):
            return await self._document(referrers_file(tag), documents.MAX_MANIFEST_BYTES)
        return None


def _name(descriptor: Descriptor) -> str:
    return descriptor.annotations.get(documents.REF_NAME, "")


def _names(descriptors: tuple[Descriptor, ...] | list[Descriptor]) -> str:
    names = (_name(d)[:80] for d in descriptors)
    shown = [name for name in names if name.isprintable() and name and not referrers.is_referrers_tag(name)]
    return ", ".join(shown[:16]) or "none"


class DirectoryLayout(Layout):
    """A layout directory. Implements `Source`. Counters count reads as requests."""

    def __init__(self, reference: DirectoryReference) -> None:
        self.what = f"oci:{reference.path}"
        self.counters = TransferCounters()
        self._directory = Directory(reference.path, self.what)
        self._changing = trio.Lock()  # index.json, and lists of referrers

    async def aclose(self) -> None:
        """Close the directory."""
        self._directory.close()

    async def _read(self, name: str, start: int, end: int | None, max_bytes: int = 1 << 62) -> bytes:
        data = await trio.to_thread.run_sync(self._directory.read, name, start, end, max_bytes)
        self.counters.requests += 1
        self.counters.bytes_fetched += len(data)
        return data

    async def _document(self, name: str, max_bytes: int) -> bytes:
        return await self._read(name, 0, None, max_bytes)

    async def blob(self, digest: Digest, size_bytes: int) -> bytes:
        """The whole blob in memory; size and digest are verified (ImageError). The caller caps the size."""
        data = await self._read(blob_name(digest), 0, None, size_bytes)
        if len(data) != size_bytes or not await trio.to_thread.run_sync(digests.digest_matches, data, digest):
            raise ImageError(f"{self.what}: blob {digest} does not match its size and digest")
        return data

    async def blob_range(
        self, digest: Digest, start: int, end: int, take: Take | None = None, *, bulk: bool = False
    ) -> bytes:
        """Exactly the bytes [start, end) of a blob, not verified. ImageError if it is shorter."""
        if not 0 <= start <= end:
            raise ValueError(f"bad range {start}-{end}")
        data = await self._read(blob_name(digest), start, end) if end > start else b""
        if take is None:
            return data
        await take(data)
        return b""

    @asynccontextmanager
    async def blob_stream(self, digest: Digest, size_bytes: int) -> AsyncIterator[AsyncIterator[bytes]]:
        """The whole blob in order; ImageError at the end if size or digest are wrong."""
        pieces = self._pieces(digest, size_bytes)
        try:
            yield pieces
        finally:
            await pieces.aclose()

    async def _pieces(self, digest: Digest, size_bytes: int) -> AsyncGenerator[bytes, None]:
        check = DigestCheck(digest)
        for start in range(0, size_bytes, READ_CHUNK_BYTES):
            piece = await self.blob_range(digest, start, min(start + READ_CHUNK_BYTES, size_bytes))
            await trio.to_thread.run_sync(check.update, piece)
            yield piece
        if not check.matches():
            raise ImageError(f"{self.what}: blob {digest} does not match its digest")

    # -- writing -----------------------------------------------------------------------------------------

    async def push_blob(self, data: bytes) -> Digest:
        """Store a blob; returns its digest. Safe to repeat."""
        digest = await trio.to_thread.run_sync(digests.sha256_digest, data)
        await trio.to_thread.run_sync(self._directory.write, blob_name(digest), data)
        return digest

    async def push_manifest(self, data: bytes, media_type: str, reference: str | None = None) -> Digest:
        """Store a manifest, listed in index.json if `reference` is a name; returns its digest."""
        digest = await self.push_blob(data)
        if reference is not None and not is_digest(reference):
            async with self._alone():
                await self._list(Descriptor(media_type, digest, len(data), {documents.REF_NAME: reference}))
        return digest

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Nobody else changes what the layout lists meanwhile, no other process either. HostError: others do."""
        async with self._changing:
            for _ in range(round(LOCK_S / LOCK_TRY_S)):
                lock = await trio.to_thread.run_sync(self._directory.try_lock)
                if lock is not None:
                    break
                await trio.sleep(LOCK_TRY_S)
            else:
                raise HostError(f"{self.what} is being changed by others", "try again")
            try:
                yield
            finally:
                os.close(lock)

    async def _list(self, descriptor: Descriptor) -> None:
        """Put a named descriptor into index.json in the place of the one with its name."""
        document: dict[str, Any] = {"schemaVersion": 2, "mediaType": documents.MEDIA_INDEX, "manifests": []}
        try:
            raw = await self._document("index.json", documents.MAX_MANIFEST_BYTES)
            documents.parse_manifest(raw, documents.MEDIA_INDEX)
            document = documents.load_json(raw, "index.json")
        except NotFound:
            layout = json.dumps({"imageLayoutVersion": "1.0.0"}).encode()
            await trio.to_thread.run_sync(self._directory.write, "oci-layout", layout)
        name = _name(descriptor)
        document["manifests"] = [
            item
            for item in document.get("manifests") or []
            if not (isinstance(item, dict) and (item.get("annotations") or {}).get(documents.REF_NAME) == name)
        ] + [descriptor.to_json()]
        await trio.to_thread.run_sync(self._directory.write, "index.json", json.dumps(document, indent=1).encode())

    async def attach(self, subject: Descriptor, manifest: bytes) -> Digest:
        """Store an artifact manifest whose subject is `subject`, and list it; returns its digest."""
        own = referrers.listed_as(manifest, subject.digest)
        await self.push_blob(manifest)
        name = referrers.referrers_tag(subject.digest)
        async with self._alone():
            raw = await self._referrers_index(name, await self._listed())
            await self._keep_referrers(name, referrers.add_to_index(raw, own))
        return own.digest

    async def detach(self, subject: Descriptor, artifact: Descriptor, blobs: Sequence[Digest] = ()) -> None:
        """No longer list an artifact that was attached; its manifest and `blobs` are removed."""
        tag = referrers.referrers_tag(subject.digest)
        async with self._alone():
            raw = await self._referrers_index(tag, await self._listed())
            if raw is not None:
                await self._keep_referrers(tag, referrers.remove_from_index(raw, artifact.digest))
            with contextlib.suppress(NotFound):  # others' tools list it there
                raw = await self._document("index.json", documents.MAX_MANIFEST_BYTES)
                left = referrers.remove_from_index(raw, artifact.digest)
                if left != raw:
                    await trio.to_thread.run_sync(self._directory.write, "index.json", left)
        for one in (artifact.digest, *blobs):
            await trio.to_thread.run_sync(self._directory.remove, blob_name(one))

    async def _keep_referrers(self, tag: str, listed: bytes) -> None:
        if await self._keeps_apart(tag):
            await trio.to_thread.run_sync(self._directory.write, referrers_file(tag), listed)
        else:
            named = {documents.REF_NAME: tag}
            digest = await self.push_blob(listed)
            await self._list(Descriptor(documents.MEDIA_INDEX, digest, len(listed), named))

    async def _keeps_apart(self, tag: str) -> bool:
        """Whether a list is a file of its own: an image has no name, and the list is not in index.json already."""
        try:
            raw = await self._document("index.json", documents.MAX_MANIFEST_BYTES)
        except NotFound:
            return False
        index = documents.parse_manifest(raw, documents.MEDIA_INDEX)
        names = [_name(d) for d in index.manifests] if isinstance(index, documents.ImageIndex) else []
        return "" in names and tag not in names


def referrers_file(tag: str) -> str:
    return f"referrers/{tag}"


def blob_name(digest: Digest) -> str:
    algorithm, value = digests.parse_digest(digest)
    return f"blobs/{algorithm}/{value}"
