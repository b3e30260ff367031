"""OCI image layouts behind a web server or object store that answers range requests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from lazyfs.core.oci.digests import Digest
from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.oci.reference import WebReference
from lazyfs.errors import NotFound, RemoteError, UserError
from lazyfs.sources.layout import Layout, blob_name
from lazyfs.sources.transfer import Take

if TYPE_CHECKING:
    from lazyfs.sources.http import HttpClient, Response, StreamResponse


class WebLayout(Layout):
    """A layout behind a web server. Implements `Source`; read-only."""

    def __init__(self, reference: WebReference, http: HttpClient) -> None:
        self.what = f"oci+{reference.url}"
        self.counters = http.counters
        self._http = http
        self._url = reference.url

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def _document(self, name: str, max_bytes: int) -> bytes:
        answer = await self._http.send("GET", f"{self._url}/{name}", max_body_bytes=max_bytes)
        message, hint = f"{self.what}: the server answered {answer.status} for {name}", "is it an OCI image layout?"
        if answer.status == 404:
            raise NotFound(message, hint)
        if answer.status != 200:
            raise RemoteError(message, hint, temporary=False)
        return answer.body

    async def blob(self, digest: Digest, size_bytes: int) -> bytes:
        """The whole blob in memory; size and digest are verified (ImageError). The caller caps the size."""
        from lazyfs.sources.blobs import fetch_blob

        return await fetch_blob(self._http, _WebPlace(self, digest), digest, size_bytes)

    async def blob_range(
        self, digest: Digest, start: int, end: int, take: Take | None = None, *, bulk: bool = False
    ) -> bytes:
        """Exactly the bytes [start, end) of a blob, not verified."""
        from lazyfs.sources.blobs import fetch_range

        return await fetch_range(self._http, _WebPlace(self, digest), digest, start, end, take, bulk)

    def blob_stream(self, digest: Digest, size_bytes: int) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The whole blob in order; resumes after a break; ImageError at the end if the digest is wrong."""
        from lazyfs.sources.blobs import open_blob_stream

        return open_blob_stream(self._http, _WebPlace(self, digest), digest, size_bytes)

    async def push_blob(self, data: bytes) -> Digest:
        """UserError: web layouts are read-only."""
        raise self._read_only()

    async def push_manifest(self, data: bytes, media_type: str, reference: str | None = None) -> Digest:
        """UserError: web layouts are read-only."""
        raise self._read_only()

    async def attach(self, subject: Descriptor, manifest: bytes) -> Digest:
        """UserError: web layouts are read-only."""
        raise self._read_only()

    async def detach(self, subject: Descriptor, artifact: Descriptor, blobs: Sequence[Digest] = ()) -> None:
        """UserError: web layouts are read-only."""
        raise self._read_only()

    def _read_only(self) -> UserError:
        return UserError(f"{self.what} cannot be written", "write to the directory itself with oci:DIR")


class _WebPlace:
    """Where a blob of a web layout is (blobs.Locator)."""

    def __init__(self, layout: WebLayout, digest: Digest) -> None:
        self.what = f"blob {digest} of {layout.what}"
        self._url = f"{layout._url}/{blob_name(digest)}"

    async def where(self) -> tuple[str, dict[str, str]]:
        return self._url, {}

    def came_from(self, url: str) -> None:
        """Web servers are asked anew each time: their redirects cost little and may change."""

    async def refused(self, answer: Response | StreamResponse) -> bool:
        return False
