"""Parts of blocks, until they are whole."""

from __future__ import annotations

from pathlib import Path

from lazyfs.cache.directory import CacheDirectory
from lazyfs.core.layer.spans import Span
from lazyfs.serving.assemble import Fragments
from tests.serving.rig import LAYER


def test_fragments_know_what_they_lack(tmp_path: Path) -> None:
    layer = CacheDirectory(str(tmp_path)).create_layer(LAYER.content_root, LAYER.table)
    table = layer.table
    block = 0
    start, length = table.tar_offsets[block], table.lengths[block]
    whole = LAYER.content(block)
    before = Span(0, 0, 1, 0, start + 1000, 0, None)  # it ends in the block
    behind = Span(1, 1, 2, start + 1000, start + length + 500, 0, None)
    fragments = Fragments(layer)
    assert fragments.lacks_from(block, before) == start
    assert fragments.add(block, 0, whole[:600]) is None
    assert fragments.lacks_from(block, before) == start + 600
    assert fragments.add(block, 600, whole[600:1000]) is None
    assert fragments.lacks_from(block, before) is None
    assert fragments.lacks_from(block, behind) == start + 1000
    for at in range(1000, length, 300):
        assert fragments.lacks_from(block, behind) == start + at
        done = fragments.add(block, at, whole[at : at + 300])
    assert done == whole
    assert fragments.add(block, 0, b"x" * 5) is None  # anew, from another decoder: what it says is taken
    fragments.forget(block)
    assert fragments.lacks_from(block, before) == start
    for other in range(1, table.count):
        fragments.add(other, 0, b"x")
    layer.close()
