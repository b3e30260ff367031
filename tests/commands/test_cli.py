"""The commands as users meet them: exit codes, one line of error, help, mount(8)'s helper."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.cache import places
from lazyfs.commands import arguments, doctor, main, mounthelper, report
from lazyfs.control import rundir
from lazyfs.errors import HostError, LazyfsError, UserError
from lazyfs.mounting.options import MountOptions
from lazyfs.system import host

ROOT = Path(__file__).resolve().parent.parent.parent
Lazyfs = Callable[..., "subprocess.CompletedProcess[str]"]
NOBODY = 65534


def helper(*words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lazyfs.commands.mounthelper", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        **more,
    )


# -- the command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["mount"], 1, "required: IMAGE, TARGET"),
        (["mount", "a", "/nowhere/at/all"], 1, "cannot mount on /nowhere/at/all: No such file or directory"),
        (["mount", "-o", "bakend=fuse", "a", "/"], 1, "did you mean backend?"),
        (["umount", "/proc"], 1, "/proc is not a lazyfs mount"),
        (["stats", "/"], 1, "/ is not a lazyfs mount"),
        (["cache", "gc"], 1, "cache gc needs --max-size"),
        (["cache", "gc", "--max-size", "many"], 1, "'many' is not a size"),
        (["frobnicate"], 1, "invalid choice: 'frobnicate'"),
        (["daemon", "--ping", "--stop"], 1, "not allowed with argument"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    lazyfs: Lazyfs, words: list[str], code: int, message: str
) -> None:
    result = lazyfs(*words, check=False)
    assert result.returncode == code and result.stdout == ""
    assert result.stderr.startswith("lazyfs: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_help_teaches(lazyfs: Lazyfs) -> None:
    overview = lazyfs("--help").stdout
    for command in ("index", "mount", "umount", "bundle", "run", "stats", "ls", "doctor", "inspect", "cache"):
        assert f"    {command} " in overview
        text = lazyfs(command, "--help").stdout
        assert "examples:" in text and f"lazyfs {command}" in text
    for option in ("upperdir=", "backend=", "timeout=", "allow_other", "insecure"):
        assert option in lazyfs("mount", "--help").stdout
    assert lazyfs("--version").stdout.startswith("lazyfs ")
    assert lazyfs(check=False).returncode == 1


def test_mount_py_is_lazyfs_mount(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "mount.py"), "a", str(tmp_path / "none")]
    result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == 1 and "cannot mount on" in result.stderr


def test_ls_without_mounts(lazyfs: Lazyfs, tmp_path: Path) -> None:
    assert isinstance(json.loads(lazyfs("ls", "--json").stdout), list)
    assert lazyfs("ls").returncode == 0


def test_no_daemon_to_talk_to(lazyfs: Lazyfs, cache: Path) -> None:
    result = lazyfs("daemon", "--ping", "--cache", cache, check=False)
    assert result.returncode == 2 and "no daemon answers" in result.stderr


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (KeyboardInterrupt(), 130, ""),
        (OSError(28, "No space left on device", "/c"), 2, "lazyfs: /c: No space left on device\n"),
        (MemoryError(), 2, "lazyfs: out of memory\n"),
        (HostError("a\nb", "c"), 2, "lazyfs: a b (c)\n"),
        (ZeroDivisionError("x"), 4, "lazyfs: bug: ZeroDivisionError: x"),
    ],
)
def test_whatever_happens_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    text: str,
) -> None:
    def fail(_: object) -> int:
        raise raised

    monkeypatch.setitem(main._COMMANDS, "ls", fail)
    assert main.main(["ls"]) == code
    assert capsys.readouterr().err.startswith(text)


def test_interrupted_from_the_keyboard(cache: Path, target: Path) -> None:
    """A mount that waits for its daemon: Ctrl-C ends it at once, with the shell's code."""
    import socket

    runtime = rundir.runtime_directory(str(cache))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(rundir.control_socket(runtime))
        listener.listen()
        words = ["mount", "-o", f"cache={cache}", "a", str(target)]
        with subprocess.Popen([sys.executable, "-m", "lazyfs.commands.main", *words], cwd=ROOT, stderr=-1) as process:
            connection, _ = listener.accept()
            with connection:
                assert json.loads(connection.recv(65536))["op"] == "lease"
                process.send_signal(signal.SIGINT)
                _, error = process.communicate(timeout=30)
        assert process.returncode == 130 and error == b""


HEAVY = {
    "asyncio", "bz2", "dataclasses", "hashlib", "httpx", "inspect", "pathlib", "shutil", "ssl", "subprocess",
    "threading", "trio",
}  # fmt: skip


