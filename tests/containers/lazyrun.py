"""`lazyfs run` on a root made of busybox: in this process, and as a process of its own."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.containers.plainroots import PlainRoots, run_plainly

APPLETS = (
    "sh",
    "cat",
    "echo",
    "env",
    "id",
    "ls",
    "mkdir",
    "mount",
    "readlink",
    "sleep",
    "stat",
    "stty",
    "touch",
)
DEADLINE_S = 30
DEADLINE_S = 30


def make_template(directory: Path) -> Path:
    """A root with a shell and two accounts, and a configuration."""
    root = directory / "root"
    for name in ("bin", "etc", "empty", "seeded"):
        (root / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox, "install the package busybox-static"
    shutil.copy(busybox, root / "bin" / "busybox")
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nbob:x:1000:1001::/home/bob:/bin/sh\n")
    (root / "etc" / "group").write_text("bob:x:1001:\nwheel:x:10:bob\n")
    (root / "seeded" / "file").write_text("seed")
    configure(directory)
    return directory


def configure(template: Path, **config: Any) -> None:
    """Writes the image's configuration, with the given fields of `config`."""
    document = {
        "os": "linux",
        "architecture": "amd64",
        "rootfs": {"type": "layers", "diff_ids": []},
        "config": {"Cmd": ["sh", "-c", "exit 0"]} | config,
    }
    (template / "config.json").write_text(json.dumps(document))


class Runner:
    """`lazyfs run` in this process; its container's output is read from the capture."""

    def __init__(self, template: Path, state: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.template = template
        self.state = state
        self._capture = capture
        self.roots = PlainRoots(template)

    def status(self, *arguments: str) -> int:
        return run_plainly(list(arguments), self.state, self.roots)

    def __call__(self, *arguments: str) -> str:
        status = self.status("--rm", *arguments)
        captured = self._capture.readouterr()
        assert status == 0, captured.err
        return captured.out

    def shell(self, script: str, *options: str) -> str:
        return self(*options, "image", "sh", "-ec", script)


@contextlib.contextmanager
def started(
    template: Path, tmp_path: Path, *arguments: str, prefix: tuple[str, ...] = (), **streams: Any
) -> Iterator[subprocess.Popen[str]]:
    """`lazyfs run` as a process of its own."""
    state = tmp_path / "state"
    command = [*prefix, sys.executable, "-m", "tests.containers.plainroots", str(template), str(state), *arguments]
    root = Path(__file__).resolve().parents[2]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE} | streams
    with subprocess.Popen(command, cwd=root, text=True, **streams) as process:
        try:
            yield process
            assert process.wait(DEADLINE_S) is not None
        finally:
            if process.poll() is None:  # so that the failure is the only thing it leaves
                process.terminate()
                process.wait(DEADLINE_S)
    assert str(state) not in Path("/proc/self/mountinfo").read_text()
    if "--rm" in arguments:
        assert not any(state.iterdir())


def first_line(process: subprocess.Popen[str]) -> str:
    """Its next line; what is there, if it has to be ended because none comes."""
    assert process.stdout is not None
    ending = threading.Timer(DEADLINE_S, process.terminate)
    ending.start()
    try:
        return process.stdout.readline()
    finally:
        ending.cancel()
