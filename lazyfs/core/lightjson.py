"""`json` for a few short lines: its C half alone. The module around it takes 8 ms to import, with re and enum.

For what a light start reads and writes: messages to the daemon, an image's configuration, a container's. All else takes
`json`, which tests compare this with.
"""

from __future__ import annotations

from _json import encode_basestring_ascii, make_scanner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_DEPTH = 100
_INFINITY = float("inf")


def dumps(value: object, depth: int = 0) -> str:
    """As json.dumps with separators=(",", ":") and allow_nan=False, keys being texts. Raises ValueError."""
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        if not -_INFINITY < value < _INFINITY:  # false for nan, too
            raise ValueError(f"{value} is not JSON")
        return float.__repr__(value)
    if depth > MAX_DEPTH:
        raise ValueError("a message is nested too deep")
    if isinstance(value, dict):
        return "{" + ",".join(f"{dumps(_key(k))}:{dumps(v, depth + 1)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(dumps(one, depth + 1) for one in value) + "]"
    raise ValueError(f"{type(value).__name__} is not JSON")


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise ValueError("a key is not a text")
    return key


class _Strict:
    """What the scanner asks for: RFC 8259, so no NaN and no Infinity."""

    strict = True
    object_hook: Any = None
    object_pairs_hook: Any = None
    parse_float = float
    parse_int = int

    @staticmethod
    def parse_constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")


class _Unique(_Strict):
    @staticmethod
    def object_pairs_hook(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is named twice")
        return found


_scan: Callable[[str, int], tuple[Any, int]] = make_scanner(_Strict)  # type: ignore[arg-type]
_scan_unique: Callable[[str, int], tuple[Any, int]] = make_scanner(_Unique)  # type: ignore[arg-type]


def loads(text: str, unique_keys: bool = False) -> Any:
    """As json.loads, constants refused, and with `unique_keys` objects that name one twice. Raises ValueError,
    RecursionError."""
    begin = len(text) - len(text.lstrip(" \t\n\r"))
    try:
        value, end = (_scan_unique if unique_keys else _scan)(text, begin)
    except StopIteration:
        raise ValueError("no JSON") from None
    if text[end:].strip(" \t\n\r"):
        raise ValueError("something follows the JSON")
    return value
