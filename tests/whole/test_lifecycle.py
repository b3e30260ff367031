"""From the first mount to the end of the last process: who stays, who goes, and what is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.system.mountinfo import mount_at
from tests.conftest import Lazyfs
from tests.servers import RegistryServer
from tests.whole.conftest import Pushed
from tests.whole.mounting import (
    DEADLINE_S,
    Host,
    entry_at,
    foreground_daemon,
    host,
    processes,
    wait_for_exit,
    wait_until,
)

PASSWD = "root:x:0:0:root:/root:/bin/sh\n"


@contextlib.contextmanager
def busy(*command: str, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that prints a line when it is ready, and ends when its input does."""
    process = subprocess.Popen(command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.communicate(timeout=DEADLINE_S)


def test_everything_ends_after_a_plain_umount(machine: Host, image: str) -> None:
    if machine.backend == "kernel":
        with foreground_daemon(machine.cache) as daemon:
            target = machine.mount(image)
            assert (target / "etc/passwd").read_text().startswith(PASSWD)
            running = processes(machine.cache)
            assert daemon.pid in running and len(running) == 2  # the keeper, and its worker
            subprocess.run(["umount", str(target)], check=True)
            assert daemon.wait(DEADLINE_S) == 0
    else:
        target = machine.mount(image)
        running = processes(machine.cache)
        assert len(running) == 1
        subprocess.run(["umount", str(target)], check=True)
    for pid in running:
        wait_for_exit(pid)
    assert not machine.socket.exists() and not list(machine.runtime.glob("fuse-*"))
    assert not [one for one in machine.json("ls") if one["socket"].startswith(f"{machine.runtime}/")]


def test_umount_waits_when_asked_to(machine: Host, image: str) -> None:
    target = machine.mount(image, options="rw")
    uppers = machine.cache / "uppers"
    (target / "written").write_text("1")
    assert len(list(uppers.iterdir())) == 1
    machine.lazyfs("umount", "--wait", target)
    assert mount_at(str(target)) is None
    wait_until(lambda: not list(uppers.iterdir()))
    again = machine.mount(image, options="rw")
    assert not (again / "written").exists()
    result = machine.lazyfs("umount", target, check=False)
    assert result.returncode == 1 and "is not a lazyfs mount" in result.stderr


def test_umount_of_a_busy_mount_names_who_uses_it(machine: Host, image: str) -> None:
    target = machine.mount(image)
    with busy("sh", "-c", "echo ready; read line", cwd=target) as user:
        result = machine.lazyfs("umount", target, check=False)
        assert result.returncode == 32
        assert result.stderr.count("\n") == 1 and f"sh ({user.pid})" in result.stderr
        assert "is busy" in result.stderr and "--lazy" in result.stderr
        assert (target / "etc/passwd").read_text().startswith(PASSWD)
    machine.lazyfs("umount", target)


def test_a_lazily_unmounted_file_is_served_on(machine: Host, image: str) -> None:
    target = machine.mount(image)
    content = subprocess.run(["which", "busybox"], check=True, capture_output=True, text=True).stdout.strip()
    with (target / "bin/busybox").open("rb") as file:
        machine.lazyfs("umount", "--lazy", target)
        assert mount_at(str(target)) is None and not any(target.iterdir())
        assert file.read() == Path(content).read_bytes()
        running = processes(machine.cache)
    if machine.backend == "fuse":  # the kernel's daemon lingers
        for pid in running:
            wait_for_exit(pid)


def test_a_private_namespace_is_served_after_the_daemon_has_let_go(
    machine: Host, pushed: Pushed, registry: RegistryServer
) -> None:
    """Nothing but the kernel knows of the copy of the mount that another mount namespace holds. What it reads
    is fetched still."""
    image = f"{registry.host}/{pushed('busybox', 'gzip', True)}"
    with contextlib.ExitStack() as stack:
        if machine.backend == "kernel":
            stack.enter_context(foreground_daemon(machine.cache))
        target = machine.mount(image)
        script = f"echo ready; read line; cat {target}/etc/passwd {target}/bin/busybox | wc -c"
        expected = sum((target / name).stat().st_size for name in ("etc/passwd", "bin/busybox"))
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
        with busy(*command) as inside:
            running = processes(machine.cache)
            subprocess.run(["umount", str(target)], check=True)
            if machine.backend == "kernel":
                wait_until(lambda: not machine.socket.exists())
            assert processes(machine.cache) == running
            output, _ = inside.communicate("go\n", timeout=DEADLINE_S)
            assert output == f"{expected}\n"
        for pid in running:
            wait_for_exit(pid)


@pytest.fixture
def upper(tmp_path: Path) -> str:
    return f"rw,upperdir={tmp_path}/up,workdir={tmp_path}/work"


def test_what_is_written_to_an_upper_directory_stays(
    machine: Host, image: str, upper: str, tmp_path: Path
) -> None:
    first = machine.mount(image, options=upper)
    (first / "etc/new").write_text("new")
    (first / "etc/passwd").unlink()
    (first / "bin/busybox").chmod(0o700)
    machine.umount(first)
    assert (tmp_path / "up/etc/new").read_text() == "new"
    assert (tmp_path / "up/bin/busybox").stat().st_blocks <= 8  # no data was copied up
    second = machine.mount(image, options=upper)
    assert (second / "etc/new").read_text() == "new" and not (second / "etc/passwd").exists()
    assert (second / "bin/busybox").stat().st_mode & 0o777 == 0o700
    plain = machine.mount(image)
    assert (plain / "etc/passwd").exists() and (plain / "bin/busybox").stat().st_mode & 0o777 == 0o755
    machine.umount(second)
    assert (tmp_path / "up/etc/new").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {"ro", "nodev", "nosuid"}),
        ("dev,suid", {"ro"}),
        ("noexec", {"ro", "nodev", "nosuid", "noexec"}),
        ("rw,dev", {"rw", "nosuid"}),
    ],
)
def test_mountinfo_shows_the_options(machine: Host, image: str, options: str, expected: set[str]) -> None:
    entry = entry_at(machine.mount(image, options=options))
    assert set(entry.options) & {"ro", "rw", "nodev", "nosuid", "noexec"} == expected


