"""What a container's process sees: its configuration, its mounts, its confinement. With the real runc."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lazyfs.errors import HostError, UserError
from tests.containers.lazyrun import Runner, configure

# runc's names are the whole host's, and another run of the tests may be under way
HOSTS = f"hosts-{os.getpid()}"


def test_the_configuration_reaches_the_process(run: Runner) -> None:
    configure(run.template, Env=["A=1", "B=2"], WorkingDir="/seeded", User="bob", Entrypoint=["sh", "-c"])
    out = run("-e", "B=3", "-e", "C", "image", "id; pwd; echo $A$B-$HOME-$PATH")
    assert out.splitlines() == [
        "uid=1000(bob) gid=1001(bob) groups=10(wheel),1001(bob)",
        "/seeded",
        "13-/home/bob-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ]


def test_options_override_the_image(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(run.template, WorkingDir="/x", User="bob", Entrypoint=["nothing"], Cmd=["nothing"])
    monkeypatch.setenv("FROM_HERE", "yes")
    options = ["-u", "0:7", "-w", "/made/dir", "-e", "FROM_HERE", "--entrypoint", "sh", "--hostname", "here"]
    out = run(*options, "image", "-c", "id -u; id -g; pwd; echo $FROM_HERE; cat /proc/sys/kernel/hostname")
    assert out.split() == ["0", "7", "/made/dir", "yes", "here"]


def test_names_resolve_as_on_the_host(run: Runner) -> None:
    (run.template / "root" / "etc" / "resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    out = run.shell("cat /etc/resolv.conf /etc/hosts; readlink /proc/1/ns/net", "--name", HOSTS)
    assert out.startswith(Path("/etc/resolv.conf").read_text())
    assert f"127.0.1.1\t{HOSTS}" in out
    assert run.shell("cat /etc/hostname; echo $HOSTNAME", "--hostname", "web1") == "web1\nweb1\n"
    (run.template / "root" / "etc" / "hostname").write_text("buildkitsandbox\n")
    assert run.shell("cat /etc/hostname", "--hostname", "web1") == "web1\n"
    assert out.splitlines()[-1] == os.readlink("/proc/self/ns/net")


def test_the_process_is_confined(run: Runner) -> None:
    out = run.shell(
        "cat /proc/self/status; ls -d /proc/[0-9]*; ! mount -t tmpfs x /empty 2>&1; ! touch /proc/sys/x 2>&1"
    )
    assert "CapBnd:\t00000000a80425fb" in out  # Docker's set
    assert "NoNewPrivs:\t0" in out
    confined = run.shell("cat /proc/self/status", "--security-opt", "no-new-privileges:true")
    assert "NoNewPrivs:\t1" in confined
    with pytest.raises(UserError, match="seccomp"):
        run.status("--security-opt", "seccomp=x", "image")
    assert "/proc/1\n" in out
    assert f"/proc/{os.getpid()}\n" not in out


def test_volumes_tmpfs_and_binds(run: Runner, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "in").write_text("hello")
    binds = ["-v", f"{outside}:/made/by/runc", "-v", f"{outside}/in:/file:ro"]
    script = """cat /made/by/runc/in /file; echo > /made/by/runc/new; ! echo 2>&1 > /file
        stat -f -c %T /scratch; stat -c %a /scratch"""
    out = run.shell(script, *binds, "--tmpfs", "/scratch:size=1m,mode=700")
    assert out.startswith("hellohello")
    assert out.split()[-2:] == ["tmpfs", "700"]
    assert (outside / "new").exists()
    assert (outside / "in").read_text() == "hello"


@pytest.mark.parametrize("volume", ["data", "./data", "/sys/fs/cgroup", "/dev/shm", '["/a",', "", "/link/fd"])
def test_volumes_in_odd_forms_do_not_stop_a_container(
    run: Runner, capfd: pytest.CaptureFixture[str], volume: str
) -> None:
    """As Docker runs them; what is the system's stays so."""
    (run.template / "root" / "link").symlink_to("/proc/self")
    configure(run.template, Cmd=["ls", "/"], Volumes={volume: {}})
    assert run.status("--rm", "image") == 0
    captured = capfd.readouterr()
    assert ("is left out" in captured.err) == volume.startswith(("/sys", "/dev", "/link"))
    assert ("data" in captured.out.split()) == volume.endswith("data")


def test_a_mount_of_the_user_goes_before_a_volume_in_a_system_directory(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("")
    configure(run.template, Volumes={"/sys/fs/cgroup": {}})
    assert run.shell("ls /sys/fs/cgroup", "-v", f"{tmp_path}/mine:/sys/fs/cgroup") == "file\n"


def test_a_missing_bind_source_is_refused(run: Runner, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        run.status("-v", f"{tmp_path}/no:/x", "image")
    assert not run.state.exists()


@pytest.mark.parametrize("options", [[], ["--read-only"]])
def test_image_volumes_are_writable_and_keep_owner_and_contents(run: Runner, options: list[str]) -> None:
    os.chown(run.template / "root" / "empty", 1000, 1001)
    (run.template / "root" / "empty").chmod(0o750)
    configure(run.template, Volumes={"/empty": {}, "/seeded": {}, "/absent/dir": {}}, User="0")
    script = "for d in /empty /seeded /absent/dir; do stat -c '%u %a' $d; echo > $d/new; done; cat /seeded/file"
    assert run.shell(script, *options).split() == ["1000", "750", "0", "755", "0", "755", "seed"]
    assert not (run.template / "root" / "empty" / "new").exists()


def test_read_only(run: Runner) -> None:
    """Mount points that the image lacks are made all the same."""
    out = run.shell("! touch /x 2>&1; echo > /scratch/x; ls /scratch", "--read-only", "--tmpfs", "/scratch")
    assert "Read-only file system" in out
    assert out.split()[-1] == "x"


def test_a_read_only_mount_needs_its_mount_points(run: Runner) -> None:
    with pytest.raises(HostError, match="no place at /proc"):
        run.status("-o", "ro", "image")
    for name in ("proc", "dev", "sys"):
        (run.template / "root" / name).mkdir()
    assert run.shell("! touch /x 2>&1", "-o", "ro").endswith("Read-only file system\n")
    assert not any(run.state.iterdir())
