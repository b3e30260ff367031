"""umount, of mounts from a stand-in daemon."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lazyfs.control import query
from lazyfs.errors import UserError
from lazyfs.mounting import unmount
from lazyfs.system.mountinfo import mount_at
from tests.mounting.standin import Mount, said


def test_umount_names_who_uses_it(mount: Mount, target: Path, second: Path) -> None:
    mount()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, cwd=target) as user:
        with pytest.raises(unmount.Busy) as caught:
            unmount.umount(str(target))
        assert f"cat ({user.pid})" in str(caught.value) and caught.value.exit_code == 32
        unmount.umount(str(target), lazy=True)
        user.communicate()
    assert mount_at(str(target)) is None


def test_umount_names_what_is_mounted_below(mount: Mount, target: Path) -> None:
    mount(options="rw")
    (target / "inner").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(target / "inner")], check=True)
    try:
        with pytest.raises(unmount.Busy, match=r"mounted below it: .*inner"):
            unmount.umount(str(target))
    finally:
        subprocess.run(["umount", str(target / "inner")], check=True)


def test_users_of_open_and_mapped_files(mount: Mount, target: Path) -> None:
    mount()
    code = "import mmap,sys; f=open(sys.argv[1],'rb'); m=mmap.mmap(f.fileno(),0,prot=1); f.close(); input()"
    with (
        subprocess.Popen(
            [sys.executable, "-c", f"print(flush=True);{code}", str(target / "file")], stdin=-1, stdout=-1
        ) as user,
        open(target / "file"),
    ):
        assert user.stdout is not None
        user.stdout.readline()
        while not any(pid == user.pid for pid, _ in unmount.users_of(str(target))):
            assert user.poll() is None
        user.communicate(b"\n")


def test_umount_waits_until_the_daemon_has_let_go(mount: Mount, fake: Path, target: Path) -> None:
    mounted = mount(options="rw")
    served = query.daemon_of(mounted.dev)
    assert served is not None and served.reply["requests"] == 3
    unmount.umount(str(target), wait=True)
    assert [line["op"] for line in said(fake)][-1] == "list"


def test_umount_touches_only_lazyfs_mounts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a lazyfs mount"):
        unmount.umount(str(tmp_path))
    with pytest.raises(UserError, match="not a lazyfs mount"):
        unmount.umount("/proc")


def test_plain_umount_is_as_good(mount: Mount, target: Path) -> None:
    mounted = mount()
    subprocess.run(["umount", str(target)], check=True)
    assert mount_at(str(target)) is None
    unmount.wait_until_unmounted(mounted.target, mounted.dev)
