"""A repository in a registry, by the OCI distribution API (distribution-spec v1.1).

Requests carry an Authorization header once the registry has asked for one. Where a registry redirects blobs
to a blob store, the store is asked directly from then on, until it refuses (signed URLs expire).
"""

from __future__ import annotations

import urllib.parse
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

import trio

from lazyfs.core.oci import digests, documents
from lazyfs.core.oci.digests import Digest
from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.oci.reference import RegistryReference, is_digest
from lazyfs.core.oci.referrers import add_to_index, listed_as, referrers_tag
from lazyfs.errors import ImageError, LazyfsError, NotFound, RemoteError
from lazyfs.sources.blobs import fetch_blob, fetch_range, open_blob_stream
from lazyfs.sources.http import HttpClient, Response, StreamResponse
from lazyfs.sources.tokens import Authorizer
from lazyfs.sources.transfer import TransferCounters
from lazyfs.sources.urls import is_loopback, led_to, origin, redact, split_host

DOCKER_HUB_API = "registry-1.docker.io"
MAX_RENEWALS = 2  # a token may expire between being fetched and being used; a second refusal is a refusal
MAX_REFERRER_PAGES = 16
MAX_REMEMBERED_PLACES = 1024  # blobs whose redirect target is kept; an image has at most 128 layers
ATTACH_ROUNDS = 5  # others may update the fallback tag at the same time

PULL, PUSH = "pull", "pull,push"