def test_foreground_stays_until_it_is_told_to_end(machine: Host, image: str) -> None:
    target = machine.target()
    words = ["mount", "-o", f"{machine.options},foreground", image, str(target)]
    command = [sys.executable, "-m", "lazyfs.commands.main", *words]
    process = subprocess.Popen(command)
    try:
        wait_until(lambda: mount_at(str(target)) is not None)
        assert (target / "etc/passwd").exists()
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()
    assert mount_at(str(target)) is None


def test_a_killed_worker_has_a_successor_whoever_started_it(
    lazyfs: Lazyfs, image: str, tmp_path: Path
) -> None:
    """`lazyfs run` blocks signals around runc; the processes it starts must not inherit that."""
    with host(lazyfs, tmp_path, "kernel") as machine:
        lazyfs("run", "--rm", "-o", machine.options, image, "true")
        target = machine.mount(image)
        worker = machine.daemon_pid()
        os.kill(worker, signal.SIGKILL)
        assert (target / "bin/busybox").read_bytes()
        wait_until(lambda: machine.socket.exists() and machine.daemon_pid() != worker)
        machine.umount(target)
        lazyfs("daemon", "--stop", "--cache", machine.cache)  # though the image still lingers


def test_stop_refuses_while_something_is_mounted(lazyfs: Lazyfs, image: str, tmp_path: Path) -> None:
    with host(lazyfs, tmp_path, "kernel") as machine:
        target = machine.mount(image)
        result = lazyfs("daemon", "--stop", "--cache", machine.cache, check=False)
        assert result.returncode == 1 and "still mounted" in result.stderr
        before = machine.daemon_pid()
        lazyfs("daemon", "--upgrade", "--cache", machine.cache)
        assert (target / "bin/busybox").read_bytes()
        wait_until(lambda: machine.daemon_pid() != before)
        listed = json.loads(lazyfs("ls", "--json").stdout)
        (ours,) = [one for one in listed if one.get("cache") == str(machine.cache)]
        assert [place["target"] for place in ours["mounts"][0]["targets"]] == [str(target)]


def test_read_ahead_is_widened_when_everything_is_here(
    kernel_host: Host, pushed: Pushed, registry: RegistryServer
) -> None:
    def read_ahead() -> dict[str, str]:
        return {path.parent.name: path.read_text() for path in Path("/sys/class/bdi").glob("erofs-*/read_ahead_kb")}

    before = set(read_ahead())
    target = kernel_host.mount(f"{registry.host}/{pushed('busybox', 'gzip', True)}")
    (name,) = set(read_ahead()) - before
    assert read_ahead()[name] == "128\n"
    subprocess.run(["sh", "-c", 'find "$1" -type f -exec cat {} + > /dev/null', "sh", target], check=True)
    wait_until(lambda: read_ahead()[name] == "1024\n")
