"""Playing a pack: what comes from it, in how many requests, and that whatever is wrong with it costs time only."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from lazyfs.cache.images import note_packs, noted_packs
from lazyfs.core.layer.blocks import BLOCK_BYTES
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.core.starts import pack as packs
from lazyfs.core.starts.pack import head_size, parse_head
from lazyfs.errors import NotFound, RemoteError
from lazyfs.serving import foresight, packblob, packsource, play
from lazyfs.serving.packsource import STALL_S
from lazyfs.sources.transfer import Take
from tests.serving.packs import (
    BLOCKS,
    MANIFEST,
    PackServer,
    cache_of,
    content,
    image_of,
    pack_of,
    played,
    playing,
    stream,
)
from tests.serving.rig import LAYER, rig

ORDER = random.Random(7).sample(BLOCKS, len(BLOCKS))
PACK = pack_of(ORDER)
HEAD = parse_head(PACK, len(PACK))
FRAMES = [range(frame.offset, frame.offset + frame.stored_bytes) for frame in HEAD.frames]


def blocks_of(frame: int) -> list[int]:
    return [block for _, block in HEAD.blocks(HEAD.frames[frame])]


def until(byte: int, then: Callable[[], Awaitable[None]]) -> Callable[[bytes, Take], Awaitable[None]]:
    """Answers as usual up to that byte of the answer, then something else happens."""

    async def answer(data: bytes, take: Take) -> None:
        await stream(data[:byte], take)
        await then()
        await stream(data[byte:], take)

    return answer


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request after the other, as over a slow link, and short pauses."""
    monkeypatch.setattr(packsource, "_MAX_BRIDGE_BYTES", 64 << 10)
    monkeypatch.setattr(packblob, "BEGINNING_BYTES", 4 << 20)
    monkeypatch.setattr(packblob, "SHORT_BEGINNING_BYTES", 4 << 20)
    monkeypatch.setattr(play, "PAUSE_S", 0.01)
    monkeypatch.setattr(packblob, "FIRST_BYTE_S", 0.3)
    monkeypatch.setattr(packblob, "SILENCE_S", 1.5 * STALL_S)


async def breaks() -> None:
    raise RemoteError("the connection broke")


async def test_all_blocks_come_from_the_pack_by_few_requests() -> None:
    async with rig("gzip") as it:
        server = PackServer(PACK)
        await played(it, server)
        assert not it.device.layer.missing(BLOCKS) and not it.source.ranges
        assert len(server.ranges) == 2 and server.fetched == len(PACK)
        await it.read()


async def test_the_beginning_is_asked_for_before_the_image_is_open() -> None:
    async with rig("gzip") as it:
        server = PackServer(pack_of(ORDER[:10]))
        async with playing(it, server) as player:
            del player
            await trio.testing.wait_all_tasks_blocked(0.05)
        assert server.ranges == [(0, len(server.pack))]
        assert it.device.layer.present_blocks() == 10


async def test_little_is_asked_for_in_advance_if_some_of_it_may_be_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packblob, "SHORT_BEGINNING_BYTES", 1 << 20)
    async with rig("gzip") as it:
        server = PackServer(PACK, [until(2 << 20, lambda: trio.testing.wait_all_tasks_blocked(0.1))])
        for block in BLOCKS:
            it.device.layer.publish(block, LAYER.content(block))
        await played(it, server)
        assert server.sent < (2 << 20) + (64 << 10) and len(server.ranges) == 1


async def test_what_comes_before_the_image_is_open_leaves_room_for_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packblob, "SHORT_BEGINNING_BYTES", 1 << 20)
    monkeypatch.setattr(packblob, "BEGINNING_S", -1.0)
    for is_open in (False, True):
        server = PackServer(PACK)
        blob = packblob.PackBlob(server.found, packblob.Advances())
        if is_open:
            blob.opened()
        await blob.begin()
        assert server.sent == (4 << 20 if is_open else 1 << 20) == blob.beginning_ends
        pieces: list[bytes] = []

        async def take(piece: bytes, into: list[bytes] = pieces) -> None:
            into.append(piece)

        await blob.range(1000, 2 << 20, take)
        assert b"".join(pieces) == PACK[1000 : 2 << 20]


