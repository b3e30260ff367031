"""The client's side of a mount, against a stand-in daemon and the real kernel."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lazyfs.control import rundir
from lazyfs.errors import HostError, LazyfsError, RemoteError, UserError
from lazyfs.mounting import launch, unmount
from lazyfs.mounting.lease import Reporter
from lazyfs.mounting.target import AlreadyMounted
from lazyfs.sources.access import Access
from lazyfs.system.mountinfo import mount_at
from lazyfs.system.mountinfo import mounts as all_mounts
from tests.mounting.standin import FAKE, Mount, attributes, said, uppers

ROOT = Path(__file__).resolve().parents[2]

# -- mounting --------------------------------------------------------------------------------------------


def test_mount_starts_the_daemon_and_attaches_what_it_gives(mount: Mount, fake: Path, target: Path) -> None:
    seen: list[str] = []
    mounted = mount(reporter=Reporter(seen.append))
    assert (target / "file").read_text() == "from the image\n"
    assert attributes(target) == {"ro", "nodev", "nosuid"}
    assert seen == ["reading the index"]
    assert mounted.backend == "kernel" and not mounted.joined and mounted.target == str(target)
    assert mounted.manifest_digest == "sha256:" + "ab" * 32
    told = said(fake)[-1]["attached"]
    assert told["target"] == str(target) and told["ephemeral_upper"] is None
    assert told["dev"] == told["image_dev"] == "{}:{}".format(*mounted.dev)
    entry = mount_at(str(target))
    assert entry is not None and entry.dev == mounted.dev


def test_a_second_mount_joins(mount: Mount, fake: Path, target: Path, second: Path) -> None:
    first, other = mount(), mount(place=second)
    assert other.joined and other.dev == first.dev
    assert len({line["pid"] for line in said(fake)}) == 1
    unmount.umount(str(target))
    assert (second / "file").read_text() == "from the image\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("dev,suid", {"ro"}),
        ("noexec", {"ro", "nodev", "nosuid", "noexec"}),
        ("rw,nosuid,noexec", {"rw", "nodev", "nosuid", "noexec"}),
        ("rw,dev,suid", {"rw"}),
    ],
)
def test_options_of_the_mount_itself(mount: Mount, target: Path, options: str, expected: set[str]) -> None:
    mount(options=options)
    assert attributes(target) == expected


def test_noexec_and_nodev_are_obeyed(mount: Mount, target: Path, second: Path) -> None:
    mount(options="noexec")
    with pytest.raises(PermissionError):
        subprocess.run([str(target / "script")], check=False)
    with pytest.raises(PermissionError):
        (target / "null").read_bytes()
    mount(place=second, options="dev")
    assert subprocess.run([str(second / "script")], check=False).returncode == 7
    assert (second / "null").read_bytes() == b""


def test_a_writable_mount(mount: Mount, fake: Path, target: Path) -> None:
    mounted = mount(options="rw")
    (target / "new").write_text("written\n")
    (target / "file").write_text("changed\n")
    os.chown(target / "script", 5, 5)
    status = target.stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o751, 12, 34)
    assert os.getxattr(target, "user.note") == b"root"
    [ephemeral] = uppers(fake)
    assert str(ephemeral) == mounted.ephemeral_upper and ephemeral.stat().st_mode & 0o777 == 0o700
    told = said(fake)[-1]["attached"]
    assert told["ephemeral_upper"] == str(ephemeral)
    assert told["dev"] == "{}:{}".format(*mounted.dev) != told["image_dev"]


def test_the_root_keeps_its_time_in_a_writable_mount(mount: Mount, target: Path) -> None:
    mount(options="rw")
    assert target.stat().st_mtime == 1_000_000_000


def test_an_own_upper_directory_is_kept(mount: Mount, fake: Path, target: Path, tmp_path: Path) -> None:
    options = f"rw,upperdir={tmp_path}/up,workdir={tmp_path}/work"
    mount(options=options)
    (target / "new").write_text("kept\n")
    unmount.umount(str(target))
    assert (tmp_path / "up/new").read_text() == "kept\n" and not uppers(fake)
    mount(options=options)
    assert (target / "new").read_text() == "kept\n"
    assert target.stat().st_mode & 0o7777 == 0o751


def test_upper_and_work_on_two_file_systems(mount: Mount, target: Path, tmp_path: Path) -> None:
    shared = Path(f"/dev/shm/lazyfs-test-{os.getpid()}")
    try:
        with pytest.raises(UserError, match="different file systems"):
            mount(options=f"rw,upperdir={tmp_path}/up,workdir={shared}")
    finally:
        shutil.rmtree(shared, ignore_errors=True)
    assert mount_at(str(target)) is None


def test_an_upper_directory_that_overlayfs_refuses(mount: Mount, target: Path) -> None:
    with pytest.raises(LazyfsError, match="upper"):
        mount(options="rw,upperdir=/proc/self/fdinfo")
    assert mount_at(str(target)) is None


def helper(fake: Path, *words: object) -> list[str]:
    """The command line of mount(8)'s helper, with the stand-in daemon."""
    code = (
        "import sys; from lazyfs.commands import mounthelper; from lazyfs.mounting import launch\n"
        f"launch.python_command = lambda *w: [sys.executable, '-P', {str(FAKE)!r}, *w]\n"
        "sys.exit(mounthelper.run(sys.argv[1:]))"
    )
    return [sys.executable, "-c", code, *map(str, words), "-o", f"cache={fake}"]


