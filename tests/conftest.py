"""Fixtures for all tests: a registry, a cache directory with its daemon, the command, and the leak check."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazyfs.control import rundir
from tests import leaks
from tests.servers import RegistryServer

# A shell starts what it puts in the background with SIGINT ignored, nohup what it starts with SIGHUP, and so would
# be everything that is tested.
for _signal, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _handler)

ROOT = Path(__file__).resolve().parent.parent
COMMAND_DEADLINE_S = 90.0
Lazyfs = Callable[..., "subprocess.CompletedProcess[str]"]

os.environ[leaks.MARK] = f"{os.getpid()}-{os.urandom(4).hex()}"


@pytest.fixture(scope="session", autouse=True)
def own_temporary_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A temporary directory (TMPDIR) for this session alone, so that what is left in it was left by us."""
    tmp_path_factory.getbasetemp()  # made outside of it
    # Not below the session's base directory, which other users cannot enter.
    with tempfile.TemporaryDirectory(prefix="lazyfs-tests-") as name, pytest.MonkeyPatch.context() as patch:
        os.chmod(name, 0o755)
        leaks.watch_temporary(Path(name))
        patch.setenv("TMPDIR", name)
        patch.setattr(tempfile, "tempdir", None)  # it is remembered
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail a test that leaves a mount, a process, a runtime directory or a temporary file."""
    base = tmp_path_factory.getbasetemp()
    before = leaks.traces(base)
    yield
    if leaks.traces(base).since(before):
        left = leaks.wait_until_gone(base, before)
        leaks.remove(left)
        if left:
            pytest.fail(f"left behind:\n{left.describe()}")


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """One docker-registry for the session; give each test's image a repository name of its own."""
    with RegistryServer(tmp_path_factory.mktemp("registry")) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """An empty cache directory. Its daemon, if one was started, is stopped when the test ends."""
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    leaks.watch(directory)
    yield directory
    stop_daemon(directory)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A mount point, unmounted when the test ends."""
    directory = tmp_path / "target"
    directory.mkdir()
    yield directory
    unmount(directory)


@pytest.fixture(scope="session")
def lazyfs() -> Lazyfs:
    """Run the command: ``lazyfs("mount", image, target)``; `check=False` to see it fail."""

    def run(
        *arguments: object, check: bool = True, env: dict[str, str] | None = None, cwd: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        words = [str(argument) for argument in arguments]
        result = subprocess.run(
            [sys.executable, "-m", "lazyfs.commands.main", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_DEADLINE_S,
            env=os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"} | (env or {}),
            cwd=cwd,
        )
        if check and result.returncode != 0:
            pytest.fail(f"lazyfs {' '.join(words)}: exit {result.returncode}\n{result.stderr}")
        return result

    return run


def stop_daemon(cache: Path) -> None:
    """Ask the cache directory's daemon to end, if there is one; the leak check waits until it has."""
    for base in (leaks.RUNTIME_ROOT, Path(os.environ.get("XDG_RUNTIME_DIR", "/run"), "lazyfs")):
        runtime = base / rundir.key_of(str(cache))
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(leaks.DEADLINE_S)
            connection.connect(rundir.control_socket(str(runtime)))
            connection.sendall(json.dumps({"op": "stop"}).encode() + b"\n")
            connection.recv(4096)
        shutil.rmtree(runtime, ignore_errors=True)


def unmount(target: Path) -> None:
    """Unmount whatever is on `target`, one mount over the other."""
    # Not os.path.ismount: it follows stat, which fails on a dead FUSE mount.
    while is_mounted(target):
        result = subprocess.run(
            ["umount", "-l", "--", str(target)], capture_output=True, text=True, timeout=COMMAND_DEADLINE_S
        )
        # A server whose client was killed takes its mount away by itself, perhaps just now.
        if result.returncode != 0 and is_mounted(target):
            pytest.fail(result.stderr)


def is_mounted(target: Path) -> bool:
    """Whether something is mounted on `target` itself."""
    return any(mount.partition(" ")[2] == str(target) for mount in leaks.mounts(target))
