"""A source that always fails or damages is asked no more often than core/retries.py says."""

from __future__ import annotations

import pytest

from lazyfs.core.layer.plan import REQUEST_BYTES, spans_for_block
from lazyfs.core.retries import DAMAGE_TRIES, MAX_ROUNDS, ranges_for, requests_for_range
from lazyfs.errors import HostError, ImageError, RemoteError
from tests.serving.rig import KINDS, FakeSource, Fault, Rig, Stored, cut, flip, refuse, rig, stored


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", [flip, cut, refuse])
async def test_lasting_faults_cost_a_read_what_the_arithmetic_says(kind: str, fault: Fault) -> None:
    async with rig(kind, *[fault] * 1000) as it:
        damaged = None  # a flipped bit may lie behind the block
        try:
            await it.read(*it.blocks(7))
        except (RemoteError, ImageError) as error:
            damaged = error
        await it.landed()
        assert damaged or fault is flip
        in_batch = -(-len(stored(kind).blob) // REQUEST_BYTES) if kind == "zstd" else 1  # it is one large span
        most = 1 if fault is refuse else DAMAGE_TRIES * in_batch
        assert len(it.source.ranges) <= most <= ranges_for(1, 1, in_batch)


async def test_each_source_that_has_the_block_is_tried_and_then_it_is_over() -> None:
    async with rig("gzip", *[flip] * 1000) as it:
        second = FakeSource(stored("gzip"), [flip] * 1000)
        it.add(second)
        with pytest.raises((RemoteError, ImageError)):
            await it.read(*it.blocks(7))
        assert len(it.source.ranges) == len(second.ranges) == DAMAGE_TRIES
        assert len(it.source.ranges + second.ranges) <= ranges_for(2, 1)


def straddling(it: Rig) -> int:
    """A block that lies in two spans, without being all of the second."""
    table = it.device.layer.table
    return next(one for one in range(1, table.count) if len(spans_for_block(table, stored("plain").spans, one)) == 2)


@pytest.mark.parametrize("before", [0, 1])
async def test_a_block_in_two_spans_that_never_verifies_has_its_bound(before: int) -> None:
    """`before`: whether the first of the spans came before, and with it the flaw."""
    async with rig("plain") as it:
        block = straddling(it)
        spoiled = bytearray(stored("plain").blob)
        spoiled[it.device.layer.table.tar_offsets[block]] ^= 1
        it.source.stored = Stored(bytes(spoiled), stored("plain").spans)
        if before:
            await it.read(*it.blocks(block - 1))
            it.source.ranges.clear()
        with pytest.raises((RemoteError, ImageError)):
            await it.read(*it.blocks(block))
        await it.landed()
        assert DAMAGE_TRIES <= len(it.source.ranges) <= ranges_for(1, 1) == (MAX_ROUNDS + 1) * DAMAGE_TRIES


async def test_a_disk_that_does_not_keep_what_is_written_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig("plain") as it:
        monkeypatch.setattr(it.device.layer, "read", lambda address, size_bytes: None)
        with pytest.raises(HostError, match="does not keep"):
            await it.device.read(*it.blocks(3))


def test_the_product_is_written_down() -> None:
    """Whoever changes a factor sees here what it does."""
    assert (ranges_for(1, 1), requests_for_range()) == (18, 90)
