"""Fixtures of the tests of the client: an EROFS image, stand-in daemons that hand it out, two targets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazyfs.mounting import launch
from lazyfs.mounting.attach import Mounted
from lazyfs.mounting.mount import mount as mount_image
from lazyfs.mounting.options import parse
from lazyfs.system.mountapi import MNT_DETACH, umount2
from lazyfs.system.mountinfo import mount_at
from tests.mounting.standin import FAKE, Mount


@pytest.fixture(scope="module")
def erofs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small EROFS image, made by the ordinary tool."""
    base = tmp_path_factory.mktemp("erofs")
    tree = base / "tree"
    tree.mkdir(mode=0o751)
    (tree / "file").write_text("from the image\n")
    (tree / "script").write_text("#!/bin/sh\nexit 7\n")
    (tree / "script").chmod(0o4755)
    os.mknod(tree / "null", 0o20666, os.makedev(1, 3))
    os.chown(tree, 12, 34)
    os.setxattr(tree, "user.note", b"root")
    os.utime(tree, (1_000_000_000, 1_000_000_000))
    subprocess.run(
        ["mkfs.erofs", "-T1000000000", str(base / "image"), str(tree)], check=True, capture_output=True
    )
    return base / "image"


@pytest.fixture
def fake(cache: Path, erofs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache directory of stand-in daemons, which mounts start as they would start the real ones."""
    (cache / "indexes/fake").mkdir(parents=True)
    shutil.copy(erofs, cache / "indexes/fake/namespace.erofs")
    monkeypatch.setattr(launch, "python_command", lambda *words: [sys.executable, "-P", str(FAKE), *words])
    return cache


@pytest.fixture
def mount(fake: Path, target: Path) -> Mount:
    def run(image: str = "indexed", options: str = "", place: Path = target, **more: Any) -> Mounted:
        return mount_image(image, str(place), parse([f"cache={fake}", options]), **more)

    return run


@pytest.fixture
def second(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "second"
    place.mkdir()
    yield place
    while mount_at(str(place)) is not None:
        umount2(str(place), MNT_DETACH)
