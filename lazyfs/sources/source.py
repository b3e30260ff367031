"""Where an image's documents and blobs come from: one protocol, chosen by the kind of reference."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Protocol

from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.oci.reference import DirectoryReference, Reference, RegistryReference
from lazyfs.sources.access import Access
from lazyfs.sources.transfer import TransferCounters

if TYPE_CHECKING:
    from lazyfs.sources.http import HttpClient

__all__ = ["Source", "Sources", "TransferCounters", "open_source"]

PATIENCE_S = 30.0


class Source(Protocol):
    """A repository or layout. Used by many tasks of one trio run.

    Raises NotFound (is not there), RemoteError (cannot be had), ImageError (is not what its digest says),
    HostError, UserError. Retries are inside, bounded by the caller's deadline: give each operation one.
    """

    counters: TransferCounters

    async def manifest(self, reference: str) -> tuple[bytes, str]:
        """Tag or digest -> bytes as stored (at most 4 MiB), media type; verified if asked for by digest."""

    async def blob(self, digest: str, size_bytes: int) -> bytes:
        """The whole blob in memory, size and digest verified. The caller caps the size."""

    async def blob_range(self, digest: str, start: int, end: int) -> bytes:
        """Exactly the bytes [start, end) of a blob, not verified."""

    def blob_stream(self, digest: str, size_bytes: int) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The whole blob in order in pieces of at most 1 MiB; verified after the last piece (ImageError)."""

    async def referrers(self, subject_digest: str, artifact_type: str) -> list[Descriptor]:
        """What was attached to a manifest, of one artifact type."""

    async def push_blob(self, data: bytes) -> str:
        """Store a blob unless it is there; returns its digest."""

    async def push_manifest(self, data: bytes, media_type: str, reference: str | None = None) -> str:
        """Store a manifest under a tag or its digest; returns its digest."""

    async def attach(self, subject: Descriptor, manifest: bytes) -> str:
        """Store an artifact manifest whose subject is `subject`, findable by `referrers()`."""

    async def aclose(self) -> None:
        """Release connections and files."""


def open_source(reference: Reference, access: Access, http: HttpClient | None = None) -> Source:
    """The source for a reference. No I/O except opening a layout's directory (UserError). `aclose()` it.

    `http`: the client to use, closed with the source; by default one of its own. The HTTP stack is
    imported only for those who need it: it costs more than opening a local layout.
    """
    if isinstance(reference, DirectoryReference):
        from lazyfs.sources.layout import DirectoryLayout

        return DirectoryLayout(reference)
    http = http or _client(access)
    if isinstance(reference, RegistryReference):
        from lazyfs.sources.registry import Registry

        return Registry(reference, http, auth_files=access.auth_files, environ=access.environ)
    from lazyfs.sources.weblayout import WebLayout

    return WebLayout(reference, http)


def preload() -> None:
    """Imports what sources on the network need, for a process that waits for its first one."""
    from lazyfs.sources import (
        http,
        registry,  # noqa: F401
    )

    http.preload()


def _client(access: Access) -> HttpClient:
    from lazyfs.sources.http import HttpClient

    return HttpClient(insecure=access.insecure, ca_files=access.ca_files)


class Sources:
    """Opens sources that share one connection pool for each way of reaching servers (CAs, insecure)."""

    def __init__(self) -> None:
        self._clients: dict[tuple[bool, tuple[str, ...]], HttpClient] = {}

    def open(self, reference: Reference, access: Access, patience_s: float = PATIENCE_S) -> Source:
        """As `open_source`. A server that is silent for `patience_s` is asked again on a new connection."""
        if isinstance(reference, DirectoryReference):
            return open_source(reference, access)
        key = (access.insecure, access.ca_files)
        if key not in self._clients:
            self._clients[key] = _client(access)
        return open_source(reference, access, self._clients[key].sibling(patience_s))

    async def aclose(self) -> None:
        """Closes all connections; the sources cannot be used any more."""
        for client in self._clients.values():
            await client.aclose()
