"""Processes that are killed: readers wait a moment and get right bytes; commands leave nothing behind."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lazyfs.control import rundir
from tests.conftest import ROOT, Lazyfs, unmount
from tests.faults.conftest import Mount
from tests.faults.load import lose_blocks, readers, write_truth
from tests.faults.processes import fuse_processes, keepers, kill, state_file, the_worker, wait_for, wait_for_successor
from tests.faults.world import GRACE_S, World, assert_io_error, assert_right, read
from tests.servers import FaultProxy, Rule

KILLS = 20
KILLS_PER_UPGRADE = 5
SEED = int(os.environ.get("LAZYFS_SEED", "1"))


@pytest.fixture(scope="module")
def truth(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_truth(world, tmp_path_factory.mktemp("truth"))


def test_deaths_and_upgrades_of_the_worker_are_not_noticed(
    world: World, proxy: FaultProxy, mount: Mount, cache: Path, truth: Path, lazyfs: Lazyfs
) -> None:
    """kill -9 at random moments, a third of the blocks lost each time, a registry with long round trips. Every
    few kills a planned hand-over, after which the keeper also restarts without a pause again."""
    rng = random.Random(SEED)
    target = mount(world.image(proxy.host), "backend=kernel")
    proxy.latency_s = 0.03
    killed: set[int] = set()
    with readers(world, target, truth, SEED):
        while len(killed) < KILLS:
            lose_blocks(cache, rng, 0.3)
            worker = the_worker(cache)
            time.sleep(rng.uniform(0, 0.6))  # the random moment
            kill(worker)
            killed.add(worker)
            if len(killed) % KILLS_PER_UPGRADE == 0:
                before = the_worker(cache)
                lazyfs("daemon", "--upgrade", "--cache", cache)
                wait_for_successor(cache, before)
        the_worker(cache)
    assert proxy.count("GET", "/blobs/") > KILLS


def test_an_upgrade_waits_for_no_silent_registry(
    world: World, proxy: FaultProxy, mount: Mount, cache: Path, lazyfs: Lazyfs
) -> None:
    """A read that waits is passed on to the successor, and those of cached data are held up for a moment."""
    target = mount(world.image(proxy.host), "backend=kernel", "timeout=60")
    assert_right(world, target, "l0/large")
    proxy.rules[:] = [Rule("stall", times=None)]
    waiting = subprocess.Popen(["cat", str(target / "l1/small")], stdout=subprocess.PIPE)
    while not proxy.count("GET", "/blobs/" + world.digests[1]):
        time.sleep(0.01)
    before = the_worker(cache)
    lazyfs("daemon", "--upgrade", "--cache", cache)
    wait_for_successor(cache, before)
    assert_right(world, target, "l0/large")
    proxy.clear()
    proxy.break_connections()
    assert waiting.communicate(timeout=60)[0] == world.truth["l1/small"]


def test_a_successor_serves_the_cache_without_a_registry(
    world: World, proxy: FaultProxy, mount: Mount, cache: Path
) -> None:
    target = mount(world.image(proxy.host), "backend=kernel", "timeout=2")
    cached = [path for path in world.truth if not path.startswith("l19/")]
    assert_right(world, target, *cached)
    proxy.close()
    kill(the_worker(cache))
    for path in cached:
        with open(target / path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert_right(world, target, *cached)
    assert_io_error(target / "l19/large", 2 + GRACE_S)


def test_a_successor_without_its_index_gets_it_again(
    world: World, proxy: FaultProxy, mount: Mount, cache: Path
) -> None:
    """Somebody emptied the cache, the registry is down: reads fail, until it is back."""
    target = mount(world.image(proxy.host), "backend=kernel", "timeout=2")
    assert_right(world, target, "l0/large")
    for index in list((cache / "indexes").glob("*/image-*")):
        index.unlink()
    upstream, proxy.upstream = proxy.upstream, "127.0.0.1:9"
    proxy.break_connections()
    kill(the_worker(cache))
    assert_io_error(target / "l1/large", 2 + GRACE_S)
    proxy.upstream = upstream
    assert_right(world, target, "l0/large", "l1/large", "bulk/1")


def test_a_successor_takes_up_what_the_version_before_served(
    world: World, proxy: FaultProxy, mount: Mount, cache: Path, lazyfs: Lazyfs
) -> None:
    """As when lazyfs was upgraded between the two: their state has another form."""
    target = mount(world.image(proxy.host), "backend=kernel", "timeout=5")
    assert_right(world, target, "l0/large")
    worker = the_worker(cache)
    state = state_file(keepers(cache)[0])
    left = json.loads(state.read_text())
    for entry in (*left["roots"], *left["released"]):
        access = entry.pop("access")
        how = {name: access[name] for name in ("insecure", "platform", "ca_files", "auth_files")}
        entry["options"] = {**how, "offline": False, "timeout_s": entry.pop("timeout_s"), "push_index": False}
        entry["home"] = access["environ"]
        entry.pop("holds", None)
    state.write_text(json.dumps({"roots": left["roots"], "released": left["released"]}))
    kill(worker)
    assert_right(world, target, "l0/large", "l1/large")  # of the latter nothing was cached
    mounted = [one for found in json.loads(lazyfs("ls", "--json").stdout) for one in found.get("mounts", [])]
    assert str(target) in [one["target"] for entry in mounted for one in entry["targets"]]
    second = mount(world.image(proxy.host), "backend=kernel", "timeout=5")
    assert_right(world, second, "l2/large")
    assert json.loads(state_file(keepers(cache)[0]).read_text())["roots"][0]["access"]
    for place in (target, second):
        lazyfs("umount", "--wait", place)


def test_without_its_keeper_a_worker_goes_on(
    world: World, proxy: FaultProxy, mount: Mount, cache: Path, lazyfs: Lazyfs
) -> None:
    """Cached and uncached data are served and mounts are made as long as the worker lives; when it dies, too,
    reads fail, and the next mount starts anew."""
    target = mount(world.image(proxy.host), "backend=kernel", "timeout=5")
    assert_right(world, target, "l0/large")
    kill(keepers(cache)[0])
    assert_right(world, target, "l0/large", "l1/large")
    joined = mount(world.image(proxy.host), "backend=kernel", "timeout=5")
    assert_right(world, joined, "l2/large")
    refused = lazyfs("daemon", "--upgrade", "--cache", cache, check=False)
    assert refused.returncode != 0
    assert "keeper" in refused.stderr
    assert_right(world, target, "l3/large")
    kill(the_worker(cache))
    outcome = read(target / "l4/large")
    assert (outcome.data, outcome.error) == (None, errno.EIO)
    for place in (target, joined):
        lazyfs("umount", place)
    assert_right(world, mount(world.image(proxy.host), "backend=kernel"))


def test_a_killed_fuse_process_is_cleaned_up(
    world: World, proxy: FaultProxy, mount: Mount, cache: Path, lazyfs: Lazyfs
) -> None:
    target = mount(world.image(proxy.host), "backend=fuse")
    assert_right(world, target, "l0/large")
    kill(fuse_processes(cache)[0])
    outcome = read(target / "l0/large")
    assert outcome.data is None
    assert outcome.error in (errno.ENOTCONN, errno.EIO)
    refused = lazyfs("mount", "-o", f"cache={cache}", world.image(proxy.host), target, check=False)
    assert refused.returncode != 0
    assert "umount" in refused.stderr
    lazyfs("umount", target)
    assert_right(world, mount(world.image(proxy.host), "backend=fuse"), "l0/large", "l1/large")


def test_a_killed_mount_command_leaves_nothing(
    backend: str, world: World, proxy: FaultProxy, mount: Mount, cache: Path, tmp_path: Path
) -> None:
    """At a random moment: there is no mount, or (after the last step) a whole one."""
    rng = random.Random(SEED)
    place = tmp_path / "killed"
    place.mkdir()
    options = f"cache={cache},backend={backend}{',rw' if backend == 'kernel' else ''}"
    command = [
        sys.executable,
        "-m",
        "lazyfs.commands.main",
        "mount",
        "-o",
        options,
        world.image(proxy.host),
        str(place),
    ]
    for number in range(8):
        client = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0, 0.8 if number < 3 else 0.4))  # the random moment
        client.send_signal(signal.SIGKILL)
        client.wait()
        if os.path.ismount(place) and backend == "kernel":
            assert_right(world, place, "l0/small")
        unmount(place)
    assert_right(world, mount(world.image(proxy.host), f"backend={backend}"), "l0/large", "l1/large")


def test_who_still_reads_is_served_while_the_image_is_let_go(
    world: World, proxy: FaultProxy, mount: Mount, cache: Path, truth: Path, lazyfs: Lazyfs
) -> None:
    """Readers in a mount namespace of their own go on when the mount has vanished from ours and the daemon
    lets go of the image, and of everything."""
    runtime = Path(rundir.runtime_directory(str(cache)))
    command = [sys.executable, "-m", "lazyfs.daemon.keeper", "--cache", str(cache), "--runtime", str(runtime)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (runtime / "daemon.log").open("wb") as log:
        keeper = subprocess.Popen([*command, "--linger", "1"], stderr=log, env=environment)
    try:
        target = mount(world.image(proxy.host), "backend=kernel")
        prefix = ["unshare", "--mount", "--propagation", "private"]
        with readers(world, target, truth, SEED, prefix=prefix):
            lazyfs("umount", "--lazy", target)
            wait_for(lambda: [] if (runtime / "control.sock").exists() else [1], "the end of the socket")
            lose_blocks(cache, random.Random(SEED), 1)
            time.sleep(0.5)  # some more reads
        keeper.wait(30)
    finally:
        keeper.kill()
        keeper.wait()
