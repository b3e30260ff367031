"""Clean-up by a child, though its parent is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEADLINE_S = 30
PROGRAM = """
import os, signal, sys
from lazyfs.system.guard import guarded

def clean_up():
    print("cleaned up by", "another" if os.getpid() != own else "itself", flush=True)
    if sys.argv[1] == "fail":
        raise RuntimeError("something is in the way")

own = os.getpid()
with guarded(clean_up):
    print("inside", flush=True)
    if sys.argv[1] == "raise":
        raise SystemExit(3)
    if sys.argv[1] == "signal":
        with open(f"/proc/self/task/{own}/children") as children:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(int(children.read()), number)
                children.seek(0)
    if sys.argv[1] != "leave":
        os.kill(os.getpid() if sys.argv[1] != "group" else 0, signal.SIGKILL)
print("left", flush=True)
"""


def outcome(how: str) -> tuple[int, str, str]:
    """Status and output of the program; its output ends when the guard has, too."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        start_new_session=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_whoever_leaves_needs_no_guard() -> None:
    assert outcome("leave") == (0, "inside\nleft\n", "")
    assert outcome("raise") == (3, "inside\n", "")


@pytest.mark.parametrize("how", ["kill", "group"])
def test_the_guard_cleans_up_after_a_killed_process(how: str) -> None:
    assert outcome(how) == (-signal.SIGKILL, "inside\ncleaned up by another\n", "")


def test_a_failure_is_said() -> None:
    status, _, said = outcome("fail")
    assert status == -signal.SIGKILL
    assert said == "lazyfs: clean-up after a killed command: something is in the way\n"


def test_signals_do_not_end_the_guard() -> None:
    """A terminal's or a service manager's signal reaches all processes."""
    assert outcome("signal")[1] == "inside\ncleaned up by another\n"
