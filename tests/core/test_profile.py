"""Profiles: their bytes, damaged in all ways, and what becomes of several starts."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.core.index.sections import compress
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.core.starts import profile as module
from lazyfs.core.starts.profile import (
    LAYERS_BYTES,
    MAX_PROFILE_BYTES,
    MAX_STARTS,
    MAX_TOUCHES,
    Profile,
    Touch,
    includes,
    layers_of,
    learn,
    merge,
)
from lazyfs.errors import ImageError

A, B, C = (ContentRoot(letter * 64) for letter in "abc")


def touch(
    block: int, at_ms: int = 0, *, layer: int = 0, starts: int = 1, path: bytes = b"", part: int = 0, length: int = 4096
) -> Touch:
    return Touch(layer, block, at_ms, starts, struct.pack("<II", layer, block), path, part, length)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    layers = draw(st.lists(st.sampled_from([A, B, C]), unique=True, min_size=1))
    starts = draw(st.integers(1, MAX_STARTS))
    number = st.integers(0, (1 << 25) - 1)
    names = st.sampled_from([b"", b"bin/sh", b"usr/lib/\xff\n", b"x" * 4096])
    touches = draw(
        st.lists(
            st.builds(
                Touch,
                st.integers(0, len(layers) - 1),
                st.integers(0, 6),
                st.integers(0, (1 << 32) - 1),
                st.integers(1, starts),
                st.binary(min_size=8, max_size=8),
                names,
                number,
                st.integers(0, 262_144),
            ),
            unique_by=lambda one: one[:2],
            max_size=12,
        )
    )
    return Profile(tuple(layers), starts, tuple(touches))


PROFILE = Profile(
    (A, B), 3, (touch(7, 0, starts=3, path=b"bin/sh", part=2), touch(1, 12, layer=1), touch(0, 900, starts=2))
)


@given(profiles())
def test_a_profile_comes_back_as_it_was(profile: Profile) -> None:
    data = profile.encode()
    assert Profile.decode(data) == profile
    assert Profile.decode(memoryview(data)).encode() == data
    assert layers_of(data[:LAYERS_BYTES]) == profile.layers


@given(st.data())
@settings(max_examples=300)
def test_damage_is_an_image_error_or_a_profile(data: st.DataObject) -> None:
    whole = PROFILE.encode()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = data.draw(
        st.sampled_from([whole[:at], whole + b"x", whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]])
    )
    try:
        found = Profile.decode(damaged)
    except ImageError:
        return
    assert at >= 24 and found.touches == PROFILE.touches  # a content root with another digit


def framed(content: bytes, layers: int = 1, *, plain_bytes: int = -1, reserved: int = 0) -> bytes:
    stored = compress(content)
    plain_bytes = len(content) if plain_bytes < 0 else plain_bytes
    head = struct.pack("<8s4I", b"LZFSPRF1", layers, len(stored), plain_bytes, reserved)
    return head + bytes.fromhex(A) * layers + stored


def plain(
    counts: tuple[int, int, int, int] = (1, 1, 1, 2),
    numbers: tuple[int, ...] = (5, 0, 0, 1, 100),
    layer: int = 0,
    starts: int = 1,
    names: bytes = b"\2\0sh",
) -> bytes:
    return struct.pack("<4I5IHB", *counts, *numbers, layer, starts) + bytes(8) + names


def test_the_form_that_is_documented() -> None:
    assert Profile.decode(framed(plain())) == Profile((A,), 1, (Touch(0, 5, 0, 1, bytes(8), b"sh", 0, 100),))
    assert Profile.decode(framed(struct.pack("<4I", 1, 0, 0, 0), layers=0)) == Profile((), 1, ())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"LZFSPRF2" + bytes(100),
        struct.pack("<8s4I", b"LZFSPRF1", 1025, 0, 0, 0) + bytes(32 * 1025),
        framed(plain(), layers=2),  # the same layer twice
        framed(plain(), layers=0),
        framed(plain(), reserved=1),
        framed(plain(), plain_bytes=(8 << 20) + 1),
        framed(plain(), plain_bytes=10),
        framed(bytes(10)),
        framed(plain((0, 1, 1, 2))),
        framed(plain((MAX_STARTS + 1, 1, 1, 2))),
        framed(struct.pack("<4I", 1, MAX_TOUCHES + 1, 0, 0) + bytes(31 * (MAX_TOUCHES + 1))),
        framed(plain((1, 1, 2, 2))),
        framed(plain((1, 1, 1, 1 << 30))),
        framed(plain() + b"x"),
        framed(plain(numbers=(64_000_000, 0, 0, 1, 100))),
        framed(plain(numbers=(5, 0, 64_000_000, 1, 100))),
        framed(plain(numbers=(5, 0, 0, 2, 100))),
        framed(plain(numbers=(5, 0, 0, 1, 262_145))),
        framed(plain(layer=1)),
        framed(plain(starts=0)),
        framed(plain(starts=2)),
        framed(plain(names=b"\1\0sh")),
        framed(plain((1, 1, 1, 0), names=b"\0\0")),
        framed(plain((1, 1, 1, 4097), names=b"\1\x10" + b"x" * 4097)),
        framed(struct.pack("<4I", 1, 2, 0, 0) + bytes(40) + bytes(4) + b"\1\1" + bytes(16)),  # a block twice
        framed(struct.pack("<4I", 1, 2, 2, 2) + struct.pack("<10I", 0, 1, *[0] * 8) + bytes(4) + b"\1\1" + bytes(16)
               + b"\1\0\1\0xx"),  # a path twice
    ],
)  # fmt: skip
def test_what_no_writer_writes_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        Profile.decode(data)


@pytest.mark.parametrize(
    "changed",
    [
        PROFILE._replace(starts=0),
        PROFILE._replace(starts=2),
        PROFILE._replace(layers=(A,)),
        PROFILE._replace(touches=PROFILE.touches + PROFILE.touches[:1]),
        PROFILE._replace(touches=(touch(1)._replace(digest=b"short"),)),
        PROFILE._replace(touches=(touch(1)._replace(at_ms=1 << 32),)),
        PROFILE._replace(touches=(touch(1, starts=300),)),
    ],
)
def test_what_could_not_be_read_is_not_written(changed: Profile) -> None:
    with pytest.raises(ValueError):
        changed.encode()


def test_the_largest_profile_fits() -> None:
    noise = random.Random(1)
    blocks = [noise.randrange(512) << 16 | n for n in range(MAX_TOUCHES)]
    touches = [touch(block, n, path=noise.randbytes(60) + b"%d" % n) for n, block in enumerate(blocks)]
    whole = merge([Profile((A,), 1, tuple(touches)), Profile((B,), 1, (touch(9, 1 << 31),))])
    data = whole.encode()
    assert len(whole.touches) == MAX_TOUCHES and len(data) < MAX_PROFILE_BYTES
    assert whole.touches[-1].path == b"" and touches[60_000].path != b""  # names went first
    assert sum(len(one.path) for one in whole.touches) <= module.MAX_PATHS_BYTES
    assert Profile.decode(data) == whole


# -- several starts ----------------------------------------------------------------------------------------


def order(profile: Profile) -> list[tuple[ContentRoot, int]]:
    return [(profile.layers[one.layer], one.block) for one in profile.touches]


def test_blocks_are_those_of_all_and_times_are_means() -> None:
    first = Profile((A,), 1, (touch(1, 0, path=b"a"), touch(2, 100)))
    second = Profile((B, A), 2, (touch(9, 10, starts=2), touch(2, 400, layer=1, starts=2)))
    both = merge([first, second])
    assert both.starts == 3
    assert {key: one[2:4] for key, one in zip(order(both), both.touches, strict=True)} == {
        (A, 1): (0, 1), (B, 9): (10, 2), (A, 2): (300, 3),
    }  # fmt: skip
    assert both.touches[0].path == b"a"


def test_what_most_starts_need_comes_before_what_few_do_and_early_before_late() -> None:
    often = Profile((A,), 9, (touch(1, 10, starts=9), touch(2, 500, starts=9), touch(3, 5000, starts=9)))
    seldom = Profile((A,), 1, (touch(7, 5), touch(8, 480), touch(9, 5000)))
    assert [block for _, block in order(merge([often, seldom]))] == [1, 7, 2, 8, 3, 9]
    seldom = Profile((A,), 1, (touch(8, 100),))
    assert [block for _, block in order(merge([often, seldom]))] == [1, 2, 8, 3]  # as if touched after 1000 ms


@given(st.lists(profiles(), min_size=1, max_size=4), st.randoms())
def test_merging_does_not_depend_on_the_order_of_what_is_merged(
    some: list[Profile], chance: random.Random
) -> None:
    shuffled = list(some)
    chance.shuffle(shuffled)
    one, other = merge(some), merge(shuffled)
    assert [touch[1:4] for touch in one.touches] == [touch[1:4] for touch in other.touches]
    assert order(one) == order(other) and one.starts == other.starts <= MAX_STARTS
    assert Profile.decode(one.encode()) == one
    if sum(profile.starts for profile in some) <= MAX_STARTS:
        assert set(order(one)) == {key for profile in some for key in order(profile)}


@given(profiles(), profiles())
def test_a_merged_profile_includes_what_it_was_made_of(one: Profile, other: Profile) -> None:
    both = merge([one, other])
    if one.starts + other.starts <= MAX_STARTS:
        assert includes(both, one) and includes(both, other) and not includes(one, both)
    assert not includes(one, one), "two hosts may have seen the same"


def test_a_profile_of_other_starts_is_not_included() -> None:
    known = Profile((A,), 2, (touch(1, starts=2), touch(2)))
    assert includes(known, Profile((A,), 1, (touch(2), touch(1))))
    assert not includes(known, Profile((A,), 1, (touch(1), touch(3))))
    assert not includes(known, Profile((B,), 1, (touch(1),)))
    assert not includes(known, Profile((A,), 2, (touch(1, starts=2), touch(2, starts=2))))
    assert not includes(known, Profile((A,), 3, (touch(1, starts=2),)))


def test_old_starts_are_forgotten_slowly() -> None:
    known = merge([Profile((A,), 1, (touch(1, starts=1), touch(5)))])
    for _ in range(3 * MAX_STARTS):
        known = learn(known, Profile((A,), 1, (touch(1), touch(2, 40))))
    assert known.starts <= MAX_STARTS
    assert [(one.block, one.starts) for one in known.touches] == [(1, known.starts), (2, known.starts)]


def test_a_start_that_was_seen_in_part_does_not_make_others_rare() -> None:
    usual = [touch(block, block) for block in range(10)]
    known = merge([Profile((A,), 1, tuple(usual))] * 3)
    warm = Profile((B, A), 1, (touch(3, 1), touch(4, 2, layer=1)))
    for start, partial in ((warm, False), (warm, True), (Profile((A,), 1, tuple(usual[:9])), True)):
        after = learn(known, start, partial=partial)
        counts = {key: one.starts for key, one in zip(order(after), after.touches, strict=True)}
        assert after.starts == 3 and all(counts[A, block] == 3 for block in range(10))
        assert counts.get((B, 3)) == (1 if start is warm else None)
    after = learn(known, Profile((A,), 1, tuple(usual[:6])))
    assert (after.starts, [one.starts for one in after.touches]) == (4, [4] * 6 + [3] * 4)


def test_the_first_start_is_what_is_known() -> None:
    start = Profile((A,), 1, (touch(5, 0), touch(2, 0), touch(3, 9)))
    assert learn(None, start) == start


def test_a_profile_without_paths() -> None:
    bare = PROFILE.without_paths()
    assert [one.path for one in bare.touches] == [b""] * 3 and order(bare) == order(PROFILE)
    assert len(bare.encode()) < len(PROFILE.encode())
