"""The FUSE backend on real mounts: what is seen equals the tree, and what goes wrong stays an EIO."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lazyfs.control import client
from lazyfs.control.replies import REPLIES
from lazyfs.control.requests import Attached
from lazyfs.errors import HostError, ImageError, RemoteError, UserError
from lazyfs.system.mountinfo import mounts
from tests.daemon.roottree import HUGE_BYTES, MARKS, NOBODY, TreeBuilder, differences, every_kind, small_image

ROOT = Path(__file__).resolve().parents[2]
ANSWER_S = 20.0
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]


class Served:
    """A fuse process over a local image."""

    def __init__(self, directory: Path, target: Path, runtime: Path, prefix: Sequence[str] = ()) -> None:
        ours, theirs = socket.socketpair()
        self.fault, fault_theirs = socket.socketpair()
        self.target = target
        self.runtime = runtime
        with theirs, fault_theirs:
            fds = (theirs.fileno(), fault_theirs.fileno())
            command = [sys.executable, "-P", "-m", "tests.daemon.localimage"]
            paths = [str(directory), str(runtime / "cache"), str(runtime)]
            self.process = subprocess.Popen(
                [*prefix, *command, *paths, *map(str, fds)], pass_fds=fds, cwd="/", start_new_session=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
            )
        self.connection = client.Connection(ours)
        self.fault.settimeout(ANSWER_S)

    def ask(self, image: str = "registry.example/image:1", **fields: Any) -> dict[str, Any]:
        request = {"op": "fuse_mount", "image": image, "target": str(self.target)}
        return self.connection.ask(request | fields, ANSWER_S)

    def mount(self, **fields: Any) -> dict[str, Any]:
        reply = self.ask(**fields)
        self.connection.ask({"op": "attached", "attached": {"dev": reply["dev"], "target": str(self.target)}}, ANSWER_S)
        return reply

    @property
    def socket_path(self) -> Path:
        return self.runtime / f"fuse-{self.process.pid}.sock"

    def control(self, **request: Any) -> dict[str, Any]:
        return client.ask_once(str(self.socket_path), request, ANSWER_S)

    def disturb(self, word: str) -> None:
        self.fault.sendall(word.encode())
        assert self.fault.recv(10) == b"ok"

    def mounted(self) -> bool:
        return any(entry.mountpoint == str(self.target) for entry in mounts())

    def end(self) -> int:
        """Waits for the end after an unmount, whose exit code it returns."""
        return self.process.wait(ANSWER_S)

    def close(self) -> None:
        """Whatever state it is in."""
        self.connection.close()
        if self.mounted():
            subprocess.run(["umount", "-l", str(self.target)], check=True)
        try:
            self.process.wait(ANSWER_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.fault.close()


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path, target: Path) -> Iterator[Serve]:
    served: list[Served] = []

    def start(directory: Path, prefix: Sequence[str] = (), place: Path = target) -> Served:
        runtime = tmp_path / "run"
        runtime.mkdir(exist_ok=True, mode=0o700)
        served.append(Served(directory, place, runtime, prefix))
        return served[-1]

    yield start
    for one in served:
        one.close()


def test_everything_is_as_in_the_tree(tmp_path: Path, target: Path, serve: Serve) -> None:
    builder = TreeBuilder(tmp_path / "image")
    tree = every_kind(builder)
    directory = builder.finish()
    serve(directory).mount(allow_other=True)
    assert differences(target, tree, directory) == []
    assert differences(target, tree, directory) == []  # and once more, now from the kernel's caches


def test_reads_anywhere_in_a_file(tmp_path: Path, target: Path, serve: Serve) -> None:
    builder = TreeBuilder(tmp_path / "image")
    content = random.Random(2).randbytes(3_000_001)
    assert builder.root.children is not None
    builder.root.children.update({b"before": builder.file(b"b" * 5000, layer=1), b"huge": builder.huge()})
    builder.root.children[b"file"] = builder.file(content, layer=1)
    builder.root.children[b"after"] = builder.file(b"a" * 5000, layer=1)
    serve(builder.finish()).mount()
    rng = random.Random(3)
    for flags in (0, os.O_DIRECT):
        fd = os.open(target / "file", os.O_RDONLY | flags)
        try:
            for _ in range(100):
                offset, size = rng.randrange(len(content) + 10), rng.choice((1, 511, 4096, 70_000, 1_500_000))
                assert os.pread(fd, size, offset) == content[offset : offset + size]
        finally:
            os.close(fd)
    with open(target / "huge", "rb") as huge:
        for offset, text in MARKS.items():
            assert os.pread(huge.fileno(), len(text) + 10, offset).rstrip(b"\0") == text
        assert os.pread(huge.fileno(), 10_000, HUGE_BYTES - 4) == b"last"
        assert os.pread(huge.fileno(), 10, HUGE_BYTES) == b""
        assert os.pread(huge.fileno(), 8192, 2 << 30) == bytes(8192)  # a hole in the layer's data


def test_directory_positions_stay_valid(tmp_path: Path, target: Path, serve: Serve) -> None:
    builder = TreeBuilder(tmp_path / "image")
    assert builder.root.children is not None
    names = {b"%d-%s" % (number, b"x" * (number % 40)) for number in range(5000)}
    builder.root.children.update({name: builder.file(b"") for name in names})
    serve(builder.finish()).mount()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long
    stream = ctypes.c_void_p(libc.opendir(os.fsencode(target)))

    def next_name() -> bytes | None:
        entry = libc.readdir(stream)
        return ctypes.string_at(entry + 19) if entry else None  # struct dirent: d_name

    try:
        seen: list[tuple[int, bytes]] = []
        while True:
            position = libc.telldir(stream)
            name = next_name()
            if name is None:
                break
            seen.append((position, name))
        assert {name for _, name in seen} == names | {b".", b".."} and len(seen) == 5002
        for position, name in random.Random(4).sample(seen, 100):
            libc.seekdir(stream, ctypes.c_long(position))
            assert next_name() == name
    finally:
        libc.closedir(stream)


def test_names_that_do_not_exist_are_asked_for_once(tmp_path: Path, target: Path, serve: Serve) -> None:
    served = serve(small_image(tmp_path))
    dev = served.mount()["dev"]
    for _ in range(5):
        with pytest.raises(FileNotFoundError):
            os.lstat(target / "absent")
        os.lstat(target / "near")
    assert served.control(op="stats", dev=dev)["fuse"]["lookups"] == 2
    for length, number in ((255, errno.ENOENT), (256, errno.ENAMETOOLONG), (2000, errno.ENAMETOOLONG)):
        with pytest.raises(OSError) as caught:
            os.lstat(target / ("x" * length))
        assert caught.value.errno == number


def test_nothing_can_be_changed(tmp_path: Path, target: Path, serve: Serve) -> None:
    serve(small_image(tmp_path)).mount()
    near = target / "near"
    attempts: list[Callable[[], object]] = [
        lambda: os.mkdir(target / "d"), lambda: os.unlink(near), lambda: os.truncate(near, 0),
        lambda: os.open(near, os.O_RDWR), lambda: os.open(target / "new", os.O_CREAT | os.O_WRONLY),
        lambda: os.chmod(near, 0o777), lambda: os.chown(near, 1, 1), lambda: os.utime(near),
        lambda: os.rename(near, target / "n"), lambda: os.link(near, target / "n"),
        lambda: os.symlink("x", target / "s"), lambda: os.setxattr(near, "user.x", b""),
        lambda: os.removexattr(near, "user.x"), lambda: os.mkfifo(target / "f"),
        lambda: os.rmdir(target / "x"),
    ]
    for attempt in attempts:
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno in (errno.EROFS, errno.ENOENT)
    status = os.statvfs(target)
    assert (status.f_bfree, status.f_namemax) == (0, 255)
    assert status.f_flag & os.ST_RDONLY and status.f_flag & os.ST_NOSUID and status.f_flag & os.ST_NODEV


@pytest.mark.parametrize("mode", ["error", "bug", "short", "group"])
def test_a_read_that_fails_is_eio_and_the_next_one_works(
    mode: str, tmp_path: Path, target: Path, serve: Serve
) -> None:
    served = serve(small_image(tmp_path))
    dev = served.mount()["dev"]
    served.disturb(mode)
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            (target / "far-1").read_bytes()
        assert caught.value.errno == errno.EIO
    assert (target / "near").read_bytes() == b"near" * 5000
    served.disturb("present")
    assert (target / "far-1").read_bytes() == b"000001" * 2000
    assert served.control(op="stats", dev=dev)["fuse"]["failures"] >= 2


def test_200_waiting_reads_hold_up_nobody_else(tmp_path: Path, target: Path, serve: Serve) -> None:
    served = serve(small_image(tmp_path, files=200))
    dev = served.mount()["dev"]
    served.disturb("absent")
    with ThreadPoolExecutor(200) as pool:
        reads = [pool.submit((target / f"far-{number}").read_bytes) for number in range(200)]
        served.disturb("waiting 200")
        assert served.control(op="stats", dev=dev)["fuse"]["waiting"] == 200
        assert len(os.listdir(target)) == 201
        with pytest.raises(FileNotFoundError):
            os.lstat(target / "absent")
        assert (target / "near").read_bytes() == b"near" * 5000
        assert not any(read.done() for read in reads)
        served.disturb("present")
        for number, read in enumerate(reads):
            assert read.result(ANSWER_S) == b"%06d" % number * 2000


def test_access_lists_are_enforced(tmp_path: Path, target: Path, serve: Serve) -> None:
    builder = TreeBuilder(tmp_path / "image")
    every_kind(builder)
    serve(builder.finish()).mount(allow_other=True)
    tmp_path.chmod(0o711)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o711)

    def read_as(user: int) -> subprocess.CompletedProcess[bytes]:
        command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "cat", f"{target}/acl"]
        return subprocess.run(command, capture_output=True, check=False, timeout=ANSWER_S)

    assert read_as(NOBODY).stdout == b"shared"
    assert b"Permission denied" in read_as(NOBODY - 1).stderr


def test_plain_umount_ends_the_process(tmp_path: Path, target: Path, serve: Serve) -> None:
    served = serve(small_image(tmp_path))
    served.mount()
    entry = next(entry for entry in mounts() if entry.mountpoint == str(target))
    assert (entry.fstype, entry.source) == ("fuse.lazyfs", "registry.example/image:1")
    assert stat.S_IMODE(served.socket_path.stat().st_mode) == 0o600
    listed = served.control(op="list")["mounts"]
    assert [one["targets"] for one in listed] == [[Attached(entry.dev, str(target)).to_json()]]
    with pytest.raises(UserError):
        served.control(op="stats", dev="0:0")
    subprocess.run(["umount", str(target)], check=True)
    assert served.end() == 0
    assert not served.socket_path.exists()


@pytest.mark.parametrize("how", ["signal", "stop"])
def test_it_stops_when_asked_to_once_its_users_are_done(
    how: str, tmp_path: Path, target: Path, serve: Serve
) -> None:
    served = serve(small_image(tmp_path))
    served.mount()
    with open(target / "near", "rb") as user:
        if how == "signal":
            served.process.send_signal(signal.SIGTERM)
        else:
            served.control(op="stop")
        while served.mounted():
            os.sched_yield()
        assert user.read() == b"near" * 5000
    assert served.end() == 0
    assert not served.socket_path.exists()


def test_a_second_signal_ends_it_with_reads_waiting(tmp_path: Path, target: Path, serve: Serve) -> None:
    served = serve(small_image(tmp_path))
    served.mount()
    served.disturb("absent")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit((target / "far-0").read_bytes)
        served.disturb("waiting 1")
        served.process.send_signal(signal.SIGTERM)
        while served.mounted():
            os.sched_yield()
        served.process.send_signal(signal.SIGTERM)
        assert isinstance(read.exception(ANSWER_S), OSError)
    assert served.end() == 0


def test_a_request_that_is_taken_back_blocks_nothing(tmp_path: Path, target: Path, serve: Serve) -> None:
    """/dev/fuse was readable, but by the time it is read the request's caller has been killed."""
    served = serve(small_image(tmp_path))
    served.mount()
    for attempt in range(4):  # each time an even chance that the process reads before the caller is killed
        served.disturb("freeze")
        with subprocess.Popen(["stat", f"{target}/absent-{attempt}"], stderr=subprocess.DEVNULL) as caller:
            while Path(f"/proc/{caller.pid}/wchan").read_text() != "request_wait_answer":
                os.sched_yield()
            served.disturb("freeze")
            caller.kill()
            caller.wait(ANSWER_S)
        served.disturb("present")
        assert served.control(op="ping")["ok"] is True


