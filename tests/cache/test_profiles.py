"""Profiles in the cache: several processes add to one, damage counts as none, and they outlive what they tell of."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lazyfs.cache import evict, profiles
from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.profiles import keep_profile, load_profile, profiles_with
from lazyfs.core.oci.digests import ContentRoot, Digest
from lazyfs.core.starts.profile import Profile, Touch
from tests.cache.test_evict import put, put_image

A, B, C = (ContentRoot(letter * 64) for letter in "abc")


def image(number: int) -> Digest:
    return Digest(f"sha256:{number:064x}")


def start(*blocks: int, layers: tuple[ContentRoot, ...] = (A,)) -> Profile:
    touches = [Touch(0, block, 10 * at, 1, bytes(8), b"bin/sh", at, 4096) for at, block in enumerate(blocks)]
    touches += [Touch(number, 0, 500, 1, bytes(8), b"", 0) for number in range(1, len(layers))]
    return Profile(layers, 1, tuple(touches))


def folder(store: CacheDirectory) -> Path:
    return Path(store.profile_path(image(1))).parent


def test_starts_are_merged(store: CacheDirectory) -> None:
    assert load_profile(store, image(1)) is None
    assert keep_profile(store, image(1), "localhost/app:1", start(5, 3)) == start(5, 3)
    both = keep_profile(store, image(1), "localhost/app:1", start(5, 9))
    assert [(one.block, one.starts) for one in both.touches] == [(5, 2), (3, 1), (9, 1)]
    again = keep_profile(store, image(1), "localhost/app:1", start(7), partial=True)
    assert again.starts == 2 and load_profile(CacheDirectory(store.path), image(1)) == again
    assert load_profile(store, image(2)) is None


def test_starts_that_end_at_once_are_all_kept(store: CacheDirectory) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: keep_profile(store, image(1), "app", start(1, 2, 3, 100 + n)), range(24)))
    found = load_profile(store, image(1))
    assert found is not None and found.starts == 24
    assert {one.block: one.starts for one in found.touches} == {1: 24, 2: 24, 3: 24, **{100 + n: 1 for n in range(24)}}


def test_a_process_that_never_lets_go_delays_and_stops_nobody(
    store: CacheDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "_LOCK_S", 0.05)
    with profiles._alone(store):
        assert keep_profile(store, image(1), "app", start(1)) == start(1)


@pytest.mark.parametrize("content", [b"", b"\n", b"app", b"app\nLZFSPRF1", b"app\nLZFSPRF9" + bytes(200), b"\0" * 5000])
def test_a_damaged_one_counts_as_none_and_is_replaced(store: CacheDirectory, content: bytes) -> None:
    keep_profile(store, image(1), "app", start(1))
    path = store.profile_path(image(2))
    Path(path).write_bytes(content)
    assert load_profile(store, image(2)) is None
    assert profiles_with(store, [A], "") == [start(1)]
    evict.collect(store, 1 << 40)
    assert not os.path.exists(path) and load_profile(store, image(1)) == start(1)
    Path(path).write_bytes(content)
    assert keep_profile(store, image(2), "app", start(4)) == load_profile(store, image(2)) == start(4)


def test_whatever_lies_in_its_place_is_passed_over(store: CacheDirectory) -> None:
    os.mkfifo(store.profile_path(image(1)))
    os.mkdir(store.profile_path(image(2)))
    os.symlink("/dev/zero", store.profile_path(image(3)))
    with open(store.profile_path(image(4)), "wb") as file:
        file.truncate(1 << 33)
    assert [load_profile(store, image(number)) for number in range(1, 5)] == [None] * 4
    assert profiles_with(store, [A], "x") == []
    evict.collect(store, None)
    assert os.listdir(folder(store)) == [] == os.listdir(store.tmp)


def test_similar_images_are_found(store: CacheDirectory) -> None:
    for number, (reference, made) in enumerate(
        [
            ("docker.io/library/app:1", start(1)),
            ("docker.io/library/app@" + image(7), start(2, layers=(B,))),
            ("docker.io/library/other:1", start(3, layers=(A, B))),
            ("docker.io/library/third:1", start(4, layers=(A, C))),
            ("oci:/srv/layout:app", start(5, layers=(C,))),
        ],
        1,
    ):
        keep_profile(store, image(number), reference, made)
        os.utime(store.profile_path(image(number)), (number, number))
    repository = "docker.io/library/app"

    def found(*roots: ContentRoot, repository: str = repository, but: Digest | None = None) -> list[int]:
        return [one.touches[0].block for one in profiles_with(store, roots, repository, but=but)]

    assert found() == [2, 1]
    assert found(A, B) == [2, 1, 3, 4]
    assert found(A, B, but=image(2)) == [1, 3, 4]
    assert found(C, repository="docker.io/library/new") == [5, 4]
    assert found(repository="oci:/srv/layout") == [5]


def test_there_are_not_too_many(store: CacheDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "MAX_PROFILES", 3)
    for number in range(6):
        keep_profile(store, image(number), "app", start(number))
        os.utime(store.profile_path(image(number)), (1000 + number,) * 2)
    assert [load_profile(store, image(number)) is not None for number in range(6)] == [False] * 3 + [True] * 3
    monkeypatch.setattr(profiles, "MAX_ALL_BYTES", os.stat(store.profile_path(image(5))).st_size + 10)
    keep_profile(store, image(5), "app", start(5))
    assert len(os.listdir(folder(store))) == 1


def test_they_outlive_the_image_and_go_last(store: CacheDirectory) -> None:
    keep_profile(store, image(1), "app", start(1))
    os.utime(store.profile_path(image(1)), (0, 0))
    put(store, 1)
    put_image(store, "a")
    (listed,) = [one for one in evict.entries(store) if one.kind == "profile"]
    assert (listed.name, listed.in_use) == (image(1)[7:], False) and listed.size_bytes > 0
    freed, left = evict.collect(store, None)
    assert freed > 50_000 and left == listed.size_bytes
    assert load_profile(store, image(1)) == start(1)
    new = put(store, 1)
    evict.collect(store, listed.size_bytes)
    assert store.content_roots() == [] and load_profile(store, image(1)) == start(1)
    opened = store.create_layer(new.content_root, new.table)
    freed, left = evict.collect(store, 1)
    assert freed == listed.size_bytes and load_profile(store, image(1)) is None
    assert store.content_roots() == [new.content_root]
    opened.close()


def test_a_usual_one_is_small(store: CacheDirectory) -> None:
    touches = (Touch(0, n, n, 1, os.urandom(8), b"usr/lib/%d.so" % n, 0, 4096) for n in range(2000))
    keep_profile(store, image(1), "app", Profile((A,), 1, tuple(touches)))
    assert os.stat(store.profile_path(image(1))).st_size < 50_000