@pytest.mark.parametrize("place", ["/proc/{}/ns/mnt", "{}"])
def test_another_mount_namespace(fake: Path, target: Path, place: str) -> None:
    with subprocess.Popen(["unshare", "-m", "sh", "-c", "echo; exec cat"], stdin=-1, stdout=-1) as other:
        assert other.stdin is not None and other.stdout is not None
        try:
            other.stdout.readline()  # it has its own namespace now
            words = helper(fake, "indexed", target, "-N", place.format(other.pid))
            subprocess.run(words, check=True, timeout=60, cwd=ROOT)
            assert not list(target.iterdir())
            assert Path(f"/proc/{other.pid}/root{target}/file").read_text() == "from the image\n"
        finally:
            other.stdin.close()


@pytest.mark.parametrize("how", ["umount", "SIGTERM", "SIGINT"])
def test_foreground_stays_until_unmounted(fake: Path, target: Path, how: str) -> None:
    words = helper(fake, "indexed", target, "-v", "-o", "foreground")
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "mounted on" not in process.stderr.readline():
            assert process.poll() is None
        assert (target / "file").exists() and process.poll() is None
        if how == "umount":
            subprocess.run(["umount", str(target)], check=True)
        else:
            process.send_signal(getattr(signal, how))
        process.communicate(timeout=30)
    assert process.returncode == (8 if how == "SIGINT" else 0)
    assert mount_at(str(target)) is None


def test_the_helper_mounts_and_refuses_to_mount_twice(fake: Path, target: Path) -> None:
    words = helper(fake, "indexed", target, "-n", "-o", "rw,ephemeral,_netdev,nofail,x-systemd.automount")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (target / "new").touch()
    assert subprocess.run(words, cwd=ROOT, capture_output=True, timeout=60).returncode == 32
    words = helper(fake, "broken", target.parent)
    assert subprocess.run(words, cwd=ROOT, capture_output=True, timeout=60).returncode == 32


