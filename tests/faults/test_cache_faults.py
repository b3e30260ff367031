"""A cache that rots, shrinks, fills up, or is used by several at once: right bytes or an error."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import leaks
from tests.conftest import ROOT, Lazyfs, stop_daemon, unmount
from tests.faults.conftest import Mount
from tests.faults.load import lose_blocks, readers, write_truth
from tests.faults.processes import end_daemon
from tests.faults.world import World, assert_right, read
from tests.servers import FaultProxy, RegistryServer

SEED = int(os.environ.get("LAZYFS_SEED", "1"))


@pytest.fixture(scope="module")
def whole_cache(
    world: World, registry: RegistryServer, lazyfs: Lazyfs, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A cache with everything in it, to be copied."""
    base = tmp_path_factory.mktemp("whole")
    cache, target = base / "cache", base / "target"
    cache.mkdir(mode=0o700)
    target.mkdir()
    before = leaks.traces(base)
    try:
        lazyfs("mount", "-o", f"cache={cache},backend=kernel", world.image(registry.host), target)
        assert_right(world, target)
    finally:
        unmount(target)
        end_daemon(cache)
        leaks.wait_until_gone(base, before)
        stop_daemon(cache)
    return cache


@pytest.fixture
def filled(whole_cache: Path, cache: Path) -> Path:
    """A cache with everything in it, and no daemon."""
    subprocess.run(["cp", "-a", "--sparse=always", f"{whole_cache}/.", cache], check=True)
    return cache


def _layers(cache: Path) -> list[Path]:
    return sorted((cache / "layers").iterdir())


def _flip(path: Path, rng: random.Random, number: int) -> None:
    with path.open("r+b", buffering=0) as file:
        for _ in range(number):
            at = rng.randrange(os.fstat(file.fileno()).st_size)
            byte = os.pread(file.fileno(), 1, at)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << rng.randrange(8)]), at)


def test_rot_under_a_mount_is_repaired(
    backend: str, world: World, registry: RegistryServer, mount: Mount, filled: Path
) -> None:
    rng = random.Random(SEED)
    target = mount(world.image(registry.host), f"backend={backend}")
    for layer in _layers(filled):
        _flip(layer / "data", rng, 20)
        _flip(layer / "present", rng, 3)
    assert_right(world, target)


@pytest.mark.parametrize("name", ["data", "present", "table"])
def test_a_file_cut_short_under_a_mount(
    name: str, world: World, registry: RegistryServer, mount: Mount, filled: Path
) -> None:
    """The worker may die of it (SIGBUS, as the files are mapped); its successor makes good."""
    target = mount(world.image(registry.host), "backend=kernel")
    assert_right(world, target, "l0/small")
    for layer in _layers(filled):
        os.truncate(layer / name, os.path.getsize(layer / name) // 3)
    assert_right(world, target)


def _cut(name: str, share: float) -> Callable[[Path], None]:
    return lambda entry: os.truncate(entry / name, int(os.path.getsize(entry / name) * share))


def _spoil(name: str) -> Callable[[Path], None]:
    return lambda entry: _flip(entry / name, random.Random(SEED), 40)


def _remove_file(name: str) -> Callable[[Path], None]:
    return lambda entry: os.unlink(entry / name)


def _empty(entry: Path) -> None:
    for file in entry.iterdir():
        file.unlink()


def _make_a_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_bytes(b"?")


def _parts(image: Path) -> list[Path]:
    """What is kept of the indexes of layers."""
    return [path for path in (image.parent.parent / "scans").glob("*/*/*") if path.is_file()]


def _spoil_parts(image: Path) -> None:
    for path in _parts(image):
        _flip(path, random.Random(SEED), 40)


def _cut_parts(image: Path) -> None:
    for number, path in enumerate(_parts(image)):
        os.truncate(path, os.path.getsize(path) * (number % 3) // 3)


def _remove_parts(image: Path) -> None:
    shutil.rmtree(image.parent.parent / "scans")
    (image.parent.parent / "scans").mkdir()


LAYER_DAMAGE: tuple[Callable[[Path], None], ...] = (
    shutil.rmtree,
    _empty,
    _cut("table", 0.5),
    _cut("table", 0),
    _spoil("table"),
    _cut("present", 0.5),
    _cut("present", 0),
    _cut("data", 0.5),
    _remove_file("data"),
    _remove_file("present"),
    _remove_file("lock"),
    _make_a_file,
)
IMAGE_DAMAGE: dict[str, tuple[Callable[[Path], None], ...]] = {
    "removed": (shutil.rmtree,),
    "namespace and parts of layers' indexes spoiled": (_spoil("namespace.erofs"), _spoil_parts),
    "namespace cut, config empty": (_cut("namespace.erofs", 0.5), _cut("config", 0)),
    "index spoiled, parts cut": (_spoil("image-attached"), _cut_parts),
    "index cut, manifest spoiled": (_cut("image-attached", 0.9), _spoil("manifest")),
    "no parts, no lock": (_remove_parts, _remove_file("lock")),
}


def test_a_damaged_cache_is_mended_by_the_next_mount(
    world: World, registry: RegistryServer, mount: Mount, filled: Path, lazyfs: Lazyfs
) -> None:
    """Each layer's entry damaged in another way, then the image's entry in several ways."""
    for layer, damage in zip(_layers(filled), LAYER_DAMAGE, strict=False):
        damage(layer)
    for number, (name, damages) in enumerate(IMAGE_DAMAGE.items()):
        for damage in damages:
            damage(next((filled / "indexes").iterdir()))
        target = mount(world.image(registry.host), "backend=kernel")
        try:
            assert_right(world, target, *(list(world.truth) if number == 0 else ["l0/large", "bulk/1"]))
        except OSError as error:
            pytest.fail(f"{name}: {error}")
        lazyfs("umount", target)
        end_daemon(filled)
        lose_blocks(filled, random.Random(SEED), 1)


@pytest.fixture
def small_disk(cache: Path, tmp_path: Path) -> Iterator[Path]:
    """The cache on a small ext4: the kernel cannot mount EROFS metadata that lies on tmpfs."""
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, cache], check=True)
    yield cache
    end_daemon(cache)
    unmount(cache)


