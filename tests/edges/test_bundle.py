"""Bundles and containers with the real runc, on a root file system made of busybox."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazyfs import containers
from lazyfs.bundle import BundleOptions, delete_bundle, make_bundle
from lazyfs.core.oci import ImageConfig, parse_config
from lazyfs.errors import HostError, ImageError, LazyfsError, UserError
from lazyfs.imageroot import ImageRoot
from lazyfs.options import MountOptions
from tests.edges.plainroots import PlainRoots, run_arguments

APPLETS = (
    "sh",
    "cat",
    "echo",
    "env",
    "id",
    "ls",
    "mkdir",
    "mount",
    "readlink",
    "sleep",
    "stat",
    "stty",
    "touch",
)
DEADLINE_S = 30
# runc's names are the whole host's, and another run of the tests may be under way
HOSTS, KEPT, ORPHAN = (f"{name}-{os.getpid()}" for name in ("hosts", "kept", "orphan"))
ORDINARY = 12345  # an id that no account has


def make_template(directory: Path) -> Path:
    """A root with a shell and two accounts, and a configuration."""
    root = directory / "root"
    for name in ("bin", "etc", "empty", "seeded"):
        (root / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox, "install the package busybox-static"
    shutil.copy(busybox, root / "bin" / "busybox")
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\nbob:x:1000:1001::/home/bob:/bin/sh\n")
    (root / "etc" / "group").write_text("bob:x:1001:\nwheel:x:10:bob\n")
    (root / "seeded" / "file").write_text("seed")
    configure(directory)
    return directory


def configure(template: Path, **config: Any) -> None:
    """Writes the image's configuration, with the given fields of `config`."""
    document = {
        "os": "linux",
        "architecture": "amd64",
        "rootfs": {"type": "layers", "diff_ids": []},
        "config": {"Cmd": ["sh", "-c", "exit 0"]} | config,
    }
    (template / "config.json").write_text(json.dumps(document))


