"""What the tests of sources share: opening one with fast retries, deadlines, and test data."""

from __future__ import annotations

import base64
import gzip
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from lazyfs.core.oci.digests import Digest
from lazyfs.core.oci.reference import RegistryReference, parse_reference
from lazyfs.sources.connections import Connections
from lazyfs.sources.failures import RetryPolicy
from lazyfs.sources.http import HttpClient
from lazyfs.sources.registry import Registry
from lazyfs.sources.source import Source

DEADLINE_S = 30.0
FAST = RetryPolicy(attempts=5, base_s=0.0)
# Really gzip, so that skopeo copies it as it is.
BLOB = gzip.compress(random.Random(1).randbytes(3_000_000), 1, mtime=0)


@asynccontextmanager
async def open_registry(
    host: str,
    repository: str = "demo",
    *,
    auth_files: Sequence[str] = (),
    ca_files: Sequence[str] = (),
    insecure: bool = False,
    certs_dirs: Sequence[str] = (),
    retry: RetryPolicy = FAST,
    patience_s: float = 20.0,
) -> AsyncIterator[Registry]:
    """A Registry under a deadline, without back-off waits, that reads none of this host's files."""
    connections = Connections(insecure=insecure, ca_files=ca_files, certs_dirs=certs_dirs)
    http = HttpClient(connections, patience_s=patience_s, stream_patience_s=patience_s, retry=retry)
    reference = parse_reference(f"{host}/{repository}")
    assert isinstance(reference, RegistryReference)
    registry = Registry(reference, http, auth_files=auth_files)
    with trio.fail_after(DEADLINE_S):
        try:
            yield registry
        finally:
            await registry.aclose()


def login(tmp_path: Path, host: str, user: str, password: str) -> list[str]:
    """An auth file with one entry, as the list of auth files."""
    path = tmp_path / "auth.json"
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return [str(path)]


async def read_stream(source: Source, digest: Digest, size_bytes: int) -> bytes:
    """The whole of a blob stream."""
    async with source.blob_stream(digest, size_bytes) as pieces:
        return b"".join([piece async for piece in pieces])
