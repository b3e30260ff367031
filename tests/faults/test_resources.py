"""What a daemon takes does not grow: descriptors, threads, memory; what its keeper holds is not lost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.control import rundir
from lazyfs.daemon.keeperlink import KeeperLink
from lazyfs.system.sockets import recv_fds
from tests.conftest import ROOT, Lazyfs
from tests.faults.conftest import Mount
from tests.faults.processes import DEADLINE_S, keepers, open_files, status, the_worker
from tests.faults.world import World, assert_right
from tests.servers import RegistryServer

CYCLES = 3
MEMORY_LIMIT_KIB = 80 << 10


@pytest.fixture
def brisk_daemon(cache: Path) -> Iterator[None]:
    """A daemon that lets go of images soon. It ends by itself after its last mount."""
    runtime = Path(rundir.runtime_directory(str(cache)))
    command = [sys.executable, "-m", "lazyfs.daemon.keeper", "--cache", str(cache), "--runtime", str(runtime)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (runtime / "daemon.log").open("wb") as log:
        keeper = subprocess.Popen([*command, "--linger", "0.5"], stderr=log, env=environment)
    yield
    keeper.wait(DEADLINE_S)


@pytest.mark.usefixtures("brisk_daemon")
def test_mounts_come_and_go_and_nothing_stays(
    world: World, registry: RegistryServer, mount: Mount, cache: Path, lazyfs: Lazyfs
) -> None:
    anchor = mount(f"{registry.host}/{world.other}:v1", "backend=kernel")
    worker = the_worker(cache)
    [keeper] = keepers(cache)

    kept = open_files(keeper)
    taken: list[tuple[int, int]] = []
    for number in range(CYCLES):
        image = world.image(registry.host)
        first, second = mount(image, "backend=kernel"), mount(image, "backend=kernel", "rw")
        assert_right(world, first, "l0/large", f"l{number}/large", "bulk/1")
        lazyfs("umount", first)
        lazyfs("umount", second)
        deadline = time.monotonic() + DEADLINE_S
        while open_files(keeper) != kept or _layers_open(cache, worker) != 1:
            assert time.monotonic() < deadline, f"the image of round {number} is not let go"
            time.sleep(0.05)
        taken.append((open_files(worker), status(worker, "Threads")))
    assert the_worker(cache) == worker
    assert taken[-1][0] <= taken[0][0] + 2, taken  # a connection to the registry may be open or not
    assert taken[-1][1] <= taken[0][1] + 2, taken
    assert (anchor / "other").read_bytes() == world.other_content
    lazyfs("umount", anchor)


def _layers_open(cache: Path, pid: int) -> int:
    found = set()
    for entry in os.listdir(f"/proc/{pid}/fd"):
        try:
            path = os.readlink(f"/proc/{pid}/fd/{entry}")
        except OSError:
            continue
        if path.startswith(f"{cache}/layers/"):
            found.add(os.path.dirname(path))
    return len(found)


def test_memory_stays_small(world: World, registry: RegistryServer, mount: Mount, cache: Path) -> None:
    assert_right(world, mount(world.image(registry.host), "backend=kernel"))
    assert status(the_worker(cache), "VmHWM") < MEMORY_LIMIT_KIB


def test_what_is_held_is_replaced_in_one_message() -> None:
    """Killed between two messages, a worker would leave its successor without its state."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        link = KeeperLink(-1, None, None, theirs.detach(), {})
        descriptors = [os.memfd_create(f"state-{number}") for number in range(3)]
        for descriptor in descriptors:
            link.hold("state", descriptor)
        ours.setblocking(False)
        for _ in descriptors:
            message, received = recv_fds(ours, 8192, 1)
            assert json.loads(message) == {"hold": "state"}
            assert len(received) == 1
            os.close(received[0])
        with pytest.raises(BlockingIOError):
            recv_fds(ours, 8192, 1)
        for descriptor in descriptors[:2]:  # replaced, so closed
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)
        os.close(link.held["state"])
        link._socket.close()