async def test_beginnings_take_a_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packblob, "SHORT_BEGINNING_BYTES", 1 << 20)
    advances = packblob.Advances(5 << 20)
    blobs = [packblob.PackBlob(PackServer(PACK).found, advances) for _ in range(2)]
    assert blobs[0].beginning_ends == 4 << 20
    second = blobs[1].beginning_ends
    for blob in blobs:
        blob.close()
        blob.close()
    assert advances.left_bytes == 5 << 20 and second == packblob.SHORT_BEGINNING_BYTES


async def test_what_is_cached_is_not_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packblob, "BEGINNING_BYTES", 64 << 10)
    monkeypatch.setattr(packsource, "_MAX_GAP_BYTES", 64 << 10)
    async with rig("gzip") as it:
        for frame in (2, 3, 6):
            for block in blocks_of(frame):
                it.device.layer.publish(block, LAYER.content(block))
        server = PackServer(PACK)
        await played(it, server)
        assert not it.device.layer.missing(BLOCKS)
        asked = [place for start, end in server.ranges for place in range(start, end, 1 << 10)]
        assert not any(place in FRAMES[frame] for frame in (2, 3, 6) for place in asked)
        assert len(server.ranges) == 4


async def test_a_reader_waits_for_what_the_pack_brings_soon() -> None:
    go_on = trio.Event()
    async with rig("gzip") as it:
        server = PackServer(PACK, [until(FRAMES[1].start, go_on.wait)])
        async with playing(it, server), trio.open_nursery() as nursery:
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.start_soon(it.read, *it.blocks(blocks_of(1)[0]))
            await trio.testing.wait_all_tasks_blocked(0.05)
            go_on.set()
        assert not it.source.ranges


async def test_a_reader_does_not_wait_for_a_pack_that_stalls() -> None:
    async with rig("gzip") as it:
        server = PackServer(PACK, [until(FRAMES[1].start, trio.sleep_forever)])
        async with playing(it, server):
            await trio.testing.wait_all_tasks_blocked(0.05)
            begun_s = trio.current_time()
            await it.read(*it.blocks(blocks_of(1)[0]))
            assert STALL_S * 0.9 < trio.current_time() - begun_s < STALL_S + 0.5
            assert it.source.ranges
            begun_s = trio.current_time()
            await it.read(*it.blocks(blocks_of(1)[1]))  # nobody waits for this frame any more
            assert trio.current_time() - begun_s < STALL_S / 2


async def test_a_reader_does_not_wait_for_what_comes_late() -> None:
    """The stream is slow, and what is wanted lies far behind in it."""
    first = trio.Event()
    async with rig("gzip") as it:

        async def slow(data: bytes, take: Take) -> None:
            for at in range(0, len(data), 1 << 16):
                await take(data[at : at + (1 << 16)])
                if at > FRAMES[0].start:
                    first.set()
                await trio.sleep(0.05)

        async with playing(it, PackServer(PACK, [slow])):
            with trio.fail_after(5):
                await first.wait()
            begun_s = trio.current_time()
            await it.read(*it.blocks(blocks_of(2)[-1]))
            assert it.source.ranges and trio.current_time() - begun_s < STALL_S


async def test_a_queued_frame_that_somebody_reads_is_fetched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packblob, "BEGINNING_BYTES", FRAMES[1].stop)
    async with rig("gzip") as it:
        server = PackServer(PACK, [until(FRAMES[0].stop, trio.sleep_forever)])
        async with playing(it, server):
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(server.ranges) == 1
            await it.read(*it.blocks(blocks_of(7)[3]))
            assert not it.source.ranges
            assert server.ranges[1] == (FRAMES[7].start, FRAMES[7].stop)


