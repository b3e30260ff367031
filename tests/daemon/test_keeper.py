"""The keeper: kill -9, hand-over, letting go, through a real EROFS mount on its FUSE mount."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazyfs.core.erofs.writer import Device, write_erofs
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import Node
from lazyfs.daemon.arguments import parse_arguments
from lazyfs.daemon.keeper import backoff_s
from lazyfs.errors import UserError
from lazyfs.system.sockets import recv_fds

ROOT = Path(__file__).resolve().parents[2]
CONTENT_ROOT = "5e" * 32
DEADLINE_S = 30.0
DATA_BYTES = 24 << 20
KILLS = 30


class Kept:
    """A keeper with its test worker, and the truth that readers compare with."""

    def __init__(self, base: Path, miss: float) -> None:
        self.cache, self.runtime = base / "cache", base / "runtime"
        self.cache.mkdir(mode=0o700)
        self.runtime.mkdir(mode=0o700)
        self.data = random.Random(2).randbytes(DATA_BYTES)
        (self.cache / "data").write_bytes(self.data)
        self.describe(miss=miss)
        self.files: list[tuple[str, int, int]] = []
        (self.cache / "meta.erofs").write_bytes(self._metadata())
        self.fds: list[int] = []
        self.log = base / "log"
        self.process = self.start()

    def describe(self, **values: object) -> None:
        (self.cache / "device.json").write_text(json.dumps({"root": CONTENT_ROOT, "miss": 0} | values))

    def _metadata(self) -> bytes:
        root = Node(Kind.DIR, 0o755, 0, 0, 0, 0, nlink=2)
        root.children = {}
        rng, address = random.Random(3), 0
        while address < DATA_BYTES - (4 << 20):
            size = rng.choice((1, 100, 4096, 5000, 70_000, 3_000_000))
            name = f"file{len(self.files)}"
            file = Node(Kind.FILE, 0o644, 0, 0, 0, 0, size=size, layer=0, address=address)
            root.children[name.encode()] = file
            self.files.append((name, address, size))
            address += -(-size // 4096) * 4096
        return write_erofs(root, [Device(CONTENT_ROOT.encode(), DATA_BYTES)])

    def start(self) -> subprocess.Popen[bytes]:
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "lazyfs.daemon.keeper", "--cache", str(self.cache)),
                    *("--runtime", str(self.runtime), "--worker", "tests.daemon.keeper_worker"),
                ],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )

    def ask(self, word: str) -> tuple[str, list[int]]:
        """Answer and descriptors of the worker, however often it is restarted meanwhile."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(DEADLINE_S)
                try:
                    connection.connect(str(self.runtime / "control.sock"))
                    connection.sendall(word.encode())
                    answer, fds = recv_fds(connection, 100, 1)
                except OSError:
                    answer, fds = b"", []
            if answer or time.monotonic() > deadline:
                return answer.decode(), fds
            time.sleep(0.005)  # the keeper does not listen yet, or the worker was killed over our question

    def mount(self) -> str:
        """A path of the image's root, valid in this process until `close`."""
        answer, fds = self.ask("mount")
        assert answer == "ok", self.log.read_text()
        self.fds += fds
        return f"/proc/self/fd/{fds[0]}"

    def worker(self) -> int:
        return int(self.ask("pid")[0])

    def wait(self) -> int:
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.wait()


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path, miss=0.3)
    yield made
    made.close()


class Readers:
    """Threads that read at random, with cold caches, and compare every byte, until `stop`."""

    def __init__(self, kept: Kept, root: str, count: int) -> None:
        self.kept, self.root = kept, root
        self.reads = 0
        self.problems: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stop.is_set():
            name, address, size = rng.choice(self.kept.files)
            offset = rng.randrange(size)
            length = min(size - offset, rng.choice((100, 4096, 65536, 1 << 20)))
            try:
                fd = os.open(f"{self.root}/{name}", os.O_RDONLY)
                try:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    got = os.pread(fd, length, offset)
                finally:
                    os.close(fd)
            except OSError as error:
                self.problems.append(f"{name} {offset} {length}: {error}")
                continue
            if got != self.kept.data[address + offset : address + offset + length]:
                self.problems.append(f"{name} {offset} {length}: wrong bytes")
            self.reads += 1

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


