"""An empty cache directory for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazyfs.cache.directory import BlockCache


@pytest.fixture
def store(tmp_path: Path) -> BlockCache:
    return BlockCache(str(tmp_path / "store"))
