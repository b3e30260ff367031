"""What somebody needs to know of a machine to judge its figures."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.command import PROGRAM
from benchmarks.host import COMMAND_DEADLINE_S, run

# The version is the last word of the first line, or the given one.
_PROGRAMS = {
    "containerd": (("containerd", "--version"), 2),
    "runc": (("runc", "--version"), 2),
    "umoci": (("umoci", "--version"), 2),
    "skopeo": (("skopeo", "--version"), 2),
    "docker-registry": (("docker-registry", "--version"), 2),
    "lazyfs": ((str(PROGRAM), "--version"), 1),
}


def facts() -> dict[str, Any]:
    """The record "host"'s part: kernel, processor, memory, and versions of what takes part."""
    versions = {}
    for name, (command, word) in _PROGRAMS.items():
        words = run(*command).split()
        versions[name] = words[min(word, len(words) - 1)]
    return {
        "Linux": platform.release(),
        "distribution": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "Python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        **versions,
        "commit": _commit(),
    }


def _commit() -> str:
    """Of the checkout that is measured; empty if it is none."""
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S
    )
    return result.stdout.strip()


def _processor() -> str:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
