"""The same failure is logged once in a while, others at once; what is remembered of them is bounded."""

from __future__ import annotations

from lazyfs.fuse.repeats import RepeatFilter


def test_the_same_text_comes_through_once() -> None:
    failures = RepeatFilter(3600.0)
    assert [failures.is_new(text) for text in ("disk", "disk", "network", "disk", "network")] == [
        True, False, True, False, False
    ]  # fmt: skip


def test_it_comes_through_again_after_the_pause() -> None:
    failures = RepeatFilter(0.0)
    assert all(failures.is_new("disk") for _ in range(3))


def test_many_texts_are_forgotten_together() -> None:
    failures = RepeatFilter(3600.0)
    assert all(failures.is_new(str(number)) for number in range(1000))
    assert not failures.is_new("999") and failures.is_new("0")