def _under_readers(kept: Kept, disturb: Callable[[random.Random], None], times: int) -> None:
    readers = Readers(kept, kept.mount(), 4)
    rng = random.Random()
    try:
        for _ in range(times):
            done, until = readers.reads, time.monotonic() + DEADLINE_S
            while readers.reads < done + 4 and time.monotonic() < until:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.05)  # a random moment is the point of this test
            disturb(rng)
        done, until = readers.reads, time.monotonic() + DEADLINE_S
        while readers.reads < done + 50 and time.monotonic() < until:
            time.sleep(0.002)
    finally:
        readers.stop()
    assert readers.problems == []
    assert readers.reads > times


def test_kill_at_random_moments(kept: Kept) -> None:
    killed: set[int] = set()

    def kill(rng: random.Random) -> None:
        pid = kept.worker()
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)

    _under_readers(kept, kill, KILLS)
    assert len(killed) == KILLS
    assert kept.process.poll() is None


def test_planned_hand_over(kept: Kept) -> None:
    workers = {kept.worker()}

    def upgrade(rng: random.Random) -> None:
        kept.process.send_signal(signal.SIGHUP)
        until = time.monotonic() + DEADLINE_S
        while (pid := kept.worker()) in workers and time.monotonic() < until:
            time.sleep(0.002)
        workers.add(pid)

    _under_readers(kept, upgrade, 5)
    assert len(workers) == 6
    assert "failed" not in kept.log.read_text()


def test_the_successor_has_what_was_held(kept: Kept) -> None:
    first = kept.mount()
    os.kill(kept.worker(), signal.SIGKILL)
    again = kept.mount()
    assert os.stat(first).st_dev == os.stat(again).st_dev


def test_let_go_frees_the_place_and_serves_on(kept: Kept) -> None:
    root = kept.mount()
    pid = kept.worker()
    assert kept.ask("let go")[0] == "ok"
    until = time.monotonic() + DEADLINE_S
    while (kept.runtime / "control.sock").exists() and time.monotonic() < until:
        time.sleep(0.002)
    old, kept.process = kept.process, kept.start()  # it gets the lock
    assert kept.worker() != pid
    name, address, size = max(kept.files, key=lambda file: file[2])
    os.kill(pid, signal.SIGKILL)  # even now the old one's worker is replaced
    assert Path(root, name).read_bytes() == kept.data[address : address + size]
    assert old.poll() is None
    os.close(kept.fds.pop())
    assert old.wait(DEADLINE_S) == 0  # its last mount is gone
    assert kept.process.poll() is None


def test_a_second_keeper_leaves_at_once(kept: Kept) -> None:
    kept.worker()
    assert kept.start().wait(DEADLINE_S) == 0
    assert kept.process.poll() is None


def test_the_keepers_death_harms_no_mount(kept: Kept) -> None:
    root, pid = kept.mount(), kept.worker()
    kept.process.kill()
    kept.wait()
    name, address, size = max(kept.files, key=lambda file: file[2])
    assert Path(root, name).read_bytes() == kept.data[address : address + size]
    assert kept.start().wait(DEADLINE_S) == 0  # the worker still has the lock
    assert kept.worker() == pid
    os.kill(pid, signal.SIGKILL)


def test_sigterm_ends_both(kept: Kept) -> None:
    pid = kept.worker()
    kept.process.send_signal(signal.SIGTERM)
    assert kept.wait() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not (kept.runtime / "control.sock").exists()


def test_the_keeper_stays_small(kept: Kept) -> None:
    kept.worker()
    maps = Path(f"/proc/{kept.process.pid}/maps").read_text()
    assert "pyexpat" not in maps
    status = Path(f"/proc/{kept.process.pid}/status").read_text()
    assert "Threads:\t1\n" in status


def test_a_worker_that_cannot_start_is_reported(tmp_path: Path) -> None:
    made = Kept(tmp_path, miss=0)
    made.describe(broken=True)
    made.process.kill()
    made.wait()
    made.process = made.start()
    assert made.wait() == 2
    assert "exit code 3" in made.log.read_text().splitlines()[-1]


def test_back_off() -> None:
    assert [backoff_s(deaths) for deaths in (0, 1, 2, 11, 1000)] == [0, 0, 0, 1, 1]
    assert 0 < backoff_s(3) <= backoff_s(10) < 1


def test_arguments() -> None:
    given = ["--cache", "/c", "--runtime=/r", "--foreground", "--linger", "5"]
    assert parse_arguments(given) == {"cache": "/c", "runtime": "/r", "foreground": "yes", "linger": "5"}
    for bad in (["--cache", "/c"], ["--cache", "--runtime"], ["/c"], [*given, "--nonsense"]):
        with pytest.raises(UserError):
            parse_arguments(bad)
