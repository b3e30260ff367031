"""lightjson says and hears what json does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core import lightjson

TEXTS = st.text(st.characters(exclude_categories=[]))  # with lone surrogates: file names that are not UTF-8
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=20)


@given(VALUES)
def test_both_ways_as_json(value: Any) -> None:
    text = lightjson.dumps(value)
    assert text == json.dumps(value, separators=(",", ":"), allow_nan=False)
    assert lightjson.loads(text) == json.loads(text) == value
    assert lightjson.loads(f" \n{json.dumps(value, indent=2)}\t\r\n") == value


def test_tuples_are_lists() -> None:
    assert lightjson.dumps({"a": (1, 2)}) == '{"a":[1,2]}'


@given(st.text(st.sampled_from('{}[]":,0123456789.eE+- \\untrfals'), max_size=12))
def test_what_json_refuses_is_refused(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError):
            lightjson.loads(text)
    else:
        assert lightjson.loads(text) == expected


@pytest.mark.parametrize("text", ["", " ", "NaN", "[Infinity]", "-Infinity", "1 2", '{"a":1}x', "\x0b1", '"\n"'])
def test_refused_texts(text: str) -> None:
    with pytest.raises(ValueError):
        lightjson.loads(text)


def test_a_key_that_is_named_twice_can_be_refused() -> None:
    assert lightjson.loads('{"a":1,"a":2}') == {"a": 2}
    assert lightjson.loads('[{"a":1},{"a":2,"b":{"a":3}}]', unique_keys=True) == [{"a": 1}, {"a": 2, "b": {"a": 3}}]
    with pytest.raises(ValueError):
        lightjson.loads('[{"b":{"a":1,"a":1}}]', unique_keys=True)


def test_deep_nesting_is_an_error_and_no_crash() -> None:
    with pytest.raises(RecursionError):
        lightjson.loads("[" * 1_000_000)
    deep: list[Any] = []
    for _ in range(1000):
        deep = [deep]
    with pytest.raises(ValueError):
        lightjson.dumps(deep)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, b"x", object()])
def test_refused_values(value: object) -> None:
    with pytest.raises(ValueError):
        lightjson.dumps(value)
