"""What a worker tells its successor, also across an upgrade of lazyfs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

from lazyfs.control.requests import Attached
from lazyfs.core.oci.digests import ContentRoot, Digest
from lazyfs.daemon import state
from lazyfs.daemon.state import ReleasedLayer, SavedRoot, State
from lazyfs.sources.access import Access

DIGEST = Digest("sha256:" + "ab" * 32)
ONE, OTHER = ContentRoot("cd"), ContentRoot("ef")
RELEASED = ContentRoot("01")
ACCESS = Access("linux/arm64", "never", True, ("/ca",), ("/auth",), {"HOME": "/root"})


class Keeper:
    """What is held, without a process that holds it."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}

    def hold(self, name: str, fd: int) -> None:
        if name in self.held:
            os.close(self.held[name])
        self.held[name] = fd


@pytest.fixture
def link() -> Iterator[Keeper]:
    made = Keeper()
    yield made
    for fd in made.held.values():
        os.close(fd)


def put(link: Keeper, text: str) -> None:
    """As another version may have left it."""
    state.save(link, State([], []))
    fd = link.held["state"]
    os.ftruncate(fd, 0)
    os.pwrite(fd, text.encode(), 0)


def test_what_is_saved_is_loaded(link: Keeper) -> None:
    targets = [Attached((0, 41), "/t", "/c/uppers/x", (0, 40)), Attached((0, 40), "/u")]
    layers = [(ONE, 4096), (OTHER, 1)]
    root = SavedRoot("debian:12", DIGEST, ACCESS, 5.0, targets, ["a hold"], frozenset({ONE}), layers)
    saved = State([root], [ReleasedLayer(RELEASED, 512, DIGEST, "debian:12", ACCESS, 5.0)])
    state.save(link, saved)
    assert state.load(link) == saved
    assert [one.content_root for one in root.released()] == [ONE, OTHER]


def test_without_a_predecessor_there_is_nothing(link: Keeper) -> None:
    assert state.load(link) == State([], [])


def test_an_upgrade_takes_up_what_a_daemon_without_versions_served(link: Keeper) -> None:
    options = {
        "offline": True, "insecure": True, "timeout_s": 5.0, "platform": "linux/arm64",
        "ca_files": ["/ca"], "auth_files": ["/auth"], "push_index": False,
    }  # fmt: skip
    how = {"options": options, "home": {"HOME": "/root"}}
    target = {"dev": "0:41", "target": "/t", "ephemeral_upper": None, "image_dev": "0:40"}
    root = {"image": "a", "manifest_digest": DIGEST, "targets": [target], "direct": ["cd"], "layers": [["cd", 1]]} | how
    released = {"content_root": "01", "size_bytes": 512, "manifest_digest": DIGEST, "image": "a"} | how
    put(link, json.dumps({"roots": [root], "released": [released]}))
    assert state.load(link) == State(
        [
            SavedRoot(
                "a", DIGEST, ACCESS, 5.0, [Attached((0, 41), "/t", None, (0, 40))], [], frozenset({ONE}), [(ONE, 1)]
            )
        ],
        [ReleasedLayer(RELEASED, 512, DIGEST, "a", ACCESS, 5.0)],
    )


def test_what_is_not_understood_costs_nothing_else(link: Keeper) -> None:
    """As after a downgrade."""
    root = SavedRoot("a", DIGEST, ACCESS, 5.0, [], [], frozenset(), [])
    state.save(link, State([root], []))
    fd = link.held["state"]
    text = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    strange = {**text["roots"][0], "access": {**text["roots"][0]["access"], "mirrors": ["of the future"]}}
    put(link, json.dumps({"version": 99, "roots": [strange, *text["roots"]], "released": []}))
    assert state.load(link) == State([root], [])