def test_a_full_disk_gives_errors_and_no_wrong_bytes(
    backend: str, world: World, registry: RegistryServer, small_disk: Path, mount: Mount
) -> None:
    target = mount(world.image(registry.host), f"backend={backend}", "timeout=5")
    ballast = small_disk / "ballast"
    disk = os.statvfs(small_disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - (6 << 20))
    failed = []
    for path, content in world.truth.items():
        outcome = read(target / path)
        if outcome.data is None:
            assert outcome.error == errno.EIO
            failed.append(path)
        else:
            assert outcome.data == content, path
        if len(failed) == 3:
            break
    assert failed
    assert_right(world, target, "l0/large", "l0/small")  # what is there stays readable
    ballast.unlink()
    assert_right(world, target, *failed)


def test_a_cache_in_memory_is_for_the_fuse_backend(
    world: World, registry: RegistryServer, cache: Path, mount: Mount, lazyfs: Lazyfs
) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=99m,mode=700", "tmpfs", cache], check=True)
    try:
        options = f"cache={cache},backend=kernel"
        place = cache.parent
        refused = lazyfs("mount", "-o", options, world.image(registry.host), place, check=False)
        assert refused.returncode != 0
        assert "tmpfs" in refused.stderr
        target = mount(world.image(registry.host))
        assert_right(world, target, "l0/large", "bulk/0")
        unmount(target)
    finally:
        end_daemon(cache)
        unmount(cache)


def test_two_backends_share_a_cache(
    world: World, proxy: FaultProxy, mount: Mount, cache: Path, tmp_path: Path
) -> None:
    """The daemon and a fuse process fill it and read it at once, while it loses blocks."""
    rng = random.Random(SEED)
    truth = write_truth(world, tmp_path / "truth")
    kernel = mount(world.image(proxy.host), "backend=kernel")
    fuse = mount(world.image(proxy.host), "backend=fuse")
    with readers(world, kernel, truth, SEED, number=2), readers(world, fuse, truth, SEED + 10, number=2):
        for _ in range(20):
            lose_blocks(cache, rng, 0.2)
            time.sleep(0.1)
    assert_right(world, kernel)
    assert_right(world, fuse)


def test_a_killed_first_pass_leaves_a_usable_cache(
    backend: str, world: World, registry: RegistryServer, mount: Mount, cache: Path, tmp_path: Path
) -> None:
    """The mount of an image without an index is killed at several points of its pass over the layers."""
    rng = random.Random(SEED)
    place = tmp_path / "killed"
    place.mkdir()
    with FaultProxy(registry, bytes_per_s=8_000_000) as proxy:
        image = f"{proxy.host}/{world.plain}:v1"
        options = f"cache={cache},backend={backend}"
        command = [sys.executable, "-m", "lazyfs.commands.main", "mount", "-o", options, image, str(place)]
        for number in range(3):
            # What a killed pass found out of whole layers stays: without that the next one has less to read.
            shutil.rmtree(cache / "scans", ignore_errors=True)
            client = subprocess.Popen(
                command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
            )
            done = len(proxy.requests) + 8 + 5 * number
            while len(proxy.requests) < done and client.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.2))  # the random moment
            client.kill()
            client.wait()
            assert not os.path.ismount(place)
    assert_right(world, mount(f"{registry.host}/{world.plain}:v1", f"backend={backend}"))


def test_many_mounts_at_once(
    backend: str, world: World, registry: RegistryServer, mount: Mount, lazyfs: Lazyfs, cache: Path
) -> None:
    """Six clients, two images, no daemon yet: one is started, all get their mounts."""
    images = [world.image(registry.host), f"{registry.host}/{world.other}:v1"]
    with ThreadPoolExecutor(6) as pool:
        mounting = [pool.submit(mount, images[number % 2], f"backend={backend}") for number in range(6)]
        targets = [one.result() for one in mounting]

        def check(number: int) -> None:
            if number % 2:
                assert (targets[number] / "other").read_bytes() == world.other_content
            else:
                assert_right(world, targets[number])

        for one in [pool.submit(check, number) for number in range(6)]:
            one.result()
        for done in [pool.submit(lazyfs, "umount", target) for target in targets]:
            done.result()