@pytest.mark.parametrize("broken", [1, FRAMES[0].start, FRAMES[2].start + 1000, FRAMES[2].stop - 1])
async def test_a_broken_stream_goes_on_where_it_was(broken: int) -> None:
    async with rig("gzip") as it:
        server = PackServer(PACK, [until(broken, breaks)])
        await played(it, server)
        assert not it.device.layer.missing(BLOCKS) and not it.source.ranges
        frame = max((number for number, one in enumerate(FRAMES) if one.start <= broken), default=0)
        assert server.ranges[1][0] in (0, broken, FRAMES[frame].start)


async def test_a_server_that_is_gone_for_a_while_is_asked_again() -> None:
    async with rig("gzip") as it:

        async def gone(data: bytes, take: Take) -> None:
            raise RemoteError("nobody listens")

        server = PackServer(PACK, [until(FRAMES[2].start, breaks), gone, gone, gone])
        await played(it, server)
        assert not it.device.layer.missing(BLOCKS)


async def test_a_server_that_stays_away_is_given_up() -> None:
    async with rig("gzip") as it:

        async def gone(data: bytes, take: Take) -> None:
            raise RemoteError("nobody listens")

        server = PackServer(PACK, [until(FRAMES[2].start, breaks), *[gone] * 100])
        async with playing(it, server) as player:
            with trio.fail_after(10):
                await player.ended()
        assert 5 < len(server.ranges) < 20
        assert len(it.device.fetcher.sources) == 1
        await it.read()


async def test_a_silent_server_is_given_up() -> None:
    async with rig("gzip") as it:

        async def silent(data: bytes, take: Take) -> None:
            await trio.sleep_forever()

        server = PackServer(PACK, [silent] * 100)
        async with playing(it, server) as player:
            with trio.fail_after(10):
                await player.ended()


async def test_a_pack_that_is_gone_is_looked_for_anew_next_time() -> None:
    """Somebody has replaced it since it was found."""

    async def gone() -> None:
        raise NotFound("the blob does not exist")

    async with rig("gzip") as it:
        note_packs(cache_of(it), MANIFEST, b"[]")
        server = PackServer(PACK, [until(0, gone)] * 100)
        async with playing(it, server) as player:
            with trio.fail_after(5):
                await player.ended()
        assert len(server.ranges) < 5 and noted_packs(cache_of(it), MANIFEST) is None
        await it.read()


def spoiled(place: int) -> bytes:
    return PACK[:place] + bytes([PACK[place] ^ 0x55]) + PACK[place + 1 :]


def of_another_layer() -> bytes:
    """It has the right numbers, and contents of something else."""

    def other(root: ContentRoot, block: int) -> bytes:
        return random.Random(block).randbytes(len(LAYER.content(block)))

    return pack_of(ORDER, other)


def half_wrong() -> bytes:
    def other(root: ContentRoot, block: int) -> bytes:
        return random.Random(block).randbytes(1000) if block % 2 else LAYER.content(block)

    return pack_of(ORDER, other)


def reordered() -> bytes:
    """The frames in the wrong order, with a head that does not know it."""
    frames = [PACK[one.start : one.stop] for one in FRAMES]
    assert len({len(frame) for frame in frames[:2]}) == 2
    head = PACK[: FRAMES[0].start]
    return b"".join([head, *reversed(frames)])