def test_a_client_that_goes_away_takes_the_mount_with_it(tmp_path: Path, serve: Serve) -> None:
    served = serve(small_image(tmp_path))
    served.ask()
    assert served.mounted()
    served.connection.close()
    assert served.end() == 0
    assert not served.mounted()


def test_what_prevents_a_mount_is_said(tmp_path: Path, target: Path, serve: Serve) -> None:
    directory = small_image(tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        serve(directory).ask(target=str(directory / "data-0"))
    with pytest.raises(RemoteError, match="no such image"):
        serve(directory).ask("gone")
    assert serve(directory).ask("no-index")["manifest_digest"] == "sha256:" + 64 * "1"
    with pytest.raises(HostError, match="cannot do 'ping'"):
        serve(directory).ask(op="ping")
    namespace = directory / "namespace.erofs"
    damaged = bytearray(namespace.read_bytes())
    damaged[1100] ^= 1
    namespace.write_bytes(damaged)
    with pytest.raises(ImageError, match="damaged"):
        serve(directory).ask()


def test_an_ordinary_user_mounts_by_fusermount3(tmp_path: Path, target: Path, serve: Serve) -> None:
    directory = small_image(tmp_path)
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o711)
    os.chown(target, NOBODY, NOBODY)
    # /dev/fuse as distributions set it up, whatever it is here; in a mount namespace of the process's own.
    device = tmp_path / "dev-fuse"
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(10, 229))
    device.chmod(0o666)
    script = f'mount --bind {device} /dev/fuse && chown {NOBODY} {tmp_path}/run && exec "$@"'
    served = serve(directory, ["unshare", "--mount", "sh", "-c", script, "sh", *AS_NOBODY])
    served.mount()

    def inside(*command: str) -> bytes:
        enter = ["nsenter", "--target", str(served.process.pid), "--mount", *AS_NOBODY]
        return subprocess.run([*enter, *command], check=True, capture_output=True, timeout=ANSWER_S).stdout

    assert inside("cat", str(target / "near"), str(target / "far-2")) == b"near" * 5000 + b"000002" * 2000
    assert not served.mounted()  # in our namespace
    inside("fusermount3", "-u", str(target))
    assert served.end() == 0


def test_ephemeral_uppers_go_with_the_mount_and_only_those_of_the_cache(tmp_path: Path, serve: Serve) -> None:
    served = serve(small_image(tmp_path))
    reply = served.mount()
    assert set(reply) == {"ok", *REPLIES["fuse_mount"]}
    dev = reply["dev"]
    upper = tmp_path / "run/cache/uppers/abc"
    (upper / "upper").mkdir(parents=True)
    for directory in (upper.parent, upper.parent.parent):
        directory.chmod(0o700)
    report = {"dev": dev, "target": str(served.target), "ephemeral_upper": str(upper)}
    served.control(op="attached", attached=report)
    with pytest.raises(UserError):
        served.control(op="attached", attached=report | {"ephemeral_upper": str(tmp_path / "image")})
    subprocess.run(["umount", str(served.target)], check=True)
    assert served.end() == 0
    assert not upper.exists() and (tmp_path / "image").exists()
