"""This process, how to start one like it, and where other programs are."""

from __future__ import annotations

import os
import sys

# System directories that a user's PATH may lack.
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def resident_bytes() -> int:
    """Resident memory of this process (proc(5), statm)."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def find_program(name: str, path: str | None = None, *, also: str = "") -> str | None:
    """Where the executable `name` is: in the directories of `path` (by default PATH), then in those of `also`, both
    separated by colons. Like shutil.which, whose module imports decompressors: 3 ms of a start."""
    searched = os.environ.get("PATH", os.defpath) if path is None else path
    for directory in f"{searched}:{also}".split(":"):
        place = os.path.join(directory, name)
        if directory and os.access(place, os.X_OK) and os.path.isfile(place):
            return place
    return None


def process_fds(*words: str) -> list[int]:
    """Descriptors of the processes that have all these words on their command lines, each readable once its process has
    ended; the caller closes them. They are found even if they are ending, and listen to nobody."""
    wanted = {os.fsencode(word) for word in words}
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if wanted.issubset(file.read().split(b"\0")):
                    found.append(os.pidfd_open(int(pid)))
        except OSError:  # it has just ended
            pass
    return found


def python_command(module: str, *arguments: str) -> list[str]:
    """``python -P -S -m module``. -P: imports nothing from the current directory. -S: skips site, since `environment`
    says where modules are (5 ms of a start)."""
    return [sys.executable, "-P", "-S", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """The environment for `python_command`: the caller's own, and where modules are."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # where the package is
    places = dict.fromkeys([root, *(path for path in sys.path if os.path.isdir(path))])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
