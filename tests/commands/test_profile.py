"""`lazyfs profile show`: what is known of an image's starts, as text, JSON and figure; and that nothing is known."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.profiles import keep_profile
from lazyfs.core.oci.digests import ContentRoot, Digest
from lazyfs.core.starts.profile import Profile, Touch
from tests.conftest import Lazyfs
from tests.indexing.localimages import big_layer, small_layer, write_image

Show = Callable[..., Any]


@pytest.fixture
def image(tmp_path: Path) -> str:
    write_image(tmp_path / "image", [big_layer(), small_layer()])
    return f"oci:{tmp_path}/image"


@pytest.fixture
def show(lazyfs: Lazyfs, tmp_path: Path, image: str) -> Show:
    """The command; its JSON if it prints some."""

    def run(*words: str, check: bool = True) -> Any:
        result = lazyfs("profile", "show", "-o", f"cache={tmp_path}/store", image, *words, check=check)
        return json.loads(result.stdout) if check and "--json" in words else result

    return run


def known(lazyfs: Lazyfs, tmp_path: Path, image: str) -> tuple[str, Profile]:
    """An index and a profile of the image are in the cache."""
    indexed = lazyfs("index", "-o", f"cache={tmp_path}/store", image, "--json")
    digest = json.loads(indexed.stdout)["manifest_digest"]
    inspected = lazyfs("inspect", "-o", f"cache={tmp_path}/store", image, "--json")
    big, small = [ContentRoot(layer["content_root"]) for layer in json.loads(inspected.stdout)["layers"]]
    touches = (
        Touch(0, 0, 0, 2, bytes(8), b"etc/small", 0, 3000),
        Touch(1, 1, 20, 2, bytes(8), b"bin/\xff\x1b[2J", 0, 262_144),
        Touch(1, 2, 1500, 1, b"12345678", b"bin/\xff\x1b[2J", 1, 262_144),
        Touch(1, 9, 1600, 1, bytes(8), b"", 0, 100),
    )
    profile = Profile((small, big), 2, touches)
    keep_profile(CacheDirectory(f"{tmp_path}/store"), Digest(digest), image, profile)
    return digest, profile


def test_by_layer_and_by_file(lazyfs: Lazyfs, show: Show, tmp_path: Path, image: str) -> None:
    known(lazyfs, tmp_path, image)
    lines = show().stdout.splitlines()
    assert lines[0] == f"{image}  2 starts touch 527 kB in 4 blocks within 1.600 s"
    assert lines[1].split() == ["DEPTH", "LAYER", "TOUCHED", "SHARE", "BLOCKS", "FILES"]
    assert [line.split()[0::2] for line in lines[2:4]] == [["1", "524", "99.4", "3"], ["2", "3.0", "0.6", "1"]]
    assert [" ".join(line.split()) for line in lines[6:]] == [
        "0.000 s 0.000 s 2/2 3.0 kB 1 2 /etc/small",
        "0.020 s 1.500 s 2/2 524 kB 2 1 /bin/\\xdcff\\x1b[2J",
        "1.600 s 1.600 s 1/2 100 B 1 1 (not in a file of the root)",
    ]


def test_json_has_every_touch(lazyfs: Lazyfs, show: Show, tmp_path: Path, image: str) -> None:
    digest, profile = known(lazyfs, tmp_path, image)
    found = show("--json")
    assert (found["image"], found["manifest_digest"], found["starts"], found["blocks"]) == (image, digest, 2, 4)
    assert (found["size_bytes"], found["last_ms"]) == (527_388, 1600)
    assert [(one["depth"], one["content_root"], one["size_bytes"], one["files"]) for one in found["layers"]] == [
        (2, profile.layers[0], 3000, 1), (1, profile.layers[1], 524_388, 1),
    ]  # fmt: skip
    assert all(one["digest"].startswith("sha256:") for one in found["layers"])
    assert [one["path"] for one in found["files"]] == ["/etc/small", os.fsdecode(b"/bin/\xff\x1b[2J"), None]
    assert found["touches"][2] == {
        "layer": 1, "block": 2, "at_ms": 1500, "starts": 1, "digest": b"12345678".hex(),
        "path": os.fsdecode(b"/bin/\xff\x1b[2J"), "part": 1, "length_bytes": 262_144,
    }  # fmt: skip


def test_after_everything_else_is_gone(lazyfs: Lazyfs, show: Show, tmp_path: Path, image: str) -> None:
    _, profile = known(lazyfs, tmp_path, image)
    lazyfs("cache", "prune", "--cache", tmp_path / "store")
    found = show("--json")
    assert [(one["depth"], one["digest"]) for one in found["layers"]] == [(None, None)] * 2
    assert f"-      root {profile.layers[0][:12]}" in show().stdout


def test_a_figure(lazyfs: Lazyfs, show: Show, tmp_path: Path, image: str) -> None:
    pytest.importorskip("matplotlib")
    known(lazyfs, tmp_path, image)
    show("--plot", str(tmp_path / "start.png"))
    assert (tmp_path / "start.png").read_bytes().startswith(b"\x89PNG")
    failed = show("--plot", str(tmp_path / "missing/start.png"), check=False)
    assert failed.returncode == 1 and "cannot draw to" in failed.stderr


def test_no_start_was_seen(show: Show) -> None:
    failed = show(check=False)
    assert failed.returncode == 32 and failed.stdout == ""
    assert "no start of oci:" in failed.stderr and "learn=off" in failed.stderr and failed.stderr.count("\n") == 1


def test_a_damaged_profile_is_none(lazyfs: Lazyfs, show: Show, tmp_path: Path, image: str) -> None:
    digest, _ = known(lazyfs, tmp_path, image)
    path = CacheDirectory(f"{tmp_path}/store").profile_path(Digest(digest))
    os.truncate(path, os.stat(path).st_size - 1)
    assert "no start of" in show(check=False).stderr


def test_an_image_that_was_never_seen_offline(lazyfs: Lazyfs, tmp_path: Path, image: str) -> None:
    failed = lazyfs("profile", "show", "-o", f"cache={tmp_path}/store,offline", image, check=False)
    assert failed.returncode == 1 and "not in the cache" in failed.stderr