def test_a_mount_unit_does_not_own_the_daemon(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/system.slice/mnt-image.mount\n")
    prefix = launch.service_manager_prefix("/run/lazyfs/0123", str(membership))
    assert os.path.basename(prefix[0]) == "systemd-run" and "--scope" in prefix and prefix[-1] == "--"
    membership.write_text("0::/user.slice/session-1.scope\n")
    assert launch.service_manager_prefix("/run/lazyfs/0123", str(membership)) == []


# -- failures --------------------------------------------------------------------------------------------


def test_what_the_daemon_reports_keeps_its_kind(mount: Mount, target: Path) -> None:
    with pytest.raises(RemoteError) as caught:
        mount("broken")
    assert str(caught.value) == "registry.test answers 503 (try later)"
    assert mount_at(str(target)) is None


def test_a_daemon_that_dies_is_started_again(mount: Mount, fake: Path, target: Path) -> None:
    mount("dies-once")
    assert (target / "file").exists()
    assert len({line["pid"] for line in said(fake)}) == 2


def test_a_daemon_that_always_dies(mount: Mount, target: Path) -> None:
    with pytest.raises(HostError):
        mount("dies")
    assert mount_at(str(target)) is None


def test_a_daemon_that_does_not_start_says_why(mount: Mount, fake: Path) -> None:
    (fake / "nokeeper").touch()
    with pytest.raises(HostError, match="no keeper today") as caught:
        mount()
    assert "daemon.log" in caught.value.hint


def test_auto_falls_back_to_fuse_and_says_so(mount: Mount, fake: Path, target: Path) -> None:
    seen: list[str] = []
    assert mount("hostproblem", reporter=Reporter(seen.append)).backend == "fuse"
    assert any("no EROFS from files here" in text for text in seen)
    with pytest.raises(HostError, match="no EROFS"):
        unmount.umount(str(target))
        mount("hostproblem", "backend=kernel")


def test_another_backend_mends_no_full_disk(mount: Mount) -> None:
    """Only what this backend cannot do is tried with the other one."""
    seen: list[str] = []
    with pytest.raises(HostError, match="no space left"):
        mount("diskfull", reporter=Reporter(seen.append))
    assert not any("backend=fuse" in text for text in seen)


def test_a_missing_index_is_built_once(mount: Mount, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool]] = []

    def build_missing_index(reference: str, cache: str, access: Access, push: bool, *more: object) -> None:
        assert cache == str(fake) and more[0] is None
        calls.append((reference, push))
        (fake / "built").touch()

    monkeypatch.setattr("lazyfs.indexing.missing.build_missing_index", build_missing_index)
    with pytest.raises(UserError, match="offline"):
        mount("unindexed", "offline")
    mount("unindexed", push_index=True)
    assert calls == [("unindexed", True)]


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_target_that_is_no_directory(mount: Mount, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="existing directory"):
        mount(place=tmp_path / name)


def test_mounting_twice_at_one_place(mount: Mount, target: Path) -> None:
    mount()
    with pytest.raises(AlreadyMounted) as caught:
        mount()
    assert caught.value.exit_code == 32


def test_a_failed_attachment_leaves_nothing(
    mount: Mount, fake: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lazyfs.control import messages

    def refuse(_: object) -> None:
        raise messages.ProtocolError("no")

    monkeypatch.setattr(messages, "format_dev", refuse)
    with pytest.raises(messages.ProtocolError):
        mount(options="rw")
    assert mount_at(str(target)) is None and not uppers(fake)


# -- fuse as root ----------------------------------------------------------------------------------------


def test_fuse_as_root_is_attached_like_the_kernels(mount: Mount, fake: Path, target: Path) -> None:
    mounted = mount(options="backend=fuse,rw,noexec")
    assert mounted.backend == "fuse" and attributes(target) == {"rw", "nodev", "nosuid", "noexec"}
    assert (target / "file").read_text() == "from the image\n"
    runtime = Path(rundir.runtime_directory(str(fake)))
    assert not list(runtime.glob("root-*"))
    assert not any(str(runtime) in entry.mountpoint for entry in all_mounts())
    unmount.umount(str(target), wait=True)
    assert not list(runtime.glob("fuse-*.sock"))


def test_fuse_mounts_of_an_image_share_one_process(
    mount: Mount, fake: Path, target: Path, second: Path
) -> None:
    first = mount(options="backend=fuse")
    other = mount(options="backend=fuse", place=second)
    assert other.joined and other.dev == first.dev
    assert [line["op"] for line in said(fake) if line.get("attached")] == ["attached", "attached"]
    assert len({line["pid"] for line in said(fake)}) == 1
    unmount.umount(str(target))
    assert (second / "file").read_text() == "from the image\n"
    unmount.umount(str(second), wait=True)


def test_a_killed_fuse_process(mount: Mount, fake: Path, target: Path, second: Path) -> None:
    """Its mount can be unmounted, and the next mount does not stumble over its socket."""
    mount(options="backend=fuse")
    pid = said(fake)[-1]["pid"]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    unmount.umount(str(target), wait=True)
    assert not mount(options="backend=fuse", place=second).joined
    runtime = Path(rundir.runtime_directory(str(fake)))
    assert [path.name for path in runtime.glob("fuse-*.sock")] == [f"fuse-{said(fake)[-1]['pid']}.sock"]


def test_a_fuse_process_that_dies_says_why(mount: Mount, fake: Path, target: Path) -> None:
    with pytest.raises(HostError, match="something terrible happened"):
        mount("dies", "backend=fuse")
    assert not list(Path(rundir.runtime_directory(str(fake))).glob("root-*"))
