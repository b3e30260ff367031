"""How containers end: exit status, what stays behind, signals. With the real runc."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from lazyfs.containers.store import ContainerStore
from lazyfs.errors import HostError, ImageError, UserError
from tests.containers.lazyrun import DEADLINE_S, Runner, configure, first_line, started

# runc's names are the whole host's, and another run of the tests may be under way
KEPT, ORPHAN = (f"{name}-{os.getpid()}" for name in ("kept", "orphan"))

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


@pytest.mark.parametrize(("flags", "read"), [(["-i"], "through\n"), ([], "")])
def test_standard_input_passes_through_if_asked_for(
    template: Path, tmp_path: Path, flags: list[str], read: str
) -> None:
    """As in Docker: a container in a shell's loop does not eat what the loop reads."""
    with started(template, tmp_path, "--rm", *flags, "image", "cat", stdin=subprocess.PIPE) as process:
        out, _ = process.communicate("through\n", timeout=DEADLINE_S)
    assert (out, process.returncode) == (read, 0)


# -- what stays ------------------------------------------------------------------------------------------


def test_without_rm_the_files_stay_and_their_place_is_said(run: Runner, capfd: pytest.CaptureFixture[str]) -> None:
    assert run.status("--name", KEPT, "image", "sh", "-c", "echo 1 > /written; exit 127") == 127
    directory = run.state / KEPT
    assert str(directory) in capfd.readouterr().err
    assert (directory / "upper" / "written").read_text() == "1\n"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert not Path("/run/runc", KEPT).exists()
    with pytest.raises(UserError, match="already"):
        run.status("--name", KEPT, "image")
    assert (directory / "upper" / "written").exists()


def test_what_stays_is_recorded(run: Runner) -> None:
    before_s = time.time()
    run.status("--name", KEPT, "image")
    store = ContainerStore(str(run.state))
    [listed] = store.listing()
    container = listed.container
    assert (listed.name, listed.held) == (KEPT, False) and container is not None
    assert container.directory == str(run.state / KEPT) and container.keep
    assert container.image == "plain:image" and container.manifest_digest == "sha256:" + "ab" * 32
    assert container.platform == "linux/amd64" and before_s <= container.created_s <= time.time()
    store.remove(KEPT)
    assert store.listing() == [] and not any(run.state.iterdir())


@pytest.mark.parametrize("command", [["slow"], ["--rm", "image", "sh", "-c", "echo ready; exec sleep 9"]])
def test_the_name_of_a_killed_run_is_free_again(
    template: Path, run: Runner, command: list[str]
) -> None:
    """Killed while it mounts, and, when nothing was to be kept, while its container ran."""
    words = [sys.executable, "-m", "tests.containers.plainroots", str(template), str(run.state), "--name", KEPT]
    root = Path(__file__).parents[2]
    with subprocess.Popen([*words, *command], cwd=root, text=True, stdout=subprocess.PIPE) as process:
        first_line(process)
        with pytest.raises(UserError, match=KEPT):
            run.status("--name", KEPT, "image")
        process.kill()
        process.wait(DEADLINE_S)
    [left] = ContainerStore(str(run.state)).listing()
    assert not left.held
    subprocess.run(["runc", "delete", "--force", KEPT], check=False, stderr=subprocess.DEVNULL)
    assert run.shell("echo again", "--name", KEPT) == "again\n"
    assert not any(run.state.iterdir())


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
    with started(template, tmp_path, "-it", "image", stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "needs a terminal" in err


# -- signals ---------------------------------------------------------------------------------------------


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
    with started(template, tmp_path, "--stop-timeout", "1000", "--rm", "image", "sh", "-c", script) as process:
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
