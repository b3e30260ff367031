"""Mounts from a stand-in daemon (tests/fakedaemon.py): what tests of the client share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lazyfs.mounting.attach import Mounted
from lazyfs.system.mountinfo import mount_at

FAKE = Path(__file__).resolve().parents[1] / "fakedaemon.py"

Mount = Callable[..., Mounted]


def said(cache: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (cache / "said").read_text().splitlines()]


def attributes(target: Path) -> set[str]:
    entry = mount_at(str(target))
    assert entry is not None
    return set(entry.options) & {"ro", "rw", "nodev", "nosuid", "noexec"}


def uppers(cache: Path) -> list[Path]:
    return list((cache / "uppers").glob("*"))
