"""Upper directories: held by a process or by the kernel they stay, otherwise they go, whoever was killed when."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.cache import evict, uppers
from lazyfs.cache.directory import CacheDirectory
from lazyfs.errors import UserError
from lazyfs.system.detached import overlay_mount_detached
from lazyfs.system.mountapi import open_tree_clone

ROOT = Path(__file__).resolve().parents[2]
DIGEST = "sha256:" + "ab" * 32


@contextlib.contextmanager
def overlay(upper: uppers.Upper, lower: Path) -> Iterator[int]:
    """A living overlay that is attached nowhere, so in nobody's mount table."""
    lower.mkdir()
    lower_fd = open_tree_clone(str(lower))
    fd = overlay_mount_detached(lower_fd, upper.upper, upper.work, ("index=off", "volatile"))
    os.close(lower_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def names(store: CacheDirectory) -> list[str]:
    return os.listdir(os.path.join(store.path, "uppers"))


def test_a_record_says_what_it_is_for(store: CacheDirectory) -> None:
    upper = uppers.make(store.path, "debian:12", DIGEST)
    (record,) = uppers.records(store.path)
    assert record == uppers.Record(upper.path, "debian:12", DIGEST, record.made_at_s, held=True)
    upper.close()
    assert [one.held for one in uppers.records(store.path)] == [False]
    assert os.listdir(upper.upper) == [] and os.stat(upper.path).st_mode & 0o777 == 0o700


def test_what_is_discarded_is_gone(store: CacheDirectory) -> None:
    upper = uppers.make(store.path, "a", DIGEST)
    Path(upper.upper, "file").write_text("x")
    upper.discard()
    assert names(store) == [] and os.listdir(os.path.join(store.path, "tmp")) == []


def test_who_holds_it_keeps_it(store: CacheDirectory) -> None:
    upper = uppers.make(store.path, "a", DIGEST)
    held = uppers.HeldUppers(store.path)
    held.hold(upper.path)
    upper.close()
    uppers.sweep(store.path)
    assert not uppers.remove(store.path, upper.path) and len(names(store)) == 1
    held.release(upper.path)
    uppers.sweep(store.path)
    assert names(store) == []
    with pytest.raises(UserError):
        held.hold(upper.path)


def test_only_upper_directories_of_the_cache_are_held(store: CacheDirectory, tmp_path: Path) -> None:
    uppers.make(store.path, "a", DIGEST).discard()
    for path in (tmp_path / "elsewhere", Path(store.path, "layers"), Path(store.path, "uppers/../layers")):
        path.mkdir(exist_ok=True)
        with pytest.raises(UserError):
            uppers.HeldUppers(store.path).hold(str(path))


def test_the_kernel_keeps_it_when_every_process_was_killed(store: CacheDirectory, tmp_path: Path) -> None:
    upper = uppers.make(store.path, "a", DIGEST)
    with overlay(upper, tmp_path / "lower") as fd:
        upper.close()
        uppers.sweep(store.path)
        assert [record.held for record in uppers.records(store.path)] == [True]
        Path(f"/proc/self/fd/{fd}/file").write_text("still written")
        assert Path(upper.upper, "file").read_text() == "still written"
    uppers.sweep(store.path)
    assert names(store) == []


def test_a_maker_that_was_killed_leaves_what_is_swept(store: CacheDirectory) -> None:
    code = "import os, sys; from lazyfs.cache import uppers; uppers.make(sys.argv[1], 'a', 'b'); os._exit(1)"
    subprocess.run([sys.executable, "-c", code, store.path], cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert len(names(store)) == 1
    uppers.sweep(store.path)
    assert names(store) == []


def test_one_without_record_and_lock_goes_too(store: CacheDirectory) -> None:
    """As earlier versions made them."""
    old = Path(store.path, "uppers/0123")
    (old / "upper").mkdir(parents=True)
    assert [(one.image, one.held) for one in uppers.records(store.path)] == [("", False)]
    uppers.sweep(store.path)
    assert not old.exists()


def test_du_and_gc_see_them(store: CacheDirectory) -> None:
    left, used = uppers.make(store.path, "a", DIGEST), uppers.make(store.path, "b", DIGEST)
    for upper in (left, used):
        Path(upper.upper, "file").write_bytes(bytes(100_000))
    left.close()
    listed = {entry.path: entry for entry in evict.entries(store)}
    assert {path: (entry.kind, entry.in_use) for path, entry in listed.items()} == {
        left.path: ("upper", False),
        used.path: ("upper", True),
    }
    assert all(100_000 <= entry.size_bytes < 200_000 for entry in listed.values())
    freed, remaining = evict.collect(store, 1 << 40)  # though there is room
    assert freed == listed[left.path].size_bytes and remaining >= 100_000
    assert not os.path.exists(left.path) and os.path.exists(used.path)
    used.discard()