class Registry:
    """One repository. Implements `lazyfs.source.Source`; for many tasks of one trio run; `aclose()` it."""

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
        self._host = reference.registry
        self._repository = reference.repository
        self._auth_files = auth_files
        self._environ = environ
        self._authorizer: Authorizer | None = None
        self._base = ""
        self._places: dict[str, str] = {}  # digest -> URL a blob was redirected to
        self._connecting = trio.Lock()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    # -- pull --------------------------------------------------------------------------------------------

    async def manifest(self, reference: str) -> tuple[bytes, str]:
        """The manifest or index named by tag or digest: its bytes as stored, and its media type.

        Verified if asked for by digest (ImageError). Otherwise hash the bytes: no header is trusted for that.
        """
        what = f"{self._host}/{self._repository}{'@' if is_digest(reference) else ':'}{reference}"
        for _ in range(2):
            answer = await self._call(
                "GET", f"manifests/{reference}", {"Accept": documents.ACCEPT}, documents.MAX_MANIFEST_BYTES
            )
            if answer.status == 404:
                raise NotFound(f"{what} does not exist", "check name and tag")
            if answer.status != 200:
                raise self._unexpected(answer, f"the manifest {what}")
            if not is_digest(reference) or digests.digest_matches(answer.body, reference):
                return answer.body, answer.headers.get("Content-Type", "").partition(";")[0].strip()
        raise ImageError(f"{what}: the manifest does not match its digest", "the registry's copy is damaged")

    async def blob(self, digest: str, size_bytes: int) -> bytes:
        """The whole blob in memory; size and digest are verified (ImageError). The caller caps the size."""
        return await fetch_blob(self._http, _Place(self, digest), digest, size_bytes)

    async def blob_range(self, digest: str, start: int, end: int) -> bytes:
        """Exactly the bytes [start, end) of a blob. Not verified: the caller knows its blocks' hashes."""
        return await fetch_range(self._http, _Place(self, digest), digest, start, end)

    def blob_stream(self, digest: str, size_bytes: int) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The whole blob in order; resumes after a break; ImageError at the end if the digest is wrong."""
        return open_blob_stream(self._http, _Place(self, digest), digest, size_bytes)

    async def referrers(self, subject_digest: str, artifact_type: str) -> list[Descriptor]:
        """What was attached to a manifest, of one artifact type, from the referrers API and the fallback tag.

        Both are asked at the same time: many registries know only one. RemoteError only if neither answers.
        """
        tag = referrers_tag(subject_digest)
        answers: list[list[Descriptor]] = []
        errors: list[LazyfsError] = []

        async def ask(source: Callable[[], AsyncIterator[Descriptor]]) -> None:
            try:
                answers.append([descriptor async for descriptor in source()])
            except ImageError:
                answers.append([])  # a malformed list attaches nothing
            except LazyfsError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, lambda: self._from_api(subject_digest, artifact_type))
            nursery.start_soon(ask, lambda: self._from_tag(tag))
        if not answers:
            raise errors[0]
        found = {d.digest: d for answer in answers for d in answer if d.artifact_type == artifact_type}
        return list(found.values())

    async def _from_api(self, subject_digest: str, artifact_type: str) -> AsyncIterator[Descriptor]:
        path = f"referrers/{subject_digest}?{urllib.parse.urlencode({'artifactType': artifact_type})}"
        for _ in range(MAX_REFERRER_PAGES):
            answer = await self._call("GET", path, {"Accept": documents.MEDIA_INDEX}, documents.MAX_MANIFEST_BYTES)
            if answer.status != 200:  # 404, 405, 400: this registry has no such API
                return
            index = documents.parse_manifest(answer.body, answer.headers.get("Content-Type", ""))
            if not isinstance(index, documents.ImageIndex):
                return
            for descriptor in index.manifests:
                yield descriptor
            link = answer.headers.get("Link", "")
            if 'rel="next"' not in link:
                return
            target = led_to(answer.url, link.partition("<")[2].partition(">")[0], answer.peer)
            prefix = f"{self._base}/v2/{self._repository}/"
            if not target.startswith(prefix):
                return  # nobody else knows what refers to an image of this repository
            path = target.removeprefix(prefix)

    async def _from_tag(self, tag: str) -> AsyncIterator[Descriptor]:
        for descriptor in (await self._fallback_index(tag))[1]:
            yield descriptor

    async def _fallback_index(self, tag: str) -> tuple[bytes | None, tuple[Descriptor, ...]]:
        """The index at a referrers fallback tag: bytes and entries, (None, ()) if there is none."""
        try:
            raw, media_type = await self.manifest(tag)
        except NotFound:
            return None, ()
        index = documents.parse_manifest(raw, media_type)
        if not isinstance(index, documents.ImageIndex):
            raise ImageError(f"{self._host}/{self._repository}:{tag} is not a list of referrers")
        return raw, index.manifests

    # -- push --------------------------------------------------------------------------------------------

    async def push_blob(self, data: bytes) -> Digest:
        """Store a blob, unless it is there; returns its digest. Safe to repeat."""
        digest = await trio.to_thread.run_sync(digests.sha256_digest, data)
        if (await self._call("HEAD", f"blobs/{digest}", actions=PUSH)).status == 200:
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
        begun = await self._call("POST", "blobs/uploads/", actions=PUSH, content=b"")
        if begun.status != 202 or "Location" not in begun.headers:
            raise self._unexpected(begun, "an upload")
        place = led_to(begun.url, begun.headers["Location"], begun.peer)
        place += ("&" if "?" in place else "?") + urllib.parse.urlencode({"digest": digest})
        headers = {"Content-Type": "application/octet-stream"}
        done = await self._call("PUT", place, headers, actions=PUSH, content=data, retry=False)
        if done.status != 201:
            # 404 and 416: the session is gone, or has bytes of a broken attempt.
            raise self._unexpected(done, f"the upload of {digest}", temporary=done.status in (404, 416))

    async def push_manifest(self, data: bytes, media_type: str, reference: str | None = None) -> Digest:
        """Store a manifest under a tag, or its digest if `reference` is None; returns the digest."""
        return (await self._put_manifest(data, media_type, reference))[0]

    async def _put_manifest(
        self, data: bytes, media_type: str, reference: str | None
    ) -> tuple[Digest, Response]:
        digest = digests.sha256_digest(data)
        path = f"manifests/{reference or digest}"
        answer = await self._call("PUT", path, {"Content-Type": media_type}, actions=PUSH, content=data)
        if answer.status not in (200, 201, 202):
            raise self._unexpected(answer, f"the manifest {reference or digest}")
        return digest, answer

    async def attach(self, subject: Descriptor, manifest: bytes) -> Digest:
        """Push an artifact manifest whose subject is `subject`; returns its digest.

        If the registry does not keep track of subjects, the fallback tag is updated; a concurrent update by
        somebody else is noticed by reading it again. Its blobs must have been pushed.
        """
        own = listed_as(manifest, subject)
        digest, answer = await self._put_manifest(manifest, own.media_type, None)
        if "OCI-Subject" in answer.headers:
            return digest
        tag = referrers_tag(subject.digest)
        for attempt in range(ATTACH_ROUNDS):
            raw, entries = await self._fallback_index(tag)
            if any(entry.digest == digest for entry in entries):
                return digest
            if attempt:
                await trio.sleep(self._http.retry.delay_s(attempt))
            await self._put_manifest(add_to_index(raw, own), documents.MEDIA_INDEX, tag)
        if any(entry.digest == digest for entry in (await self._fallback_index(tag))[1]):
            return digest
        raise RemoteError(f"{self._host}/{self._repository}:{tag} is being changed by others", "try again")

    # -- requests ----------------------------------------------------------------------------------------

    async def _connect(self) -> str:
        """Find the scheme once; returns "scheme://host".

        https, except for hosts where plain http is allowed: this machine (asked by http first, since making a
        TLS context takes longer than asking) and any with `insecure` (https first).
        """
        if self._base:
            return self._base
        async with self._connecting:
            if not self._base:
                host = DOCKER_HUB_API if self._host == "docker.io" else self._host
                base = f"https://{host}"
                if is_loopback(split_host(host)):
                    base = await self._probe(f"http://{host}", base)
                elif self._http.insecure:
                    base = await self._probe(base, f"http://{host}")
                self._authorizer = Authorizer(
                    self._http, base, self._host, self._repository, self._auth_files, self._environ
                )
                self._base = base
        return self._base

    async def _probe(self, first: str, second: str) -> str:
        """`first`, unless the server does not speak its scheme. No credentials are sent."""
        try:
            answer = await self._http.send("GET", f"{first}/v2/", retry=False)
        except RemoteError:
            return second if first.startswith("https:") else first
        # Go and nginx answer 400 to plain http on their https port.
        return second if answer.status == 400 else first

    async def _url(self, path: str) -> str:
        return f"{await self._connect()}/v2/{self._repository}/{path}"

    async def _headers(self, url: str, actions: str) -> dict[str, str]:
        """The Authorization header, for URLs of the registry itself only."""
        assert self._authorizer is not None
        if origin(url) != origin(self._base):
            return {}
        header = await self._authorizer.header(actions)
        return {"Authorization": header} if header else {}

    async def _call(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        max_body_bytes: int = 1 << 16,
        *,
        actions: str = PULL,
        content: bytes | None = None,
        retry: bool = True,
    ) -> Response:
        """A request to the API below the repository, or to a whole URL; logs in when asked to."""
        url = path if "://" in path.partition("?")[0] else await self._url(path)
        for renewals in range(MAX_RENEWALS + 1):
            authorization = await self._headers(url, actions)
            answer = await self._http.send(
                method, url, headers={**(headers or {}), **authorization}, content=content,
                max_body_bytes=max_body_bytes, retry=retry,
            )  # fmt: skip
            if answer.status != 401 or renewals == MAX_RENEWALS:
                break
            await self._renew(actions, authorization, answer)
        if answer.status in (401, 403):
            assert self._authorizer is not None
            raise self._authorizer.denied()
        return answer

    async def _renew(self, actions: str, sent: Mapping[str, str], refusal: Response | StreamResponse) -> None:
        assert self._authorizer is not None
        await self._authorizer.renew(actions, sent.get("Authorization"), refusal)

    def _unexpected(self, answer: Response, what: str, *, temporary: bool = False) -> RemoteError | NotFound:
        """The error for a status that the API does not foresee, with the registry's own code if any."""
        code = ""
        try:
            errors = documents.load_json(answer.body, "the answer").get("errors")
            code = str(errors[0]["code"])[:40] if isinstance(errors, list) else ""
        except (ImageError, LookupError, TypeError):
            pass
        shown = f" {code}" if code.isprintable() and code else ""
        message = f"{what}: {redact(answer.url)} answered {answer.status}{shown}"
        hint = "check the name and the registry's settings"
        if answer.status == 404 and not temporary:
            return NotFound(message, hint)
        return RemoteError(message, hint, temporary=temporary)


