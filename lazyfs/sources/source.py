"""Where an image's documents and blobs come from: one protocol, chosen by the kind of reference."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Protocol

from lazyfs.core.oci.digests import Digest
from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.oci.reference import DirectoryReference, Reference, RegistryReference
from lazyfs.sources.access import Access
from lazyfs.sources.transfer import PATIENCE_S, Take, TransferCounters

if TYPE_CHECKING:
    from lazyfs.sources.connections import Connections

__all__ = ["Source", "Sources", "TransferCounters", "open_source"]


class Source(Protocol):
    """A repository or layout. Used by many tasks of one trio run. tests/sources/test_contract.py tests all kinds.

    Raises NotFound (it is not there), RemoteError (it cannot be fetched), ImageError (it does not have the digest or
    size, or the digest is none), HostError, UserError (also: it is read-only). Operations retry within the caller's
    deadline, so give each one a deadline. A cancelled operation leaves the source usable.
    """

    counters: TransferCounters

    async def manifest(self, reference: str) -> tuple[bytes, str]:
        """Tag or digest -> bytes as stored (at most 4 MiB), media type; verified if asked for by digest."""

    async def blob(self, digest: Digest, size_bytes: int) -> bytes:
        """The whole blob in memory, size and digest verified. The caller caps the size."""

    async def blob_range(
        self, digest: Digest, start: int, end: int, take: Take | None = None, *, bulk: bool = False
    ) -> bytes:
        """Exactly the bytes [start, end) of a blob, not verified; ImageError if it is shorter. With `take` they are
        given to that as they come, and nothing is returned. `bulk`: it takes long, and goes beside other requests as
        streams do."""

    def blob_stream(self, digest: Digest, size_bytes: int) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The whole blob in order in pieces of at most 1 MiB; verified after the last piece (ImageError)."""

    async def referrers(self, subject_digest: Digest, *artifact_types: str) -> list[Descriptor]:
        """What was attached to a manifest, of these artifact types; nothing if there is no such manifest."""

    async def push_blob(self, data: bytes) -> Digest:
        """Store a blob unless it is there; returns its digest."""

    async def push_manifest(self, data: bytes, media_type: str, reference: str | None = None) -> Digest:
        """Store a manifest under a tag or its digest; returns its digest."""

    async def attach(self, subject: Descriptor, manifest: bytes) -> Digest:
        """Store an artifact manifest whose subject is `subject`, found by `referrers()` once; returns its digest."""

    async def detach(self, subject: Descriptor, artifact: Descriptor, blobs: Sequence[Digest] = ()) -> None:
        """Undo attach(), so far as the place allows: a registry may go on listing it. `blobs`: what only this artifact
        has, to be removed where nobody else does that."""

    async def aclose(self) -> None:
        """Release connections and files. Idempotent."""


def open_source(
    reference: Reference, access: Access, connections: Connections | None = None, patience_s: float = PATIENCE_S
) -> Source:
    """The source for a reference. No I/O except opening a layout's directory (UserError). `aclose()` it.

    `connections`: those to use; they stay open. By default the source has its own. `patience_s`: a server that is
    silent for so long is asked again on a new connection. The HTTP stack is imported only for sources that need it,
    because importing it costs more than opening a local layout.
    """
    if isinstance(reference, DirectoryReference):
        from lazyfs.sources.layout import DirectoryLayout

        return DirectoryLayout(reference)
    from lazyfs.sources.http import HttpClient

    shared = connections is not None
    http = HttpClient(connections or _connections(access), patience_s=patience_s, shared=shared)
    if isinstance(reference, RegistryReference):
        from lazyfs.sources.registry import Registry

        return Registry(reference, http, auth_files=access.auth_files, environ=access.environ)
    from lazyfs.sources.weblayout import WebLayout

    return WebLayout(reference, http)


def preload() -> None:
    """Imports what sources on the network need, for a process that waits for its first one."""
    from lazyfs.sources import (
        connections,
        registry,  # noqa: F401
    )

    connections.preload()


def _connections(access: Access) -> Connections:
    from lazyfs.sources.connections import Connections

    return Connections(insecure=access.insecure, ca_files=access.ca_files)


class Sources:
    """Opens sources that share connections, for each way of reaching servers (CAs, insecure)."""

    def __init__(self) -> None:
        self._connections: dict[tuple[bool, tuple[str, ...]], Connections] = {}

    def open(self, reference: Reference, access: Access, patience_s: float = PATIENCE_S) -> Source:
        """As `open_source`."""
        if isinstance(reference, DirectoryReference):
            return open_source(reference, access)
        key = (access.insecure, access.ca_files)
        if key not in self._connections:
            self._connections[key] = _connections(access)
        return open_source(reference, access, self._connections[key], patience_s)

    async def aclose(self) -> None:
        """Closes all connections; the sources cannot be used any more."""
        for connections in self._connections.values():
            await connections.aclose()
