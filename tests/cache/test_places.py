"""docs/FORMATS.md shows the cache directory as it is: its tree and the declared names are compared."""

from __future__ import annotations

import re
from pathlib import Path

from lazyfs.cache import layer, places, uppers

FORMATS = Path(__file__).parents[2] / "docs/FORMATS.md"
NAMES = ("VERSION", "LAYERS", "INDEXES", "SCANS", "PROFILES", "REFS", "UPPERS", "TMP")
DIRECTLY = {getattr(places, name) for name in NAMES}
FILES = {
    places.LAYERS: {layer.TABLE, layer.DATA, layer.PRESENT, layer.SEAL, places.LOCK},
    places.UPPERS: {uppers.RECORD, uppers.UPPER, uppers.WORK, uppers.PROBE, places.LOCK},
}


def documented() -> dict[str, set[str]]:
    """Names directly in the cache directory, with the names in an entry of each, from the drawn tree."""
    drawn = re.search(r"## Cache directory\n\n((?:    .*\n)+)", FORMATS.read_text())
    assert drawn is not None
    tree: dict[str, set[str]] = {}
    current = ""
    for line in drawn[1].splitlines():
        if found := re.match(r"    (\w+)(?:/(?:<[^>]*>)?(?:/(\S+))?)?(?: |$)", line):
            current = found[1]
            tree[current] = {found[2]} if found[2] else set()
        elif found := re.match(r"\s+/(\S+)", line):
            tree[current].add(found[1])
    return tree


def test_formats_shows_all_names_that_are_declared() -> None:
    tree = documented()
    assert set(tree) == DIRECTLY
    assert {name: tree[name] for name in FILES} == FILES
    assert places.NAMESPACE in tree[places.INDEXES]