# What neither a mount nor an umount loads.
LIGHT = {*HEAVY, "argparse", "collections", "contextlib", "enum", "json", "re", "socket", "typing"}


def modules_after(code: str) -> set[str]:
    """What a fresh interpreter has imported after `code`: counted rather than timed."""
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60)
    return set(done.stdout.split())


def test_the_way_to_a_container_stays_light() -> None:
    """What `run` and `bundle` import by their usual words."""
    loaded = modules_after(
        "from lazyfs.commands import containers, end, main, usual\n"
        "from lazyfs.containers import roots, run, store\n"
        "from lazyfs.mounting import overlay\n"
        "from lazyfs.system import detached, mountapi, startup\n"
        "containers.run_request(usual.parse(['run', '--rm', '-o', 'cache=/c', 'debian', 'sh']))"
    )
    assert not loaded & LIGHT
    loaded = modules_after("from lazyfs.commands import arguments; arguments.parser(['run'])")
    assert not loaded & HEAVY


def test_the_light_path_stays_light() -> None:
    """What `mount` imports must be the standard library's light part."""
    loaded = modules_after(
        "from lazyfs.commands import end, main, mount, usual\n"
        "from lazyfs.mounting import mount, options\n"
        "from lazyfs.system import detached, mountapi, startup\n"
        "usual.parse(['mount']); options.parse(['rw,cache=/c'])"
    )
    assert not loaded & LIGHT


def test_so_does_the_way_out() -> None:
    loaded = modules_after("from lazyfs.commands import end, main, mount, usual\nfrom lazyfs.mounting import unmount")
    assert not loaded & LIGHT


# -- doctor ----------------------------------------------------------------------------------------------


def test_doctor(lazyfs: Lazyfs, cache: Path) -> None:
    result = lazyfs("doctor", "--cache", cache, "--json", check=False)
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert {
        "kernel",
        "/dev/fuse",
        "EROFS from a file",
        "overlay on it",
        "cache directory",
        "backends",
    } <= set(checks)
    assert all(check["status"] in ("ok", "warn", "fail") for check in checks.values())
    assert all(check["advice"] for check in checks.values() if check["status"] != "ok")
    assert checks["EROFS from a file"]["status"] == "ok" and "kernel" in checks["backends"]["finding"]
    assert result.returncode == (1 if any(check["status"] == "fail" for check in checks.values()) else 0)
    assert "-> " in lazyfs("doctor", "--cache", cache, check=False).stdout


def test_doctor_sees_a_bad_cache_directory(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c").chmod(0o777)
    [check] = [check for check in doctor.examine(str(tmp_path / "c")) if check.name == "cache directory"]
    assert check.status == "fail" and "chmod 700" in check.advice


def test_kernel_versions_are_understood() -> None:
    assert host.kernel_version() >= (5, 10)
    assert host.has_filesystem("proc") and not host.has_filesystem("nosuchfs")


# -- directories -----------------------------------------------------------------------------------------


def test_cache_directories_are_private(tmp_path: Path) -> None:
    made = Path(places.cache_directory(str(tmp_path / "deep/cache")))
    assert made.stat().st_mode & 0o777 == 0o700
    os.chown(made, NOBODY, NOBODY)
    with pytest.raises(UserError, match="belongs to user"):
        places.cache_directory(str(made))
    (tmp_path / "file").touch()
    with pytest.raises(LazyfsError):
        places.cache_directory(str(tmp_path / "file"))
    with pytest.raises(HostError):
        places.cache_directory("/proc/nothing/here")


def test_a_runtime_directory_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rundir, "_bases", lambda: [str(tmp_path / "run")])
    runtime = Path(rundir.runtime_directory(str(tmp_path)))
    assert runtime.parent == tmp_path / "run" and runtime.name == rundir.key_of(str(tmp_path))
    assert list(rundir.all_sockets()) == []
    (runtime / "control.sock").touch()
    (runtime / "fuse-1.sock").touch()
    assert [Path(path).name for path in rundir.all_sockets()] == ["control.sock", "fuse-1.sock"]
    (tmp_path / "run").chmod(0o755)
    with pytest.raises(UserError, match="other users may enter"):
        rundir.runtime_directory(str(tmp_path))
    assert list(rundir.all_sockets()) == []
    (tmp_path / "run").chmod(0o700)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    (tmp_path / "run").symlink_to("elsewhere")
    with pytest.raises(UserError, match="not a directory"):
        rundir.runtime_directory(str(tmp_path))


