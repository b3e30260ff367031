"""The schedule: what goes first, what goes together, and who is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import hypothesis.stateful as hs
import pytest
from hypothesis import strategies as st

from lazyfs.core.oci.digests import ContentRoot
from lazyfs.errors import LazyfsError, RemoteError
from lazyfs.serving.schedule import AHEAD_SLOTS, PACK_SLOTS, READ_SLOTS, SLOTS, Rank, Schedule, Ticket
from lazyfs.serving.sources import Batch, BlockSource, Extent, Part

ERROR = RemoteError("the test says no")


class Pieces(BlockSource):
    """A source of which a batch holds neighbours, `most` at most; none while it is `held`."""

    worth_bytes = 0

    def __init__(self, most: int = 4) -> None:
        self.most = most
        self.held = False

    def parts(self, layer: ContentRoot, block: int) -> Sequence[Part]:
        raise AssertionError("a schedule knows no blocks")

    def ahead(self, layer: ContentRoot, start: int, end: int) -> Sequence[Part]:
        raise AssertionError("a schedule knows no blocks")

    def batch(
        self,
        first: int,
        wanted: Mapping[int, Extent],
        behind: Mapping[int, Extent],
        free: Callable[[int], bool] | None = None,
    ) -> Batch | None:
        if self.held:
            return None
        end = first
        while end in wanted and end - first < self.most:
            end += 1
            gap = end not in wanted and end + 1 in wanted and end + 1 - first < self.most
            if free is not None and gap and free(end):
                end += 1
        last = wanted[end - 1]
        while end in behind and end - first < self.most:
            last = behind[end]
            end += 1
        return Batch(self, range(first, end), Extent(wanted[first].start, last.end))

    async def bring(self, batch: Batch, published: Callable[[], None]) -> None:
        raise AssertionError("a schedule does nothing")


def part(piece: int) -> Part:
    return Part(piece, Extent(100 * piece, 100 * piece + 50))


def want(schedule: Schedule[Ticket], source: Pieces, piece: int, rank: Rank = Rank.READ) -> Ticket:
    ticket = Ticket()
    assert schedule.want(source, part(piece), rank, ticket)
    return ticket


def pieces(batches: list[Batch]) -> list[list[int]]:
    return [list(batch.pieces) for batch in batches]


def test_neighbours_that_are_wanted_go_together_as_far_as_they_are_wanted() -> None:
    schedule, source = Schedule[Ticket](), Pieces()
    for piece in (7, 8, 9, 20):
        want(schedule, source, piece)
    schedule.want(source, Part(9, Extent(880, 990)), Rank.READ)
    first, second = schedule.start()
    assert list(first.pieces) == [7, 8, 9] and first.extent == Extent(700, 990)
    assert list(second.pieces) == [20]
    assert schedule.start() == []


def test_a_read_overtakes_all_that_is_less_urgent() -> None:
    schedule, source, other = Schedule[Ticket](slots=1 + READ_SLOTS), Pieces(1), Pieces(1)
    for piece in range(10):
        want(schedule, source, piece, Rank.FILL)
    want(schedule, source, 50, Rank.PACK)
    (pack,) = schedule.start()
    assert pieces([pack]) == [[50]]
    want(schedule, source, 60)
    want(schedule, other, 61)
    (read,) = schedule.start()
    assert pieces([read]) == [[60]]
    schedule.ended(pack, None)
    assert pieces(schedule.start()) == [[61]]
    schedule.ended(read, None)
    assert schedule.start() == []  # the last slot is for reads


@pytest.mark.parametrize("rank", [Rank.AHEAD, Rank.PACK, Rank.FILL])
def test_a_slot_is_kept_for_reads(rank: Rank) -> None:
    schedule, source = Schedule[Ticket](), Pieces(1)
    for piece in range(SLOTS * 2):
        want(schedule, source, piece, rank)
    slots = {Rank.AHEAD: AHEAD_SLOTS, Rank.PACK: PACK_SLOTS, Rank.FILL: SLOTS - READ_SLOTS}
    assert len(schedule.start()) == slots[rank]
    want(schedule, source, 100)
    assert pieces(schedule.start()) == [[100]]


def test_reads_may_have_all_slots_and_no_more() -> None:
    schedule, source = Schedule[Ticket](), Pieces(1)
    for piece in range(SLOTS * 2):
        want(schedule, source, piece)
    batches = schedule.start()
    assert pieces(batches) == [[piece] for piece in range(SLOTS)]
    schedule.ended(batches[0], None)
    assert pieces(schedule.start()) == [[SLOTS]]


def test_a_read_raises_what_is_queued_below_it() -> None:
    schedule, source = Schedule[Ticket](slots=1), Pieces(1)
    filler = want(schedule, source, 3, Rank.FILL)
    assert schedule.start() == []  # no slot but the readers'
    reader = want(schedule, source, 3)
    (batch,) = schedule.start()
    assert schedule.ended(batch, None) == [filler, reader]
    assert schedule.idle


def test_guesses_go_behind_what_is_read_and_never_before_it() -> None:
    schedule, source = Schedule[Ticket](), Pieces()
    for piece in (4, 6, 7, 20):
        assert schedule.want(source, part(piece), Rank.AHEAD)
    want(schedule, source, 30, Rank.PACK)
    want(schedule, source, 9)
    want(schedule, source, 5)
    started = schedule.start()
    assert pieces(started) == [[9], [5, 6, 7], [4], [30]]
    schedule.ended(started[0], None)
    schedule.ended(started[1], None)
    assert pieces(schedule.start()) == [[20]]
    assert not schedule.want(source, Part(8, None), Rank.AHEAD)


def test_a_read_that_comes_later_overtakes_all_guesses_but_those_that_are_under_way() -> None:
    schedule, source = Schedule[Ticket](), Pieces(1)
    for piece in range(SLOTS * 2):
        schedule.want(source, part(piece), Rank.AHEAD)
    under_way = schedule.start()
    assert len(under_way) == AHEAD_SLOTS
    reader = want(schedule, source, SLOTS * 2 - 1)  # it was guessed, but last
    (batch,) = schedule.start()
    assert pieces([batch]) == [[SLOTS * 2 - 1]]
    assert schedule.ended(batch, None) == [reader]


def test_a_fill_does_not_lower_what_a_read_wants() -> None:
    schedule, source = Schedule[Ticket](slots=1), Pieces(1)
    want(schedule, source, 3)
    want(schedule, source, 3, Rank.FILL)
    assert pieces(schedule.start()) == [[3]]


def test_sources_take_turns() -> None:
    schedule, one, other = Schedule[Ticket](slots=2), Pieces(1), Pieces(1)
    for piece in (1, 3, 5):
        want(schedule, one, piece)
    want(schedule, other, 1)
    assert [batch.source for batch in schedule.start()] == [one, other]


def test_a_source_that_cannot_just_now_is_asked_again() -> None:
    schedule, source, other = Schedule[Ticket](), Pieces(), Pieces()
    want(schedule, source, 1)
    want(schedule, other, 2)
    source.held = True
    (batch,) = schedule.start()
    assert batch.source is other
    source.held = False
    schedule.ended(batch, None)
    assert pieces(schedule.start()) == [[1]]


def test_many_readers_share_what_is_in_flight() -> None:
    schedule, source = Schedule[Ticket](), Pieces()
    early = want(schedule, source, 1)
    (batch,) = schedule.start()
    late = want(schedule, source, 1)
    assert schedule.start() == []
    assert schedule.waiting_for(batch) == [early, late]
    assert schedule.ended(batch, None) == [early, late]
    assert (early.served, late.served) == (1, 0)  # it was not begun for the late one, who looks whether it is enough
    assert schedule.idle


def test_a_failure_is_that_of_those_it_was_begun_for_and_late_ones_try_for_themselves() -> None:
    schedule, source = Schedule[Ticket](), Pieces()
    early = want(schedule, source, 1)
    (batch,) = schedule.start()
    late = [Ticket(), Ticket()]
    for ticket, end in zip(late, (180, 190), strict=True):
        schedule.want(source, Part(1, Extent(120, end)), Rank.READ, ticket)
    assert schedule.ended(batch, ERROR) == [early]
    assert early.failures == {source: ERROR} and not late[0].failures
    (again,) = schedule.start()
    assert list(again.pieces) == [1] and again.extent == Extent(120, 190)
    assert schedule.ended(again, ERROR) == late
    assert all(ticket.failures == {source: ERROR} for ticket in late)
    assert schedule.idle


def test_nobody_tries_for_a_reader_who_left() -> None:
    schedule, source = Schedule[Ticket](), Pieces()
    early = want(schedule, source, 1)
    (batch,) = schedule.start()
    late = want(schedule, source, 1)
    early.leave()
    late.leave()
    assert schedule.waiting_for(batch) == []
    assert schedule.ended(batch, ERROR) == []
    assert schedule.idle


def test_what_is_queued_is_brought_though_its_reader_left() -> None:
    schedule, source = Schedule[Ticket](), Pieces()
    want(schedule, source, 1).leave()
    (batch,) = schedule.start()
    assert schedule.ended(batch, None) == []


def test_a_part_that_came_is_waited_for_only_where_it_is_under_way() -> None:
    schedule, source = Schedule[Ticket](), Pieces()
    here = Part(1, None)
    assert not schedule.want(source, here, Rank.READ, Ticket()) and schedule.idle
    want(schedule, source, 1)
    assert schedule.knows(source, [part(0), here])
    (batch,) = schedule.start()
    ticket = Ticket()
    assert schedule.want(source, here, Rank.READ, ticket)
    assert ticket in schedule.ended(batch, ERROR)  # it wants nothing that could be tried again
    assert not ticket.failures and not schedule.knows(source, [here])


def test_what_a_start_will_want_goes_in_the_order_of_need_over_all_sources() -> None:
    schedule, one, other = Schedule[Ticket](slots=20), Pieces(2), Pieces(2)
    for source, piece in ((one, 10), (one, 20), (other, 5), (one, 21), (one, 30), (other, 40)):
        schedule.want(source, part(piece), Rank.PACK)
    first = schedule.start()
    assert [(batch.source, list(batch.pieces)) for batch in first] == [
        (one, [10]), (one, [20, 21]), (other, [5]), (one, [30])
    ]  # fmt: skip
    assert len(first) == PACK_SLOTS and schedule.start() == []
    schedule.want(one, part(9), Rank.PACK)
    schedule.ended(first[0], None)
    assert [batch.source for batch in schedule.start()] == [other]


def test_a_gap_is_bridged_by_what_is_not_in_flight() -> None:
    schedule, source = Schedule[Ticket](), Pieces(9)
    schedule.want(source, part(6), Rank.FILL)
    (fill,) = schedule.start()
    schedule.want(source, part(2), Rank.FILL)
    for piece in (1, 3, 5, 7):
        schedule.want(source, part(piece), Rank.PACK)
    first, second = schedule.start()
    assert pieces([first, second]) == [[1, 2, 3, 4, 5], [7]]
    joined = want(schedule, source, 4)  # nobody had wanted it
    assert pieces(schedule.start()) == []
    assert schedule.ended(first, None) == [joined]
    schedule.ended(second, None)
    schedule.ended(fill, None)
    assert schedule.idle


def test_a_read_takes_along_what_a_start_will_want_behind_it() -> None:
    schedule, source = Schedule[Ticket](), Pieces()
    for piece in (3, 4, 5, 9):
        schedule.want(source, part(piece), Rank.PACK)
    reader = want(schedule, source, 3)
    started = schedule.start()
    assert pieces(started) == [[3, 4, 5], [9]]
    assert schedule.ended(started[0], None) == [reader]


def test_no_more_is_begun_for_a_start_while_many_batches_are_in_flight() -> None:
    schedule, source = Schedule[Ticket](), Pieces(1)
    for piece in range(0, 2 * PACK_SLOTS, 2):
        want(schedule, source, piece)
    reads = schedule.start()
    schedule.want(source, part(99), Rank.PACK)
    assert schedule.start() == []
    schedule.ended(reads[0], None)
    assert pieces(schedule.start()) == [[99]]


def test_what_was_wanted_for_a_start_is_dropped_unless_somebody_waits() -> None:
    schedule, source, other = Schedule[Ticket](slots=2), Pieces(1), Pieces(1)
    for piece in (1, 2, 3):
        schedule.want(source, part(piece), Rank.PACK)
    want(schedule, source, 2, Rank.PACK).leave()
    schedule.want(other, part(2), Rank.PACK)
    waits = want(schedule, source, 3, Rank.PACK)
    (flying,) = schedule.start()
    schedule.drop(source, Rank.PACK)
    schedule.ended(flying, None)
    (batch,) = schedule.start()
    assert pieces([flying, batch]) == [[1], [3]] and schedule.ended(batch, None) == [waits]
    assert [batch.source for batch in schedule.start()] == [other]


def test_clearing_wakes_those_whose_wish_was_queued() -> None:
    schedule, source = Schedule[Ticket](), Pieces()
    flying = want(schedule, source, 1)
    (batch,) = schedule.start()
    queued = want(schedule, source, 2)
    assert schedule.clear() == [queued]
    assert schedule.start() == []
    assert schedule.ended(batch, None) == [flying]


class AnyOrder(hs.RuleBasedStateMachine):
    """Against what its docstring says holds."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule: Schedule[Ticket] = Schedule(3)
        self.sources = [Pieces(2), Pieces(3)]
        self.going: list[Batch] = []
        self.asleep: dict[Ticket, None] = {}  # in the order in which they came

    @hs.rule(which=st.integers(0, 1), piece=st.integers(0, 6), rank=st.sampled_from(Rank), waits=st.booleans())
    def want(self, which: int, piece: int, rank: Rank, waits: bool) -> None:
        ticket = Ticket() if waits else None
        assert self.schedule.want(self.sources[which], part(piece), rank, ticket)
        assert self.schedule.knows(self.sources[which], [part(piece)])
        if ticket:
            self.asleep[ticket] = None

    @hs.rule()
    def start(self) -> None:
        room = 3 - len(self.going)
        batches = self.schedule.start()
        assert len(batches) <= room
        self.going += batches
        flying = [(batch.source, piece) for batch in self.going for piece in batch.pieces]
        assert len(set(flying)) == len(flying)

    @hs.precondition(lambda self: self.going)
    @hs.rule(data=st.data(), error=st.sampled_from([None, ERROR]))
    def ended(self, data: st.DataObject, error: LazyfsError | None) -> None:
        batch = self.going.pop(data.draw(st.integers(0, len(self.going) - 1)))
        woken = self.schedule.ended(batch, error)
        assert set(woken) <= set(self.asleep) and len(set(woken)) == len(woken)
        assert all((batch.source in ticket.failures) == (error is not None) for ticket in woken if not ticket.served)
        self.forget(woken)

    @hs.precondition(lambda self: self.asleep)
    @hs.rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(list(self.asleep)))
        ticket.leave()
        del self.asleep[ticket]

    def forget(self, woken: list[Ticket]) -> None:
        for ticket in woken:
            del self.asleep[ticket]

    def teardown(self) -> None:
        """In the end everybody who still waits is woken, and nothing is left."""
        while self.going or not self.schedule.idle:
            self.going += self.schedule.start()
            self.forget(self.schedule.ended(self.going.pop(0), None))
        assert not self.asleep


TestAnyOrder = AnyOrder.TestCase