WRONG = {
    "a flipped byte in a frame": (spoiled(FRAMES[3].start + 5000), 0.85),
    "a flipped byte in the head": (spoiled(40), 0),
    "no pack": (b"x" * 10_000, 0),
    "empty": (b"", 0),
    "cut in the head": (PACK[: head_size(PACK) - 10], 0),
    "cut in a frame": (PACK[: FRAMES[4].start + 10], 0),
    "longer": (PACK + b"more", 0),
    "reordered": (reordered(), 0),
    "contents of something else": (of_another_layer(), 0),
    "half of the blocks are wrong": (half_wrong(), 0.3),
    "of another layer": (pack_of(ORDER, lambda _, block: LAYER.content(block), ContentRoot("ab" * 32)), 0),
    "blocks the layer does not have": (
        pack_of([*range(1000, 1010), *ORDER], lambda root, block: content(root, block) or bytes(BLOCK_BYTES)), 1.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", WRONG)
async def test_a_wrong_pack_costs_time_only(which: str) -> None:
    pack, good = WRONG[which]
    async with rig("gzip") as it:
        server = PackServer(pack)
        async with playing(it, server) as player:
            begun_s = trio.current_time()
            for number in range(0, len(BLOCKS), 3):
                await it.read(*it.blocks(number))
            assert trio.current_time() - begun_s < 5
            with trio.fail_after(5):
                await player.ended()
        assert it.device.layer.present_blocks() >= good * len(BLOCKS)
        assert server.fetched <= len(pack) + (1 << 20)  # nothing of it is asked for twice
        assert len(it.device.fetcher.sources) == 1
        await it.read()


async def test_a_pack_that_never_fits_is_given_up_before_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packsource, "_MIN_REFUSED", 8)
    async with rig("gzip") as it:
        server = PackServer(of_another_layer())
        await played(it, server)
        assert server.fetched == packblob.BEGINNING_BYTES < len(server.pack)


@pytest.mark.parametrize("known", [True, False])
async def test_it_ends_if_the_start_reads_mostly_something_else(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foresight, "MIN_TOUCHED", 8)
    monkeypatch.setattr(packblob, "SILENCE_S", 20)
    async with rig("gzip") as it:
        image = image_of(it)
        image.traces.begin(MANIFEST, image.reference, "", image.layers)
        server = PackServer(PACK if known else pack_of(BLOCKS[:30]), [until(1_000_000, trio.sleep_forever)])
        async with playing(it, server, image) as player:
            for block in BLOCKS[30:]:
                it.device.read_cached(*it.blocks(block))
                await it.read(*it.blocks(block))
            with trio.move_on_after(2) as waiting:
                await player.ended()
            assert waiting.cancelled_caught == known


@pytest.mark.parametrize("byte", [10, 10_000, FRAMES[2].start + 5, FRAMES[7].start])
async def test_an_image_may_be_closed_while_it_plays(byte: int) -> None:
    arrived = trio.Event()

    async def stuck() -> None:
        arrived.set()
        await trio.sleep_forever()

    async with rig("gzip") as it:
        server = PackServer(PACK, [until(byte, stuck), until(max(1, byte - packblob.BEGINNING_BYTES), stuck)])
        async with playing(it, server):
            with trio.fail_after(5):
                await arrived.wait()
        assert len(it.device.fetcher.sources) == 1
        await it.remove()
        it.add(type(it.source)(it.source.stored))
        await it.read()


async def test_a_reader_goes_on_when_the_pack_is_closed() -> None:
    async with rig("gzip") as it:
        server = PackServer(PACK, [until(FRAMES[1].start, trio.sleep_forever)])
        async with trio.open_nursery() as nursery:
            async with playing(it, server):
                await trio.testing.wait_all_tasks_blocked(0.05)
                nursery.start_soon(it.read, *it.blocks(blocks_of(1)[0]))
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert not it.source.ranges
            closed_s = trio.current_time()
        assert it.source.ranges and trio.current_time() - closed_s < STALL_S / 2


async def test_an_image_that_does_not_open_ends_it() -> None:
    async with rig("gzip") as it:
        server = PackServer(PACK, [until(100, trio.sleep_forever)])
        async with playing(it, server):
            pass
        assert it.device.layer.present_blocks() == 0


def test_the_manifest_in_the_head_is_no_matter() -> None:
    assert HEAD.manifest_digest == MANIFEST and packs.FRAME_BYTES == 1 << 20