# -- mount(8) --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["img", "/t", "-sfnv", "-o", "rw,noexec", "-t", "lazyfs"],
        ["-o", "rw,noexec", "-s", "-f", "img", "-n", "-v", "/t"],
        ["-sfnvorw,noexec", "img", "--", "/t"],
        ["img", "/t", "-fvs", "-o", "rw", "-o", "noexec"],
    ],
)
def test_helper_arguments(words: list[str]) -> None:
    found = mounthelper.parse(words)
    assert (found.image, found.target, found.fake, found.verbose) == ("img", "/t", True, True)
    assert found.options == MountOptions(executable=False)  # mount(8) says rw for everybody


def test_helper_chooses_fuse_by_its_name_or_type() -> None:
    assert mounthelper.parse(["a", "/t"], "/sbin/mount.fuse.lazyfs").options.backend == "fuse"
    assert mounthelper.parse(["a", "/t", "-t", "fuse.lazyfs"]).options.backend == "fuse"
    assert mounthelper.parse(["a", "/t", "-t", "lazyfs"]).options.backend == "auto"
    assert mounthelper.parse(["a", "/t", "-N", "/proc/1/ns/mnt"]).namespace == "/proc/1/ns/mnt"


@pytest.mark.parametrize("words", [[], ["a"], ["a", "b", "c"], ["a", "b", "-x"], ["a", "b", "-o"]])
def test_helper_refuses_a_wrong_command_line(words: list[str]) -> None:
    result = helper(*words)
    assert result.returncode == 1 and "mount.lazyfs IMAGE DIRECTORY" in result.stderr
    assert result.stderr.count("\n") == 1


@given(
    st.lists(
        st.sampled_from(["-", "--", "-o", "-N", "-t", "-s", "-fn", "-x", "a", "ro", "", "-orw"]), max_size=6
    )
)
def test_any_helper_command_line_is_parsed_or_refused(words: list[str]) -> None:
    try:
        mounthelper.parse(words)
    except UserError as error:
        assert error.exit_code == 1


def test_helper_dry_run_checks_but_does_not_mount(target: Path) -> None:
    assert helper("debian:12", target, "-f").returncode == 0
    assert helper("debian:12", target, "-f", "-o", "_netdev,nofail,x-systemd.automount").returncode == 0
    assert helper("Bad Image", target, "-f").returncode == 1
    assert helper("debian:12", target / "none", "-f").returncode == 1
    assert helper("debian:12", target, "-f", "-o", "sizelimit=3").returncode == 1
    assert helper("debian:12", target, "-sf", "-o", "sizelimit=3").returncode == 0
    assert not os.path.ismount(target)


def test_what_an_ordinary_user_may_not(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for option in ("dev", "suid", "rw", "backend=kernel"):
        code = (
            "import os, sys; sys.path.insert(0, sys.argv[1])\n"
            "from lazyfs.commands import main\n"
            f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
            "sys.exit(main.main(['mount', '-o', sys.argv[2], 'a', '/tmp']))"
        )
        words = [sys.executable, "-c", code, str(ROOT), option]
        result = subprocess.run(words, capture_output=True, text=True, cwd="/", timeout=60)
        assert result.returncode in (1, 2) and "needs root" in result.stderr, result.stderr


# -- formatting ------------------------------------------------------------------------------------------


def test_sizes_both_ways() -> None:
    assert [report.human_bytes(n) for n in (0, 999, 1000, 99_949, 999_499, 999_500, 123_456_789)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "99.9 kB",
        "999 kB",
        "1.0 MB",
        "123 MB",
    ]
    assert [arguments.size(text) for text in ("5", "500M", "1.5k", "2Gi", "1GB", "1GiB")] == [
        5,
        500_000_000,
        1500,
        2**31,
        10**9,
        2**30,
    ]


def test_tables_and_facts_cannot_drive_a_terminal() -> None:
    assert report.table(["A", "N"], [["x\x1b[2J", "1"], ["y", "10"]], right=[1]) == (
        "A          N\nx\\x1b[2J   1\ny         10\n"
    )
    assert report.fields({"bytes_fetched": 1500, "fuse": {"reads": 1234}, "on": True, "none": None}) == (
        "bytes_fetched  1.5 kB (1,500)\nfuse.reads     1,234\non             yes\nnone           -\n"
    )


def test_progress_and_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b" in report.coloured("fail", Terminal())
    assert report.coloured("fail", io.StringIO()) == "fail"
    monkeypatch.setenv("NO_COLOR", "1")
    assert report.coloured("ok", Terminal()) == "ok  "
    terminal, plain = Terminal(), io.StringIO()
    for stream in (terminal, plain):
        progress = report.ProgressLine(stream)
        progress("one")
        progress.clear()
    assert terminal.getvalue().endswith("\r\x1b[K") and plain.getvalue() == "lazyfs: one\n"
