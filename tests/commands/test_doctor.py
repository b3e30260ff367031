"""What doctor says about the inflater for indexing, which falls back in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazyfs.commands import doctor
from lazyfs.decoding import zstream


def _check(cache: Path) -> doctor.Check:
    [check] = [check for check in doctor.examine(str(cache)) if check.name == "library zlib-ng"]
    return check


def test_a_usable_zlib_ng_is_fine(tmp_path: Path) -> None:
    assert _check(tmp_path / "cache").status == "ok"


def test_a_zlib_ng_that_hides_its_functions_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zstream, "zlib_ng", lambda: None)
    check = _check(tmp_path / "cache")
    assert check.status == "warn" and "hides" in check.finding and "half the speed" in check.finding and check.advice
