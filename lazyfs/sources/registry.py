"""A repository in a registry as a source: pulling, pushing and attaching by the OCI distribution API.

If a registry redirects a blob to a blob store, the store is asked directly from then on, until it refuses because the
signed URL has expired.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress

import trio

from lazyfs.core.oci import digests, documents
from lazyfs.core.oci.digests import Digest, is_digest
from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.oci.reference import RegistryReference
from lazyfs.core.oci.referrers import add_to_index, listed_as, referrers_tag, remove_from_index
from lazyfs.errors import ImageError, LazyfsError, NotFound, RemoteError
from lazyfs.sources.blobs import fetch_blob, fetch_range, open_blob_stream
from lazyfs.sources.http import BodyTooLarge, HttpClient, Response, StreamResponse
from lazyfs.sources.registryapi import DELETE, MAX_RENEWALS, PULL, PUSH, RegistryApi, unexpected
from lazyfs.sources.transfer import Take, TransferCounters
from lazyfs.sources.urls import led_to

MAX_REFERRER_PAGES = 16
MAX_REMEMBERED_PLACES = 1024  # blobs whose redirect target is kept; an image has at most 128 layers
ATTACH_ROUNDS = 5  # others may update the fallback tag at the same time



class Registry:
    """One repository. Implements `Source`; for many tasks of one trio run; `aclose()` it."""

    def __init__(
        self,
        reference: RegistryReference,
        http: HttpClient,
        *,
        auth_files: Sequence[str] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.counters: TransferCounters = http.counters
        self._http = http
        self._api = RegistryApi(reference, http, auth_files, environ)
        self._attaching = trio.Lock()
        self._places: dict[str, str] = {}  # digest -> URL a blob was redirected to

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    # -- pull --------------------------------------------------------------------------------------------

    async def manifest(self, reference: str) -> tuple[bytes, str]:
        """The manifest or index named by tag or digest: its bytes as stored, and its media type.

        Verified if asked for by digest (ImageError). Otherwise the caller hashes the bytes; no header is trusted.
        """
        what = f"{self._api.name}{'@' if is_digest(reference) else ':'}{reference}"
        for _ in range(2):
            answer = await self._api.call(
                "GET", f"manifests/{reference}", {"Accept": documents.ACCEPT}, documents.MAX_MANIFEST_BYTES
            )
            if answer.status == 404:
                raise NotFound(f"{what} does not exist", "check name and tag")
            if answer.status != 200:
                raise unexpected(answer, f"the manifest {what}")
            if not is_digest(reference) or digests.digest_matches(answer.body, reference):
                return answer.body, answer.headers.get("Content-Type", "").partition(";")[0].strip()
        raise ImageError(f"{what}: the manifest does not match its digest", "the registry's copy is damaged")

    async def blob(self, digest: Digest, size_bytes: int) -> bytes:
        """The whole blob in memory; size and digest are verified (ImageError). The caller caps the size."""
        return await fetch_blob(self._http, _Place(self._api, self._places, digest), digest, size_bytes)

    async def blob_range(
        self, digest: Digest, start: int, end: int, take: Take | None = None, *, bulk: bool = False
    ) -> bytes:
        """Exactly the bytes [start, end) of a blob. Not verified: the caller knows its blocks' hashes."""
        place = _Place(self._api, self._places, digest)
        return await fetch_range(self._http, place, digest, start, end, take, bulk)

    def blob_stream(self, digest: Digest, size_bytes: int) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The whole blob in order; resumes after a break; ImageError at the end if the digest is wrong."""
        return open_blob_stream(self._http, _Place(self._api, self._places, digest), digest, size_bytes)

    async def referrers(self, subject_digest: Digest, *artifact_types: str) -> list[Descriptor]:
        """What was attached to a manifest, of these artifact types, from the referrers API and the fallback tag.

        Both are asked at the same time: many registries know only one. RemoteError only if neither answers.
        """
        tag = referrers_tag(subject_digest)
        answers: list[list[Descriptor]] = []
        errors: list[LazyfsError] = []

        async def ask(source: Callable[[], Awaitable[Sequence[Descriptor]]]) -> None:
            try:
                answers.append([d for d in await source() if d.artifact_type in artifact_types])
            except ImageError:
                answers.append([])  # a malformed list attaches nothing
            except LazyfsError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, lambda: self._from_api(subject_digest, artifact_types))
            nursery.start_soon(ask, lambda: self._from_tag(tag))
        if not answers:
            raise errors[0]
        return list({d.digest: d for answer in answers for d in answer}.values())

    async def _from_api(self, subject_digest: Digest, artifact_types: Sequence[str]) -> list[Descriptor]:
        """One question for all types, if what is attached fits into one answer; else one for each, as the registry may
        then leave out the rest."""
        path = f"referrers/{subject_digest}"
        if len(artifact_types) > 1:
            with suppress(BodyTooLarge):
                found, following = await self._page(path)
                if not following:
                    return found
        found = []
        for artifact_type in artifact_types:
            following = f"{path}?{urllib.parse.urlencode({'artifactType': artifact_type})}"
            for _ in range(MAX_REFERRER_PAGES):
                page, following = await self._page(following)
                found += page
                if not following:
                    break
        return found

    async def _page(self, path: str) -> tuple[list[Descriptor], str]:
        """One answer of the referrers API, and where it goes on, or ""."""
        answer = await self._api.call("GET", path, {"Accept": documents.MEDIA_INDEX}, documents.MAX_MANIFEST_BYTES)
        if answer.status != 200:  # 404, 405, 400: this registry has no such API
            return [], ""
        index = documents.parse_manifest(answer.body, answer.headers.get("Content-Type", ""))
        if not isinstance(index, documents.ImageIndex):
            return [], ""
        link = answer.headers.get("Link", "")
        if 'rel="next"' not in link:
            return list(index.manifests), ""
        target = led_to(answer.url, link.partition("<")[2].partition(">")[0], answer.peer)
        prefix = await self._api.url("")
        # Nobody else knows what refers to an image of this repository.
        return list(index.manifests), target.removeprefix(prefix) if target.startswith(prefix) else ""

    async def _from_tag(self, tag: str) -> tuple[Descriptor, ...]:
        return (await self._fallback_index(tag))[1]

    async def _fallback_index(self, tag: str) -> tuple[bytes | None, tuple[Descriptor, ...]]:
        """The index at a referrers fallback tag: bytes and entries, (None, ()) if there is none."""
        try:
            raw, media_type = await self.manifest(tag)
        except NotFound:
            return None, ()
        index = documents.parse_manifest(raw, media_type)
        if not isinstance(index, documents.ImageIndex):
            raise ImageError(f"{self._api.name}:{tag} is not a list of referrers")
        return raw, index.manifests

    # -- push --------------------------------------------------------------------------------------------

    async def push_blob(self, data: bytes) -> Digest:
        """Store a blob, unless it is there; returns its digest. Safe to repeat."""
        digest = await trio.to_thread.run_sync(digests.sha256_digest, data)
        if (await self._api.call("HEAD", f"blobs/{digest}", actions=PUSH)).status == 200:
            return digest
        attempt = 0
        while True:
            attempt += 1
            try:
                await self._upload(digest, data)
                return digest
            except RemoteError as error:
                # An upload session may not survive a break: begin a new one.
                if not error.temporary or attempt == self._http.retry.attempts:
                    raise
            self.counters.retries += 1
            await trio.sleep(self._http.retry.delay_s(attempt))

    async def _upload(self, digest: Digest, data: bytes) -> None:
        """One upload in two requests (POST then PUT, the form every registry takes)."""
        begun = await self._api.call("POST", "blobs/uploads/", actions=PUSH, content=b"")
        if begun.status != 202 or "Location" not in begun.headers:
            raise unexpected(begun, "an upload")
        place = led_to(begun.url, begun.headers["Location"], begun.peer)
        place += ("&" if "?" in place else "?") + urllib.parse.urlencode({"digest": digest})
        headers = {"Content-Type": "application/octet-stream"}
        done = await self._api.call("PUT", place, headers, actions=PUSH, content=data, retry=False)
        if done.status != 201:
            # 404 and 416: the session is gone, or has bytes of a broken attempt.
            raise unexpected(done, f"the upload of {digest}", temporary=done.status in (404, 416))

    async def push_manifest(self, data: bytes, media_type: str, reference: str | None = None) -> Digest:
        """Store a manifest under a tag, or its digest if `reference` is None; returns the digest."""
        return (await self._put_manifest(data, media_type, reference))[0]

    async def _put_manifest(
        self, data: bytes, media_type: str, reference: str | None
    ) -> tuple[Digest, Response]:
        digest = digests.sha256_digest(data)
        path = f"manifests/{reference or digest}"
        answer = await self._api.call("PUT", path, {"Content-Type": media_type}, actions=PUSH, content=data)
        if answer.status not in (200, 201, 202):
            raise unexpected(answer, f"the manifest {reference or digest}")
        return digest, answer

    async def attach(self, subject: Descriptor, manifest: bytes) -> Digest:
        """Push an artifact manifest whose subject is `subject`; returns its digest.

        The artifact's blobs must have been pushed. If the registry does not know subjects, the fallback tag is updated,
        one attachment after the other. There is no atomic update: reading the tag again finds out whether somebody else
        changed it in between, but not afterwards.
        """
        own = listed_as(manifest, subject.digest)
        digest, answer = await self._put_manifest(manifest, own.media_type, None)
        if "OCI-Subject" not in answer.headers:
            async with self._attaching:
                await self._list(own, referrers_tag(subject.digest))
        return digest

    async def _list(self, own: Descriptor, tag: str) -> None:
        """Puts an entry into the index at a referrers fallback tag."""
        refused: tuple[bytes | None, RemoteError] | None = None
        for attempt in range(ATTACH_ROUNDS + 1):
            raw, entries = await self._fallback_index(tag)
            if any(entry.digest == own.digest for entry in entries):
                return
            if refused is not None and refused[0] == raw:
                raise refused[1]
            if attempt == ATTACH_ROUNDS:
                raise RemoteError(f"{self._api.name}:{tag} is being changed by others", "try again")
            if attempt:
                await trio.sleep(self._http.retry.delay_s(attempt))
            try:
                await self._put_manifest(add_to_index(raw, own), documents.MEDIA_INDEX, tag)
                refused = None
            except RemoteError as error:  # docker-registry refuses an index of what somebody has deleted meanwhile
                refused = raw, error

    async def detach(self, subject: Descriptor, artifact: Descriptor, blobs: Sequence[Digest] = ()) -> None:
        """No longer list an artifact that was attached. A registry with a referrers API is asked to delete it, and goes
        on listing it if that is not allowed. It collects `blobs` itself."""
        tag = referrers_tag(subject.digest)
        async with self._attaching:
            raw, entries = await self._fallback_index(tag)
            if raw is not None and any(entry.digest == artifact.digest for entry in entries):
                await self._put_manifest(remove_from_index(raw, artifact.digest), documents.MEDIA_INDEX, tag)
                return  # not deleted: somebody may just be writing an index that has it, which must not lead nowhere
        try:
            listed = await self._from_api(subject.digest, [artifact.artifact_type])
            if any(one.digest == artifact.digest for one in listed):
                await self._api.call("DELETE", f"manifests/{artifact.digest}", actions=DELETE, retry=False)
        except RemoteError as error:
            if error.temporary:
                raise


class _Place:
    """Where a blob is (blobs.Locator): at the API, or where the API redirected last time, according to `places`."""

    def __init__(self, api: RegistryApi, places: dict[str, str], digest: Digest) -> None:
        digests.parse_digest(digest)
        self.what = f"blob {digest} of {api.name}"
        self._api = api
        self._places = places
        self._digest = digest
        self._sent: dict[str, str] = {}
        self._asked = ""
        self._renewals = 0

    async def where(self) -> tuple[str, dict[str, str]]:
        self._asked = self._places.get(self._digest) or await self._api.url(f"blobs/{self._digest}")
        self._sent = await self._api.headers(self._asked, PULL)
        return self._asked, self._sent

    def came_from(self, url: str) -> None:
        if url != self._asked and len(self._places) < MAX_REMEMBERED_PLACES:
            self._places[self._digest] = url

    async def refused(self, answer: Response | StreamResponse) -> bool:
        # Another task may have found a new place meanwhile: forget only the one that refused.
        if self._places.get(self._digest) == self._asked:
            del self._places[self._digest]
            return True
        if answer.status == 401 and self._renewals < MAX_RENEWALS:
            self._renewals += 1
            await self._api.renew(PULL, self._sent, answer)
            return True
        if answer.status in (401, 403):
            raise self._api.denied()
        return False
