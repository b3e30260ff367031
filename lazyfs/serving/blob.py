"""A layer's blob at one source: its ranges and windows, each within a deadline."""

from __future__ import annotations

from typing import NamedTuple

import trio

from lazyfs.core.layer.spans import Span, SpanTable
from lazyfs.core.oci.digests import Digest
from lazyfs.errors import RemoteError
from lazyfs.serving.windows import Windows
from lazyfs.sources.source import Source


class Blob(NamedTuple):
    """A layer as one image's source stores it."""

    source: Source
    digest: Digest
    spans: SpanTable
    windows: Windows
    timeout_s: float  # of one request


class BlobReader:
    """Asks a source for pieces of a blob. Knows how far away it is."""

    def __init__(self, blob: Blob) -> None:
        self._blob = blob
        self.quickest_s = 0.0  # of the requests so far

    async def range(self, start: int, end: int) -> bytes:
        """The bytes [start, end) as they are stored. Raises LazyfsError."""
        begun_s = trio.current_time()
        try:
            with trio.fail_after(self._blob.timeout_s):
                data = await self._blob.source.blob_range(self._blob.digest, start, end)
        except trio.TooSlowError:
            raise self._too_slow() from None
        took_s = trio.current_time() - begun_s
        self.quickest_s = min(self.quickest_s or took_s, took_s)
        return data

    async def window(self, span: Span) -> bytes:
        """What a decoder must know to enter a span; empty for most. Raises LazyfsError."""
        if span.window is None:
            return b""
        try:
            with trio.fail_after(self._blob.timeout_s):
                return await self._blob.windows.get(span.window)
        except trio.TooSlowError:
            raise self._too_slow() from None

    def _too_slow(self) -> RemoteError:
        return RemoteError(
            f"the registry did not deliver within {self._blob.timeout_s:g} s",
            "try again, or raise timeout=",
        )
