"""Fixtures of the tests of containers: a root made of busybox, `lazyfs run` on it, a directory for everybody."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.lazyrun import Runner, make_template


@pytest.fixture
def template(tmp_path: Path) -> Path:
    return make_template(tmp_path / "template")


@pytest.fixture
def run(
    template: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Iterator[Runner]:
    state = tmp_path / "state"
    runner = Runner(template, state, capfd)
    yield runner
    mounts = Path("/proc/self/mountinfo").read_text()
    assert str(state) not in mounts


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that an ordinary user can reach."""
    directory = Path(tempfile.mkdtemp(prefix="bundle-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)
