"""`lazyfs run` and `lazyfs bundle` of a real image: mount, bundle, runc, clean-up."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import leaks, realimages
from tests.conftest import Lazyfs

RUNC_DEADLINE_S = 30


@pytest.fixture(params=["kernel", "fuse"])
def options(request: pytest.FixtureRequest, cache: Path) -> str:
    return f"cache={cache},backend={request.param}"


@pytest.fixture(scope="module")
def image() -> str:
    return f"oci:{realimages.busybox()}:gzip"


def test_run_gives_the_containers_output_and_status(
    lazyfs: Lazyfs, image: str, options: str, cache: Path
) -> None:
    command = ["run", "--rm", "-o", options, "-e", "A=1", image, "sh", "-c", "echo $A > /x; cat /x; exit 7"]
    for _ in range(2):  # the second one joins, or starts anew, and sees nothing of the first
        result = lazyfs(*command, check=False)
        assert (result.returncode, result.stdout) == (7, "1\n"), result.stderr
    assert leaks.mounts(cache.parent) == frozenset()


def test_run_without_rm_keeps_what_was_written(lazyfs: Lazyfs, image: str, options: str) -> None:
    name = f"kept-{os.getpid()}"
    directory = Path("/var/lib/lazyfs/containers", name)
    try:
        result = lazyfs("run", "--name", name, "-o", options, image, "sh", "-c", "echo 1 > /written")
        assert str(directory) in result.stderr
        assert (directory / "upper" / "written").read_text() == "1\n"
        assert not any((directory / "rootfs").iterdir())
    finally:
        subprocess.run(["rm", "-rf", "--", str(directory)], check=True)


def test_a_missing_image_is_not_run(lazyfs: Lazyfs, options: str, tmp_path: Path) -> None:
    result = lazyfs("run", "--rm", "-o", options, f"oci:{tmp_path}/none:x", check=False)
    assert result.returncode == 125
    assert result.stderr.startswith("lazyfs: ")
    assert "Traceback" not in result.stderr


def test_a_bundle_runs_under_runc(lazyfs: Lazyfs, image: str, options: str, tmp_path: Path) -> None:
    directory = tmp_path / "bundle"
    lazyfs("bundle", "-o", options, image, directory, "sh", "-c", "echo from the bundle; : > /written")
    try:
        command = ["runc", "run", "--bundle", str(directory), f"bundle-{os.getpid()}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUNC_DEADLINE_S)
        assert done.stdout == "from the bundle\n", done.stderr
    finally:
        lazyfs("umount", "--wait", directory / "rootfs")
    assert (directory / "upper" / "written").exists()
