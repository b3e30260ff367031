"""records.NamedTuple is typing's, as far as it is used."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import pytest

from lazyfs import records


def pair(base: Any) -> tuple[Any, Any]:
    """Two records on `base`: one with defaults, a property and a method, one without fields that may be left out."""
    body = """
class Both(NamedTuple):
    "What it is."
    name: str
    size: int = 3
    more: tuple[str, ...] = ()

    @property
    def half(self) -> float:
        return self.size / 2

    def twice(self):
        return self._replace(size=2 * self.size)

class Bare(NamedTuple):
    one: object
"""
    space = {"NamedTuple": base, "__name__": __name__}
    exec(body, space)
    return space["Both"], space["Bare"]


OURS, THEIRS = pair(records.NamedTuple), pair(typing.NamedTuple)


@pytest.mark.parametrize("number", range(9))
def test_it_does_what_typings_does(number: int) -> None:
    def look(both: Any, bare: Any) -> object:
        record = both("a", more=("x",))
        looks: list[Callable[[], object]] = [
            lambda: tuple(record),
            lambda: (record.name, record.size, record.more, record.half, record.twice().size),
            lambda: repr(record),
            lambda: record._asdict(),
            lambda: (both._fields, both._field_defaults, both.__match_args__, both.__doc__),
            lambda: (record == ("a", 3, ("x",)), hash(record) == hash(("a", 3, ("x",))), record < both("b")),
            lambda: both._make(["n", 1, ()]),
            lambda: (bare(bare(1)).one.one, bare(one=2), hasattr(record, "__dict__")),
            lambda: tuple(both.__annotations__),
        ]
        return looks[number]()

    assert look(*OURS) == look(*THEIRS)


@pytest.mark.parametrize(
    "call",
    [
        lambda both: both(),
        lambda both: both("a", 1, (), 2),
        lambda both: both("a", name="b"),
        lambda both: both("a", other=1),
        lambda both: both("a")._replace(other=1),
        lambda both: setattr(both("a"), "name", "b"),
        lambda both: both._make(["a", 1, (), 2]),
    ],
)
def test_it_refuses_what_typings_refuses(call: Any) -> None:
    for both, _ in (OURS, THEIRS):
        with pytest.raises((TypeError, ValueError, AttributeError)):
            call(both)
