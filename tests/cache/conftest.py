"""An empty cache directory for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazyfs.cache.directory import CacheDirectory


@pytest.fixture
def store(tmp_path: Path) -> CacheDirectory:
    return CacheDirectory(str(tmp_path / "store"))