class Runner:
    """`lazyfs run` in this process; its container's output is read from the capture."""

    def __init__(self, template: Path, state: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.template = template
        self.state = state
        self._capture = capture
        self.roots = PlainRoots(template)

    def status(self, *arguments: str) -> int:
        return containers.run(run_arguments(list(arguments)), self.roots)

    def __call__(self, *arguments: str) -> str:
        status = self.status("--rm", *arguments)
        captured = self._capture.readouterr()
        assert status == 0, captured.err
        return captured.out

    def shell(self, script: str, *options: str) -> str:
        return self(*options, "image", "sh", "-ec", script)


@pytest.fixture
def template(tmp_path: Path) -> Path:
    return make_template(tmp_path / "template")


@pytest.fixture
def run(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Runner]:
    state = tmp_path / "state"
    monkeypatch.setattr(containers, "containers_directory", lambda: str(state))
    runner = Runner(template, state, capfd)
    yield runner
    mounts = Path("/proc/self/mountinfo").read_text()
    assert str(state) not in mounts


# -- what the container sees -----------------------------------------------------------------------------


def test_the_configuration_reaches_the_process(run: Runner) -> None:
    configure(run.template, Env=["A=1", "B=2"], WorkingDir="/seeded", User="bob", Entrypoint=["sh", "-c"])
    out = run("-e", "B=3", "-e", "C", "image", "id; pwd; echo $A$B-$HOME-$PATH")
    assert out.splitlines() == [
        "uid=1000(bob) gid=1001(bob) groups=10(wheel)",
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
    assert out.splitlines()[-1] == os.readlink("/proc/self/ns/net")


def test_the_process_is_confined(run: Runner) -> None:
    out = run.shell(
        "cat /proc/self/status; ls -d /proc/[0-9]*; ! mount -t tmpfs x /empty 2>&1; ! touch /proc/sys/x 2>&1"
    )
    assert "CapBnd:\t00000000a80425fb" in out  # Docker's set
    assert "NoNewPrivs:\t1" in out
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


def test_a_missing_bind_source_is_refused(run: Runner, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        run.status("-v", f"{tmp_path}/no:/x", "image")
    assert not run.state.exists()


@pytest.mark.parametrize("options", [[], ["--read-only"]])
def test_image_volumes_are_writable_and_keep_owner_and_contents(run: Runner, options: list[str]) -> None:
    os.chown(run.template / "root" / "empty", 1000, 1001)
    (run.template / "root" / "empty").chmod(0o750)
    configure(run.template, Volumes={"/empty": {}, "/seeded": {}, "/absent/dir": {}}, User="0")
    script = (
        "for d in /empty /seeded /absent/dir; do stat -c '%u %a' $d; echo > $d/new; done; cat /seeded/file"
    )
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


# -- exit status -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "exit 1"], 1),
        (["sh", "-c", "exit 127"], 127),
        (["sh", "-c", "sh -c 'kill -9 $$'; exit $?"], 137),
        (["no-such-program"], 127),
        (["/no/such/program"], 127),
        (["/etc/passwd"], 126),
    ],
)
def test_exit_status(run: Runner, command: list[str], status: int) -> None:
    assert run.status("--rm", "image", *command) == status
    assert not any(run.state.iterdir())


def test_what_runc_refuses_is_125(run: Runner) -> None:
    assert run.status("-w", "/etc/passwd", "image") == 125
    assert not any(run.state.iterdir())


def test_standard_input_passes_through(template: Path, tmp_path: Path) -> None:
    with started(template, tmp_path, "--rm", "image", "cat", stdin=subprocess.PIPE) as process:
        out, _ = process.communicate("through\n", timeout=DEADLINE_S)
    assert (out, process.returncode) == ("through\n", 0)


# -- what stays ------------------------------------------------------------------------------------------


def test_without_rm_the_files_stay_and_their_place_is_said(
    run: Runner, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run.status("--name", KEPT, "image", "sh", "-c", "echo 1 > /written; exit 127") == 127
    directory = run.state / KEPT
    assert str(directory) in capfd.readouterr().err
    assert (directory / "upper" / "written").read_text() == "1\n"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert not Path("/run/runc", KEPT).exists()
    with pytest.raises(UserError, match="already"):
        run.status("--name", KEPT, "image")
    assert (directory / "upper" / "written").exists()


def test_with_rm_even_hostile_leftovers_go(run: Runner) -> None:
    """Directories nested deeper than Python recurses."""
    run.shell("i=0; while [ $i -lt 1500 ]; do mkdir d; cd d; i=$((i+1)); done")
    assert not any(run.state.iterdir())


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a b", "x" * 64, "\u00e9"])
def test_bad_names_are_refused(run: Runner, name: str) -> None:
    with pytest.raises(UserError, match="name"):
        run.status(f"--name={name}", "image")


def test_a_failed_mount_leaves_nothing(run: Runner) -> None:
    with pytest.raises(HostError, match="no such image"):
        run.status("missing")
    assert not any(run.state.iterdir())
    assert run.roots.detached


def test_a_refused_configuration_leaves_nothing(run: Runner) -> None:
    configure(run.template, User="stranger")
    with pytest.raises(ImageError, match="stranger"):
        run.status("image")
    assert not any(run.state.iterdir())


def test_a_terminal_is_needed_for_t(template: Path, tmp_path: Path) -> None:
    with started(
        template, tmp_path, "-it", "image", stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "needs a terminal" in err


# -- signals ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(
    template: Path, tmp_path: Path, *arguments: str, prefix: tuple[str, ...] = (), **streams: Any
) -> Iterator[subprocess.Popen[str]]:
    """`lazyfs run` as a process of its own."""
    state = tmp_path / "state"
    command = [*prefix, sys.executable, "-m", "tests.edges.plainroots", str(template), str(state), *arguments]
    root = Path(__file__).resolve().parents[2]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE} | streams
    with subprocess.Popen(command, cwd=root, text=True, **streams) as process:
        try:
            yield process
            assert process.wait(DEADLINE_S) is not None
        finally:
            if process.poll() is None:  # so that the failure is the only thing it leaves
                process.terminate()
                process.wait(DEADLINE_S)
    assert str(state) not in Path("/proc/self/mountinfo").read_text()
    if "--rm" in arguments:
        assert not any(state.iterdir())


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


TRAPPING = "trap 'echo {0}; exit 3' {0}; echo ready; while :; do sleep 0.05; done"


@pytest.mark.parametrize(
    ("stop_signal", "sent", "trapped"),
    [
        ("", signal.SIGTERM, "TERM"),
        ("SIGQUIT", signal.SIGTERM, "QUIT"),
        ("", signal.SIGINT, "INT"),
        ("", signal.SIGHUP, "HUP"),
    ],
)
def test_a_signal_reaches_the_container(
    template: Path, tmp_path: Path, stop_signal: str, sent: int, trapped: str
) -> None:
    configure(template, StopSignal=stop_signal)
    with started(template, tmp_path, "--rm", "image", "sh", "-c", TRAPPING.format(trapped)) as process:
        assert first_line(process) == "ready\n"
        process.send_signal(sent)
        assert first_line(process) == f"{trapped}\n"
        assert process.wait(DEADLINE_S) == 3


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_container_that_ignores_the_signal_is_killed(template: Path, tmp_path: Path, sent: int) -> None:
    script = "trap '' INT TERM; echo ready; exec sleep 1000"
    command = ["--stop-timeout", "0.2", "--rm", "image", "sh", "-c", script]
    with started(template, tmp_path, *command) as process:
        assert first_line(process) == "ready\n"
        process.send_signal(sent)
        assert process.wait(DEADLINE_S) == 137


def test_a_second_interrupt_kills_at_once(template: Path, tmp_path: Path) -> None:
    script = "trap 'echo first' INT; echo ready; while :; do sleep 0.05; done"
    with started(
        template, tmp_path, "--stop-timeout", "1000", "--rm", "image", "sh", "-c", script
    ) as process:
        assert first_line(process) == "ready\n"
        process.send_signal(signal.SIGINT)
        assert first_line(process) == "first\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 137


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_mounting_leaves_nothing(template: Path, tmp_path: Path, sent: int) -> None:
    with started(template, tmp_path, "--rm", "slow") as process:
        assert first_line(process) == "attaching\n"
        process.send_signal(sent)
        assert process.wait(DEADLINE_S) == 128 + sent


def test_when_runc_is_killed_the_container_is_removed(template: Path, tmp_path: Path) -> None:
    command = ["--name", ORPHAN, "--rm", "image", "sh", "-c", "echo ready; exec sleep 1000"]
    with started(template, tmp_path, *command) as process:
        assert first_line(process) == "ready\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        os.kill(int(children[0]), signal.SIGKILL)
        assert process.wait(DEADLINE_S) == 137
    assert not Path("/run/runc", ORPHAN).exists()


def test_a_terminal(template: Path, tmp_path: Path) -> None:
    """The size is the terminal's, Ctrl-C goes to the container, the settings are as before afterwards."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    before = termios.tcgetattr(theirs)
    script = "trap 'echo interrupted; exit 4' INT; stty size; echo $TERM; while :; do sleep 0.05; done"
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    session = ("setsid", "--ctty", "--wait")
    command = ["-it", "--rm", "image", "sh", "-c", script]
    with (
        started(template, tmp_path, *command, prefix=session, **streams) as process,
        open(ours, "rb") as screen,
    ):
        assert screen.readline() == b"33 77\r\n"
        assert screen.readline() == b"xterm\r\n"
        os.write(ours, b"\x03")
        assert screen.readline().endswith(b"interrupted\r\n")
        assert process.wait(DEADLINE_S) == 4
        assert termios.tcgetattr(theirs) == before
    os.close(theirs)


# -- looking into a hostile image ------------------------------------------------------------------------


def test_account_files_are_read_inside_the_image_only(template: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("host:x:5:5::/:\n")
    etc = template / "root" / "etc"
    passwd = etc / "passwd"
    for target in (
        "/etc/passwd",
        "../../../../../../../../../../etc/passwd",
        str(secret),
        "/proc/self/environ",
        ".",
    ):
        passwd.unlink()
        passwd.symlink_to(target)
        with ImageRoot(str(template / "root")) as root:
            assert root.read_account_file("/etc/passwd") == b""
    passwd.unlink()
    passwd.symlink_to("/../lib/passwd")
    (template / "root" / "lib").mkdir()
    (template / "root" / "lib" / "passwd").write_text("inside")
    with ImageRoot(str(template / "root")) as root:
        assert root.read_account_file("/etc/passwd") == b"inside"
    shutil.rmtree(etc)
    etc.symlink_to("/etc")
    with ImageRoot(str(template / "root")) as root:
        assert root.read_account_file("/etc/passwd") == b""


def test_account_files_that_are_no_files_do_not_hold_us_up(template: Path) -> None:
    passwd = template / "root" / "etc" / "passwd"
    passwd.unlink()
    os.mkfifo(passwd)
    with ImageRoot(str(template / "root")) as root:
        assert root.read_account_file("/etc/passwd") == b""
    passwd.unlink()
    os.mknod(passwd, 0o020666, os.makedev(1, 5))  # /dev/zero has no end
    with ImageRoot(str(template / "root")) as root:
        assert root.read_account_file("/etc/passwd") == b""


def test_a_huge_account_file_is_refused(template: Path) -> None:
    os.truncate(template / "root" / "etc" / "group", 1 << 40)
    with ImageRoot(str(template / "root")) as root, pytest.raises(ImageError, match="larger"):
        root.read_account_file("/etc/group")


def test_paths_are_followed_inside_the_image(template: Path) -> None:
    root = template / "root"
    for name, target in (
        ("a", "/b/../c"),
        ("c", "d"),
        ("loop", "loop"),
        ("up", "../../etc"),
        ("p", "/proc/self"),
    ):
        (root / name).symlink_to(target)
    with ImageRoot(str(root)) as image:
        assert image.canonical("/a/x") == "/d/x"
        assert image.canonical("up/./passwd") == "/etc/passwd"
        assert image.canonical("/p/fd/8") == "/proc/self/fd/8"
        assert image.canonical("/..//") == "/"
        with pytest.raises(ImageError, match="symbolic links"):
            image.canonical("/loop/x")
        with pytest.raises(ImageError, match="too long"):
            image.canonical("/x" * 5000)


@pytest.mark.parametrize(
    ("config", "target"),
    [
        ({"WorkingDir": "/link/fd/8"}, "/proc/self"),
        ({"WorkingDir": "/link"}, "proc/1/cwd"),
        ({"Volumes": {"/link": {}}}, "/proc"),
        ({"Volumes": {"/link/x": {}}}, "../dev"),
        ({"Volumes": {"/etc/passwd": {}}}, "/"),
    ],
)
def test_links_to_forbidden_places_are_refused(run: Runner, config: dict[str, Any], target: str) -> None:
    """CVE-2024-21626 and CVE-2023-27561 by way of a symbolic link in the image."""
    (run.template / "root" / "link").symlink_to(target)
    configure(run.template, **config)
    with pytest.raises(ImageError):
        run.status("image")
    assert not any(run.state.iterdir())


# -- bundles by themselves -------------------------------------------------------------------------------


def test_a_bundle_stays_and_runs_under_plain_runc(template: Path, tmp_path: Path) -> None:
    configure(template, Cmd=["sh", "-c", "echo from the image > /written"], Labels={"run.oci.handler": "x"})
    roots = PlainRoots(template)
    directory = tmp_path / "bundle"
    bundle = make_bundle("image", str(directory), BundleOptions(mount=MountOptions(writable=True)), roots)
    try:
        assert "labels" in bundle.notes[0]
        command = ["runc", "run", "--bundle", str(directory), f"lazyfs-test-{os.getpid()}"]
        subprocess.run(command, check=True, timeout=DEADLINE_S)
        assert (directory / "upper" / "written").read_text() == "from the image\n"
        assert (directory / "config.json").stat().st_mode & 0o777 == 0o600
    finally:
        roots.detach(bundle.rootfs)


def test_the_bundle_command_says_what_to_do_next(
    template: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    containers.add_bundle_arguments(parser)
    directory = tmp_path / "bundle"
    roots = PlainRoots(template)
    args = parser.parse_args(["-e", "A=1", "--read-only", "image", str(directory), "sh", "-c", "exit 0"])
    try:
        assert containers.bundle(args, roots) == 0
        captured = capfd.readouterr()
        assert captured.out == f"{directory}\n"
        assert f"lazyfs umount {directory}/rootfs" in captured.err
        spec = json.loads((directory / "config.json").read_text())
        assert spec["process"]["args"] == ["sh", "-c", "exit 0"]
        assert spec["process"]["env"][0] == "A=1"
        assert spec["root"]["readonly"] is True
        with pytest.raises(HostError, match="still mounted"):
            delete_bundle(str(directory))
        assert (directory / "rootfs" / "bin" / "sh").exists()
    finally:
        roots.detach(str(directory / "rootfs"))
    delete_bundle(str(directory))
    assert not directory.exists()


def test_a_bundle_needs_an_empty_directory(template: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="not empty"):
        make_bundle("image", str(tmp_path / "full"), BundleOptions(), PlainRoots(template))
    with pytest.raises(UserError, match="cannot make"):
        make_bundle("image", str(tmp_path / "no" / "where"), BundleOptions(), PlainRoots(template))
    (tmp_path / "empty").mkdir(0o755)
    with pytest.raises(HostError, match="no such image"):
        make_bundle("missing", str(tmp_path / "empty"), BundleOptions(), PlainRoots(template))
    assert not any((tmp_path / "empty").iterdir())


# -- as an ordinary user ---------------------------------------------------------------------------------


class CopiedRoots:
    """A RootProvider that needs no rights."""

    def __init__(self, template: Path) -> None:
        self.template = template

    def attach(self, image: str, target: str, options: MountOptions) -> ImageConfig:
        assert not (options.writable or options.dev or options.suid)
        shutil.copytree(self.template / "root", target, symlinks=True, dirs_exist_ok=True)
        return parse_config((self.template / "config.json").read_bytes())

    def detach(self, target: str) -> None:
        pass


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that an ordinary user can reach."""
    directory = Path(tempfile.mkdtemp(prefix="bundle-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def as_ordinary_user(home: Path, roots: CopiedRoots, *arguments: str) -> tuple[int, str]:
    """Status and output of `lazyfs run` under an ordinary user's ids, in a child process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.setgroups([])
            os.setresgid(ORDINARY, ORDINARY, ORDINARY)
            os.setresuid(ORDINARY, ORDINARY, ORDINARY)
            os.environ["HOME"] = str(home)
            os.environ.pop("XDG_RUNTIME_DIR", None)
            os.environ.pop("XDG_STATE_HOME", None)
            sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115  (this process ends here)
            status = containers.run(run_arguments(list(arguments)), roots)
        except LazyfsError as error:
            os.write(1, str(error).encode())
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader) as output:
        text = output.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def test_an_ordinary_user_runs_a_container(public: Path) -> None:
    roots = CopiedRoots(make_template(public / "template"))
    home = public / "home"
    home.mkdir()
    os.chown(home, ORDINARY, ORDINARY)
    status, output = as_ordinary_user(home, roots, "--rm", "image", "sh", "-c", "id -u; exit 5")
    assert (status, output) == (5, "0\n")
    status, output = as_ordinary_user(home, roots, "--rm", "-u", "bob", "image")
    assert status == 99
    assert "uid 1000" in output
    assert not any((home / ".local" / "state" / "lazyfs" / "containers").iterdir())
