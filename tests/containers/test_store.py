"""Containers as records: names, who holds them, and what is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lazyfs.containers.bundle import MountedImage
from lazyfs.containers.store import RECORD, VERSION, ContainerStore, read_record
from lazyfs.core.oci.documents import parse_config
from lazyfs.errors import HostError, UserError

CONFIG = b'{"os":"linux","architecture":"arm","variant":"v7","rootfs":{"type":"layers","diff_ids":[]}}'
IMAGE = MountedImage(parse_config(CONFIG), "sha256:" + "cd" * 32, "registry.example/app:1")


@pytest.fixture
def store(tmp_path: Path) -> ContainerStore:
    return ContainerStore(str(tmp_path / "containers"))


def kept(store: ContainerStore, name: str) -> Path:
    with store.create(name) as claim:
        claim.record(IMAGE, keep=True)
    return Path(store.directory, name)


def test_a_record_comes_back_as_it_was(store: ContainerStore) -> None:
    with store.create("one") as claim:
        container = claim.record(IMAGE, keep=True)
        assert container.platform == "linux/arm/v7" and container.image == "registry.example/app:1"
        assert [(one.container, one.held) for one in store.listing()] == [(container, True)]
    assert read_record(claim.directory) == container
    with store.open("one") as again:
        assert read_record(again.directory) == container


def test_the_record_does_not_depend_on_its_place(store: ContainerStore) -> None:
    directory = kept(store, "one")
    moved = directory.rename(directory.parent / "moved")
    container = read_record(str(moved))
    assert container is not None and container.directory == str(moved)


def test_a_name_is_held_once(store: ContainerStore) -> None:
    with store.create("one"), pytest.raises(UserError, match="running"):
        store.create("one")
    with store.create("two") as claim:
        claim.record(IMAGE, keep=True)
        with pytest.raises(UserError, match="in use"):
            store.remove("two")
    with pytest.raises(UserError, match="already"):
        store.create("two")


@pytest.mark.parametrize("recorded", [False, True])
def test_a_killed_process_holds_nothing(store: ContainerStore, recorded: bool) -> None:
    code = (
        "import os, sys; from tests.containers.test_store import *\n"
        "claim = ContainerStore(sys.argv[1]).create('one')\n"
        f"{recorded} and claim.record(IMAGE, keep=False)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, store.directory], cwd=Path(__file__).parents[2], timeout=60)
    [listed] = store.listing()
    assert not listed.held and (listed.container is not None) == recorded
    with store.create("one") as claim:
        claim.clear(keep_itself=True)
        assert list(Path(claim.directory).iterdir()) == []


def test_what_cannot_be_understood_is_kept(store: ContainerStore) -> None:
    """A newer version's record, a damaged one, and a bundle of a version that had none."""
    record = kept(store, "newer") / RECORD
    record.write_text(json.dumps({**json.loads(record.read_text()), "version": VERSION + 1}))
    (kept(store, "damaged") / RECORD).write_text("{")
    old = kept(store, "older")
    (old / RECORD).unlink()
    (old / "config.json").write_text("{}")
    for name in ("newer", "damaged", "older"):
        with pytest.raises(UserError, match="already"):
            store.create(name)
    assert [one.name for one in store.listing() if one.container is None] == ["damaged", "newer", "older"]
    for name in ("newer", "damaged"):
        with pytest.raises(HostError, match=name):
            read_record(str(Path(store.directory, name)))
        store.remove(name)
    assert [one.name for one in store.listing()] == ["older"]


def test_what_is_not_there(store: ContainerStore) -> None:
    assert store.listing() == []
    with pytest.raises(UserError, match="no container"):
        store.open("one")
    with pytest.raises(UserError, match="name"):
        store.open("../one")
    first, second = store.create(), store.create()
    assert first.name != second.name
    first.release()
    first.release()
    second.release()


def test_links_are_not_followed(store: ContainerStore, tmp_path: Path) -> None:
    kept(store, "one")
    (tmp_path / "containers" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="no container"):
        store.open("link")
    assert [one.name for one in store.listing()] == ["one"]
