"""When playing what is known stops, and when a pack is worth pushing."""

from __future__ import annotations

import pytest

from lazyfs.core.oci.digests import ContentRoot
from lazyfs.core.starts.matching import Block
from lazyfs.core.starts.profile import Profile, Touch
from lazyfs.serving.foresight import MIN_TOUCHED, is_another
from lazyfs.serving.learning import LACKING_BYTES, is_clearly_better

A, B = ContentRoot("a" * 64), ContentRoot("b" * 64)
FORESEEN: list[Block] = [(1, block) for block in range(1000)]


@pytest.mark.parametrize(
    ("right", "wrong", "elsewhere", "another"),
    [
        (0, 0, 0, False),
        (MIN_TOUCHED, 0, 0, False),
        (0, MIN_TOUCHED - 1, 0, False),  # too early to say
        (0, MIN_TOUCHED, 0, True),
        (MIN_TOUCHED, MIN_TOUCHED, 0, False),
        (MIN_TOUCHED, MIN_TOUCHED + 1, 0, True),
        (MIN_TOUCHED, 0, 10 * MIN_TOUCHED, False),  # of layers of which nothing is known
    ],
)
def test_a_start_is_another_one_if_most_of_what_it_touches_was_not_foreseen(
    right: int, wrong: int, elsewhere: int, another: bool
) -> None:
    touched = [(1, block) for block in (*range(right), *range(5000, 5000 + wrong))]
    assert is_another(FORESEEN, [*touched, *((0, block) for block in range(elsewhere))]) is another


def profile(root: ContentRoot, *blocks: int, length: int = 100_000) -> Profile:
    touches = (Touch(0, block, number, 1, bytes(8), b"", 0, length) for number, block in enumerate(blocks))
    return Profile((root,), 1, tuple(touches))


def test_a_pack_is_clearly_worse_if_it_lacks_much_of_a_start() -> None:
    start = profile(A, *range(100))
    assert is_clearly_better(start, None)
    assert is_clearly_better(start, profile(B, *range(100)))
    assert not is_clearly_better(start, start)
    assert not is_clearly_better(start, profile(A, *range(200)))  # that has too much is not lacking
    assert not is_clearly_better(start, profile(A, *range(90)))
    assert is_clearly_better(start, profile(A, *range(89)))


def test_a_little_that_is_lacking_is_not_worth_a_push() -> None:
    small = profile(A, *range(10), length=LACKING_BYTES // 11)
    assert not is_clearly_better(small, profile(A, 99))
    assert is_clearly_better(profile(A, *range(12), length=LACKING_BYTES // 11), profile(A, 99))
