"""mount(8), umount(8) and fstab(5) with lazyfs: by way of /sbin/mount.lazyfs, as `make setup` installs it.

The helper is put over /sbin in a mount namespace of the test's own, so that the host keeps what it has there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lazyfs.system.mountinfo import mount_at
from tests.conftest import ROOT
from tests.whole.mounting import DEADLINE_S, Host

Script = Callable[..., "subprocess.CompletedProcess[str]"]

HELPER = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
from lazyfs.commands.mounthelper import main
main()
"""
OVER_SBIN = 'sbin=$(realpath /sbin); mount -t overlay -o "lowerdir=$0:$sbin" overlay "$sbin" || exit 99\n'


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Runs a shell script where `mount -t lazyfs` and `mount -t fuse.lazyfs` work, with arguments."""
    helpers = tmp_path / "sbin"
    helpers.mkdir()
    for name in ("mount.lazyfs", "mount.fuse.lazyfs"):
        (helpers / name).write_text(HELPER)
        (helpers / name).chmod(0o755)

    def run(text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        unshare = ["unshare", "--mount", "--propagation", "private", "--"]
        shell = ["sh", "-c", OVER_SBIN + text, str(helpers), *map(str, arguments)]
        return subprocess.run(unshare + shell, capture_output=True, text=True, timeout=2 * DEADLINE_S)

    return run


def test_mount_and_umount(machine: Host, script: Script, image: str) -> None:
    text = """
    mount -t lazyfs "$1" "$2" -o "$3" && cat "$2/etc/passwd" || exit
    awk '{print $5, $6}' /proc/self/mountinfo | tail -1
    umount "$2" && ls -A "$2"
    """
    target = machine.target()
    result = script(text, image, target, f"ro,{machine.options},noexec,noatime,x-test.a=b")
    assert result.stderr == "" and result.returncode == 0
    first, *_, last = result.stdout.splitlines()
    assert first == "root:x:0:0:root:/root:/bin/sh"
    assert last.startswith(f"{target} ro,nosuid,nodev,noexec")


def test_the_type_of_proc_mounts_means_the_fuse_backend(machine: Host, script: Script, image: str) -> None:
    text = """mount -t fuse.lazyfs "$1" "$2" -o "$3" && stat -f -c %T "$2" && umount "$2" """
    result = script(text, image, machine.target(), f"ro,cache={machine.cache}")
    assert (result.stderr, result.stdout) == ("", "fuseblk\n")  # FUSE's magic number, whatever the mount is


def test_fake_sloppy_and_no_mtab(machine: Host, script: Script, image: str) -> None:
    target = machine.target()
    text = 'mount -f -t lazyfs "$1" "$2" -o "$3"; echo $?; ls -A "$2"'
    nothing = script(text, image, target, machine.options)
    assert nothing.stdout == "0\n"
    assert not list((machine.cache).iterdir())  # not even a daemon was started
    text = """mount -s -n -t lazyfs "$1" "$2" -o "$3,nonsense=1" && ls "$2/etc/passwd" && umount "$2" """
    result = script(text, image, target, machine.options)
    assert result.stdout == f"{target}/etc/passwd\n", result.stderr


@pytest.mark.parametrize(
    ("reference", "options", "code", "text"),
    [
        ("", "nonsense", 1, "unknown mount option nonsense"),
        ("", "backend=none", 1, "use backend=auto, kernel or fuse"),
        ("", "remount", 1, "cannot be remounted"),
        ("Not/A:Name", "", 1, "Not/A:Name"),
        ("oci:/nowhere:tag", "", 1, "/nowhere"),
        ("127.0.0.1:9/none", "timeout=1", 32, "127.0.0.1:9"),
    ],
)
def test_exit_codes_and_messages(
    kernel_host: Host, script: Script, image: str, reference: str, options: str, code: int, text: str
) -> None:
    words = (reference or image, kernel_host.target(), f"{kernel_host.options},{options}")
    result = script('mount -t lazyfs "$1" "$2" -o "$3"; echo "code $?"; ls -A "$2"', *words)
    assert result.stdout == f"code {code}\n"
    assert text in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.startswith("mount.lazyfs: ")


def test_a_mount_point_that_is_taken(kernel_host: Host, script: Script, image: str) -> None:
    text = """
    mount -t lazyfs "$1" "$2" -o "$3" || exit
    mount -t lazyfs "$1" "$2" -o "$3"; echo $?
    umount "$2"
    """
    result = script(text, image, kernel_host.target(), kernel_host.options)
    assert result.stdout == "32\n" and "already" in result.stderr


def test_fstab(machine: Host, script: Script, image: str, tmp_path: Path) -> None:
    first, second, third = (machine.target() for _ in range(3))
    table = tmp_path / "fstab"
    table.write_text(
        f"{image} {first} lazyfs ro,_netdev,nofail,{machine.options} 0 0\n"
        f"{image} {second} lazyfs _netdev,noauto,ephemeral,{machine.options} 0 0\n"
        f"oci:/nowhere:x {third} lazyfs _netdev,nofail,noauto,{machine.options} 0 0\n"
    )
    text = """
    mount -T "$1" -a -O no_netdev; echo $?; ls -A "$2"
    mount -T "$1" -a; echo $?; ls "$2/etc/passwd"; ls -A "$3"
    mount -T "$1" "$3"; echo $?; echo written > "$3/etc/passwd"; cat "$3/etc/passwd"
    mount -T "$1" "$4"; echo $?
    umount "$2" "$3"; echo $?
    """
    result = script(text, table, first, second, third)
    expected = ["0", "0", f"{first}/etc/passwd", "0", "written", "1", "0"]
    assert result.stdout.splitlines() == expected, result.stderr
    assert result.stderr.count("\n") == 1 and "/nowhere" in result.stderr


def test_mount_py_of_a_source_tree(machine: Host, image: str) -> None:
    target = machine.target()
    command = [sys.executable, str(ROOT / "mount.py"), image, str(target), "-o", machine.options]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, env=environment, cwd="/", capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert mount_at(str(target)) is not None and (target / "etc/passwd").exists()
