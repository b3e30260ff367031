"""Blocks from the spans of a layer's blob, fetched by ranges from a registry or layout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import trio

from lazyfs.core.layer.plan import MAX_TIMES, longer_run, next_run, planned_run, spans_for_block
from lazyfs.core.layer.spans import Span, SpanTable
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.core.retries import DAMAGE_TRIES
from lazyfs.errors import ImageError, RemoteError
from lazyfs.serving.assemble import Fragments
from lazyfs.serving.blob import Blob, BlobReader
from lazyfs.serving.sources import Batch, BlockSource, Extent, Part
from lazyfs.serving.spanrun import Cursors, RunContext, SpanRun

log = logging.getLogger("lazyfs.fetch")


class SpanSource:
    """A BlockSource whose pieces are the spans of one layer's blob.

    `others`: sources of the layer so far. One of the same blob shares what it has decoded in part with this one.
    """

    def __init__(
        self, blob: Blob, fragments: Fragments, decoders: trio.CapacityLimiter, others: Iterable[BlockSource] = ()
    ) -> None:
        self.blob = blob
        self._layer = fragments.layer
        self._fragments = fragments
        self._reader = BlobReader(blob)
        twin = next((one for one in others if isinstance(one, SpanSource) and one._is_of(blob)), None)
        self._spans: SpanTable = twin._spans if twin else blob.spans
        self.cursors: Cursors = twin.cursors if twin else Cursors.of(blob.spans)
        self._context = RunContext(self._reader, self._spans, self.cursors, fragments, decoders)

    def _is_of(self, blob: Blob) -> bool:
        return self.blob.digest == blob.digest and self._spans.same_as(blob.spans)

    @property
    def worth_bytes(self) -> int:
        """As BlockSource: what is stored, times how much it shrank."""
        return self.blob.cost.worth_bytes * self._spans.tar_bytes // max(1, self._spans.blob_bytes)

    def parts(self, layer: ContentRoot, block: int) -> Sequence[Part]:
        """As BlockSource."""
        table = self._layer.table
        end = table.tar_offsets[block] + table.lengths[block]
        parts = []
        for number in spans_for_block(table, self._spans, block):
            span = self._spans[number]
            start = self._fragments.lacks_from(block, span)
            parts.append(Part(number, None if start is None else Extent(start, min(end, span.tar_end))))
        return parts

    def ahead(self, layer: ContentRoot, start: int, end: int) -> Sequence[Part]:
        """As BlockSource. The extents are empty: they only say how far a span is wanted, however far it came."""
        parts = []
        for number in self._spans.covering(start, min(end, self._spans.tar_bytes)):
            span = self._spans[number]
            target = min(end, span.tar_end)
            if self._lacks(span, max(start, span.tar_start), target):
                parts.append(Part(number, Extent(target, target)))
        return parts

    def _lacks(self, span: Span, start: int, end: int) -> bool:
        """Whether something of these plain bytes of a span is wanted: a block is absent, and its part is not here."""
        absent = self._layer.missing(self._layer.table.from_tar(start, end))
        return any(self._fragments.lacks_from(block, span) is not None for block in absent)

    def batch(
        self,
        first: int,
        wanted: Mapping[int, Extent],
        behind: Mapping[int, Extent],
        free: Callable[[int], bool] | None = None,
    ) -> Batch:
        """As BlockSource: neighbours that fit into one request, and behind them what is worth that."""
        begun = self.cursors.numbers
        if free is not None:
            run = planned_run(wanted.keys(), free, self._spans, first, begun, self.blob.cost)
            return Batch(self, run, Extent(wanted[run[0]].start, wanted[run[-1]].end))
        run = next_run(wanted.keys(), self._spans, first, begun)
        extent = Extent(wanted[run[0]].start, wanted[run[-1]].end)
        if extent.end >= self._spans[run[-1]].tar_end:  # what follows can be entered
            most_bytes = MAX_TIMES * self.blob.cost.worth_bytes
            longer = longer_run(run, behind.keys(), self._spans, begun, most_bytes)
            if len(longer) > len(run):
                run, extent = longer, extent._replace(end=behind[longer[-1]].end)
        return Batch(self, run, extent)

    async def bring(self, batch: Batch, published: Callable[[], None]) -> None:
        """As BlockSource. Damaged data is fetched again, then ImageError or RemoteError."""
        for left in reversed(range(DAMAGE_TRIES)):
            try:
                run = await SpanRun.open(self._context, batch)
                bad = await run.fetch(published)
            except ImageError as error:
                if not left:
                    raise
                log.warning("%s; trying again", error)
            else:
                if not bad:
                    return
                log.warning("%d blocks of %s did not verify; trying again", bad, self.blob.digest)
            self.blob.source.counters.retries += 1
        raise RemoteError(
            f"data of layer {self.blob.digest} does not match its index",
            "the registry serves damaged data, or the index is not of this image",
            temporary=False,
        )