class _Place:
    """Where a blob is (download.Locator): at the API, or where that redirected to last time."""

    def __init__(self, registry: Registry, digest: str) -> None:
        digests.parse_digest(digest)
        self.what = f"blob {digest} of {registry._host}/{registry._repository}"
        self._registry = registry
        self._digest = digest
        self._sent: dict[str, str] = {}
        self._asked = ""
        self._renewals = 0

    async def where(self) -> tuple[str, dict[str, str]]:
        registry = self._registry
        self._asked = registry._places.get(self._digest) or await registry._url(f"blobs/{self._digest}")
        self._sent = await registry._headers(self._asked, PULL)
        return self._asked, self._sent

    def came_from(self, url: str) -> None:
        places = self._registry._places
        if url != self._asked and len(places) < MAX_REMEMBERED_PLACES:
            places[self._digest] = url

    async def refused(self, answer: Response | StreamResponse) -> bool:
        registry = self._registry
        # Another task may have found a new place meanwhile: forget only the one that refused.
        if registry._places.get(self._digest) == self._asked:
            del registry._places[self._digest]
            return True
        if answer.status == 401 and self._renewals < MAX_RENEWALS:
            self._renewals += 1
            await registry._renew(PULL, self._sent, answer)
            return True
        if answer.status in (401, 403) and registry._authorizer is not None:
            raise registry._authorizer.denied()
        return False
