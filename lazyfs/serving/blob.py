"""A layer's blob at one source: its ranges and windows, each within a deadline."""

from __future__ import annotations

from typing import NamedTuple

import trio

from lazyfs.core.layer.plan import Cost
from lazyfs.core.layer.spans import Span, SpanTable
from lazyfs.core.oci.digests import Digest
from lazyfs.errors import RemoteError
from lazyfs.serving.windows import Windows
from lazyfs.sources.source import Source
from lazyfs.sources.transfer import Take


class Blob(NamedTuple):
    """A layer as one image's source stores it."""

    source: Source
    digest: Digest
    spans: SpanTable
    windows: Windows
    timeout_s: float  # of one request
    cost: Cost  # of requests to the source, shared by all layers that come from there


class BlobReader:
    """Asks a source for pieces of a blob."""

    def __init__(self, blob: Blob) -> None:
        self._blob = blob

    async def range(self, start: int, end: int, take: Take) -> None:
        """Gives the bytes [start, end) as they are stored to `take`, as they come. Raises LazyfsError."""
        begun_s = trio.current_time()
        try:
            with trio.fail_after(self._blob.timeout_s):
                await self._blob.source.blob_range(self._blob.digest, start, end, take)
        except trio.TooSlowError:
            raise self._too_slow() from None
        took_s = trio.current_time() - begun_s
        self._blob.cost.saw(end - start, took_s)

    async def window(self, span: Span) -> bytes:
        """What a decoder must know to enter a span; empty for most. Raises LazyfsError."""
        if span.window is None:
            return b""
        try:
            with trio.fail_after(self._blob.timeout_s):
                return await self._blob.windows.get(span.window, self._blob.cost)
        except trio.TooSlowError:
            raise self._too_slow() from None

    def _too_slow(self) -> RemoteError:
        return RemoteError(
            f"the registry did not deliver within {self._blob.timeout_s:g} s",
            "try again, or raise timeout=",
        )
