"""Starts of mounted images are traced by both backends, and `lazyfs profile show` tells what they touched."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.profiles import load_profile
from lazyfs.control import client
from lazyfs.control.messages import format_dev
from lazyfs.core.layer.blocks import BLOCK_BYTES
from lazyfs.core.oci.digests import Digest
from lazyfs.core.starts.profile import Profile
from lazyfs.errors import UserError
from tests.layertar import LayerTar
from tests.layout import GZIP, PLAIN, Layout
from tests.whole.mounting import DEADLINE_S, LINGER_S, Host, entry_at, foreground_daemon, host, processes, wait_until

LARGE = 3 * BLOCK_BYTES


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    layout = Layout(tmp_path_factory.mktemp("profile") / "layout")
    base = LayerTar().file("bin/large", os.urandom(LARGE)).file("etc/small", os.urandom(3000)).data()
    for tag in ("app", "other"):
        own = LayerTar().file(tag, os.urandom(70_000)).data()
        layout.tag(tag, layout.add_image([layout.add_layer(base, GZIP), layout.add_layer(own, PLAIN)]))
    return f"oci:{layout.path}:app"


def digest_of(reference: str) -> str:
    path, _, tag = reference.removeprefix("oci:").rpartition(":")
    return str(Layout(Path(path)).resolve(tag)["digest"])


def end_trace(machine: Host, target: Path) -> dict[str, Any]:
    """Asks the process behind a mount to end the trace."""
    dev = entry_at(target).dev
    for path in machine.runtime.glob("*.sock"):
        with contextlib.suppress(UserError):  # another fuse process of this host serves it
            return client.ask_once(str(path), {"op": "profile", "dev": format_dev(dev)}, DEADLINE_S)
    raise AssertionError("nobody serves that mount")


def profile_of(machine: Host, digest: str) -> Profile | None:
    return load_profile(CacheDirectory(str(machine.cache)), Digest(digest))


def names(profile: Profile | None) -> list[tuple[str, int]]:
    assert profile is not None
    return [(touch.path.decode(), touch.part) for touch in profile.touches]


def test_a_start_is_traced_until_somebody_asks(machine: Host, reference: str) -> None:
    target = machine.mount(reference)
    (target / "etc/small").read_bytes()
    (target / "app").read_bytes()
    reply = end_trace(machine, target)
    assert set(reply) == {"ok", "manifest_digest", "blocks"} and reply["blocks"] == 2
    found = profile_of(machine, reply["manifest_digest"])
    assert found is not None and found.starts == 1 and names(found) == [("etc/small", 0), ("app", 0)]
    (target / "bin/large").read_bytes()
    assert end_trace(machine, target)["blocks"] == 0
    assert profile_of(machine, reply["manifest_digest"]) == found


def test_show_ends_the_trace_and_tells(machine: Host, reference: str) -> None:
    target = machine.mount(reference)
    (target / "bin/large").read_bytes()
    found = machine.json("profile", "show", "-o", machine.options, reference)
    (file,) = found["files"]
    assert (file["path"], file["blocks"], file["size_bytes"]) == ("/bin/large", 3, LARGE)
    assert [one["depth"] for one in found["layers"]] == [1] and found["starts"] == 1
    assert end_trace(machine, target)["blocks"] == 0


def test_an_early_unmount_ends_the_start(machine: Host, reference: str) -> None:
    target = machine.mount(reference)
    digest = digest_of(reference)
    (target / "etc/small").read_bytes()
    machine.umount(target)
    wait_until(lambda: profile_of(machine, digest))
    assert names(profile_of(machine, digest)) == [("etc/small", 0)]


def test_nothing_is_learned_if_that_is_off(machine: Host, reference: str) -> None:
    target = machine.mount(reference, options="learn=off")
    (target / "etc/small").read_bytes()
    assert end_trace(machine, target)["blocks"] == 0
    assert CacheDirectory(str(machine.cache)).profile_paths() == []


def test_nothing_is_kept_of_a_mount_that_is_not_read(machine: Host, reference: str) -> None:
    target = machine.mount(reference)
    assert sorted(os.listdir(target)) == ["app", "bin", "etc"]
    assert end_trace(machine, target)["blocks"] == 0
    machine.umount(target)
    machine.forget()
    assert CacheDirectory(str(machine.cache)).profile_paths() == []


def test_ten_containers_of_one_root_are_one_start(machine: Host, reference: str) -> None:
    targets = [machine.mount(reference) for _ in range(10)]

    def start(number: int) -> None:
        paths = ["etc/small", "app", "bin/large"]
        for path in paths[number % 3 :] + paths[: number % 3]:
            (targets[number] / path).read_bytes()

    with ThreadPoolExecutor(10) as threads:
        list(threads.map(start, range(10)))
    digest = end_trace(machine, targets[0])["manifest_digest"]
    found = profile_of(machine, digest)
    assert found is not None and found.starts == 1
    assert sorted(names(found)) == [("app", 0), *[("bin/large", part) for part in range(3)], ("etc/small", 0)]
    assert [end_trace(machine, target)["blocks"] for target in targets] == [0] * 10


def test_images_that_share_a_layer_are_traced_apart(kernel_host: Host, reference: str) -> None:
    """One daemon serves the layer for both; the page cache of the layer is common, too."""
    first, second = kernel_host.mount(reference), kernel_host.mount(reference.replace(":app", ":other"))
    (first / "etc/small").read_bytes()
    (first / "app").read_bytes()
    (second / "other").read_bytes()
    one, other = end_trace(kernel_host, first), end_trace(kernel_host, second)
    assert one["manifest_digest"] != other["manifest_digest"]
    assert names(profile_of(kernel_host, one["manifest_digest"])) == [("etc/small", 0), ("app", 0)]
    assert names(profile_of(kernel_host, other["manifest_digest"])) == [("etc/small", 0), ("other", 0)]


def test_an_upgrade_keeps_what_was_seen(kernel_host: Host, reference: str) -> None:
    target = kernel_host.mount(reference)
    (target / "etc/small").read_bytes()
    before = kernel_host.daemon_pid()
    kernel_host.lazyfs("daemon", "--upgrade", "--cache", kernel_host.cache)
    wait_until(lambda: kernel_host.daemon_pid() != before)
    assert (target / "app").stat().st_size == len((target / "app").read_bytes())
    reply = end_trace(kernel_host, target)
    assert reply["blocks"] == 0  # the successor did not see the start's beginning
    assert names(profile_of(kernel_host, reply["manifest_digest"])) == [("etc/small", 0)]


def test_a_killed_worker_loses_the_trace_only(kernel_host: Host, reference: str) -> None:
    target = kernel_host.mount(reference)
    (target / "etc/small").read_bytes()
    before = kernel_host.daemon_pid()
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: kernel_host.daemon_pid() != before)
    assert len((target / "bin/large").read_bytes()) == LARGE
    reply = end_trace(kernel_host, target)
    assert reply["blocks"] == 0 and profile_of(kernel_host, reply["manifest_digest"]) is None
    kernel_host.umount(target)
    again = kernel_host.mount(reference)
    (again / "app").read_bytes()
    assert end_trace(kernel_host, again)["blocks"] in (0, 1)  # 0: its page cache has it


def test_a_stopped_fuse_process_keeps_what_was_seen(lazyfs: Any, tmp_path: Path, reference: str) -> None:
    with host(lazyfs, tmp_path, "fuse") as machine:
        target = machine.mount(reference)
        (target / "etc/small").read_bytes()
        (pid,) = processes(machine.cache)
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: profile_of(machine, digest_of(reference)))
        assert names(profile_of(machine, digest_of(reference))) == [("etc/small", 0)]


def test_a_daemon_that_ends_keeps_what_was_seen(kernel_host: Host, reference: str) -> None:
    with foreground_daemon(kernel_host.cache, LINGER_S) as daemon:
        target = kernel_host.mount(reference)
        digest = digest_of(reference)
        (target / "etc/small").read_bytes()
        subprocess.run(["umount", str(target)], check=True)
        assert daemon.wait(DEADLINE_S) == 0
    assert names(profile_of(kernel_host, digest)) == [("etc/small", 0)]
