"""Upper directories of `rw` mounts: none is lost, and none is taken away from under an overlay that lives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

from tests.whole.mounting import DEADLINE_S, Host, foreground_daemon, processes, wait_for_exit, wait_until


def uppers(machine: Host) -> list[Path]:
    return list((machine.cache / "uppers").iterdir())


def kill_all(machine: Host) -> None:
    for pid in sorted(processes(machine.cache)):  # the keeper is older than its worker
        os.kill(pid, signal.SIGKILL)
        wait_for_exit(pid)


def test_what_killed_processes_left_is_removed_by_the_next_daemon(kernel_host: Host, image: str) -> None:
    target = kernel_host.mount(image, options="rw")
    (target / "etc/passwd").write_text("written\n")
    (upper,) = uppers(kernel_host)
    kill_all(kernel_host)
    assert (target / "etc/passwd").read_text() == "written\n"
    kept = kernel_host.mount(image, options="rw")  # another daemon, while that overlay lives
    listed = kernel_host.lazyfs("cache", "du", "--json", "--cache", kernel_host.cache).stdout
    assert {(one["path"], one["in_use"]) for one in _uppers_of(listed, kernel_host)} == {
        (str(path), True) for path in uppers(kernel_host)
    }
    assert (target / "etc/passwd").read_text() == "written\n" and upper.exists()
    subprocess.run(["umount", str(target)], check=True)
    kernel_host.lazyfs("cache", "gc", "--max-size", "1T", "--cache", kernel_host.cache)
    assert not upper.exists() and len(uppers(kernel_host)) == 1
    (kept / "new").write_text("x")
    kernel_host.umount(kept)
    kill_all(kernel_host)
    kernel_host.mount(image)
    wait_until(lambda: not uppers(kernel_host))


def _uppers_of(listing: str, machine: Host) -> list[dict[str, object]]:
    found = [one for one in json.loads(listing)["entries"] if one["kind"] == "upper"]
    return [one | {"path": str(machine.cache / "uppers" / one["name"])} for one in found]


def test_a_private_namespace_keeps_its_upper_directory(kernel_host: Host, image: str) -> None:
    with foreground_daemon(kernel_host.cache, linger_s=60):
        target = kernel_host.mount(image, options="rw")
        (upper,) = uppers(kernel_host)
        script = f"echo ready; read line; echo new > {target}/etc/new && cat {target}/etc/new"
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
        inside = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert inside.stdout is not None and inside.stdout.readline() == "ready\n"
        subprocess.run(["umount", str(target)], check=True)
        wait_until(lambda: (upper / "probe").exists())  # the daemon has asked the kernel
        output, _ = inside.communicate("go\n", timeout=DEADLINE_S)
        assert output == "new\n" and inside.returncode == 0
        wait_until(lambda: not upper.exists())
