"""Making room: only what nobody uses goes, the least recently used first; killed anywhere, nothing
is broken.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lazyfs.cache import evict
from lazyfs.cache.directory import CacheDirectory
from lazyfs.errors import ImageError
from tests.cache.cachelayers import TestLayer, entry, make_layer

ROOT = Path(__file__).resolve().parents[2]


def put(store: CacheDirectory, number: int, age_s: float = 0) -> TestLayer:
    made = make_layer([50_000 + number], number)
    layer = store.create_layer(made.content_root, made.table)
    made.fill(layer)
    layer.close()
    os.utime(entry(store, made, "lock"), (time.time() - age_s, time.time() - age_s))
    return made


def put_image(store: CacheDirectory, name: str) -> Path:
    directory = Path(store.path, "indexes", name * 64)
    (directory / "groups").mkdir(parents=True)
    (directory / "lock").touch()
    (directory / "index").write_bytes(bytes(10_000))
    return directory


def test_the_least_recently_used_goes_first(store: CacheDirectory) -> None:
    layers = [put(store, number, age_s=1000 - 100 * number) for number in range(5)]
    listed = evict.entries(store)
    assert [one.name for one in listed] == [layer.content_root for layer in layers]
    assert all(one.size_bytes >= 50_000 and one.kind == "layer" and not one.in_use for one in listed)
    total = sum(one.size_bytes for one in listed)
    freed, left = evict.collect(store, total - listed[0].size_bytes - 1)
    assert freed == listed[0].size_bytes + listed[1].size_bytes and freed + left == total
    assert store.content_roots() == sorted(layer.content_root for layer in layers[2:])


def test_opening_counts_as_use(store: CacheDirectory) -> None:
    old, new = put(store, 1, 500), put(store, 2, 100)
    opened = store.open_layer(old.content_root)
    assert opened is not None
    opened.close()
    assert [one.name for one in evict.entries(store)] == [new.content_root, old.content_root]


def test_what_is_in_use_stays_and_works_on(store: CacheDirectory) -> None:
    used, free = put(store, 1), put(store, 2)
    layer = store.open_layer(used.content_root)
    assert layer is not None
    assert [one.in_use for one in evict.entries(store) if one.name == used.content_root] == [True]
    evict.collect(store, None)
    assert store.content_roots() == [used.content_root]
    assert layer.read(0, 50_001) == used.device[:50_001]
    layer.close()
    evict.collect(store, None)
    assert store.content_roots() == []
    assert store.open_layer(free.content_root) is None


def test_images_and_their_references_go_together(store: CacheDirectory) -> None:
    gone, kept = put_image(store, "a"), put_image(store, "b")
    references = Path(store.path, "refs")
    for name, text in (("1", "sha256:" + "a" * 64), ("2", "sha256:" + "b" * 64), ("3", ""), ("4", "\0" * 71)):
        (references / name).write_text(text)
    os.utime(gone / "lock", (0, 0))
    evict.collect(store, 15_000)
    assert kept.exists() and not gone.exists()
    assert sorted(os.listdir(references)) == ["2"]


def test_rubbish_is_swept_and_work_in_progress_is_not(store: CacheDirectory) -> None:
    temporary = Path(store.path, "tmp")
    for name, age_s in (("old", 7200), ("new", 10), ("removed-1-x", 0), ("old-file", 7200)):
        if "file" in name:
            (temporary / name).write_text("x")
        else:
            (temporary / name).mkdir()
            (temporary / name / "data").write_text("x")
            os.utime(temporary / name / "data", (time.time() - age_s,) * 2)
        os.utime(temporary / name, (time.time() - age_s,) * 2)
    (temporary / "writing").mkdir()
    os.utime(temporary / "writing", (0, 0))
    (temporary / "writing" / "data").write_text("still growing")
    evict.collect(store, 1 << 40)
    assert sorted(os.listdir(temporary)) == ["new", "writing"]


def test_broken_entries_are_reported_and_removed(store: CacheDirectory) -> None:
    broken, lockless, fine = (put(store, number) for number in range(3))
    os.truncate(entry(store, broken, "table"), 50)
    os.unlink(entry(store, lockless, "lock"))
    Path(store.path, "layers", "stray").write_text("x")
    with pytest.raises(ImageError):
        store.open_layer(broken.content_root)
    assert evict.verify(store) == (1, 0, [broken.content_root])
    with open(entry(store, fine, "data"), "r+b") as file:
        file.write(b"rot")
    assert evict.verify(store) == (1, 1, [broken.content_root])
    evict.collect(store, None)
    assert os.listdir(os.path.join(store.path, "layers")) == []
    assert os.listdir(os.path.join(store.path, "tmp")) == []


KILLED = """
import os, shutil, signal, sys
from lazyfs.cache import evict
from lazyfs.cache.directory import CacheDirectory
real = {"rename": os.rename, "unlink": os.unlink, "rmdir": os.rmdir}
left = int(sys.argv[2])
def counting(name):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real[name](*args, **kwargs)
    return call
for name in real:
    setattr(os, name, counting(name))
evict.collect(CacheDirectory(sys.argv[1]), None)
"""


@pytest.mark.parametrize("step", [1, 2, 3, 5, 6, 8, 11])
def test_a_killed_gc_leaves_whole_entries_or_rubbish(store: CacheDirectory, step: int) -> None:
    layers = [put(store, number) for number in range(2)]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, store.path, str(step)], env={"PYTHONPATH": str(ROOT)}, cwd=ROOT
    )
    assert process.returncode == -signal.SIGKILL
    for layer in layers:
        opened = store.open_layer(layer.content_root)
        if opened is not None:
            assert opened.read(0, 50_000) == layer.device[:50_000]
            opened.close()
    evict.collect(store, None)
    assert store.content_roots() == []
    assert os.listdir(os.path.join(store.path, "tmp")) == []
