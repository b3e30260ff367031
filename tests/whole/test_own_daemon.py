"""A daemon that belongs to one command works on the same cache as others, and sees every read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyfs.control import client, messages, rundir
from lazyfs.mounting.mount import mount
from lazyfs.mounting.options import parse
from lazyfs.mounting.owndaemon import end_daemon
from lazyfs.system.mountinfo import mount_at
from tests import realimages
from tests.conftest import unmount
from tests.whole import trees
from tests.whole.mounting import Host, processes, wait_until


@pytest.fixture
def runtime() -> Iterator[str]:
    directory = rundir.own_runtime_directory()
    yield directory
    end_daemon(directory)
    assert not os.path.exists(directory) and not processes(Path(directory))


def bytes_read(runtime: str, target: Path) -> int:
    """What was read through the processes of a runtime directory, page caches apart."""
    entry = mount_at(str(target))
    assert entry is not None
    request = {"op": "stats", "dev": messages.format_dev(entry.dev)}
    [path] = list(rundir.fuse_sockets(runtime)) or [rundir.control_socket(runtime)]
    return int(client.ask_once(path, request)["bytes_read"])


def test_it_sees_what_others_have_in_their_page_cache(machine: Host, runtime: str) -> None:
    image = f"oci:{realimages.busybox()}:gzip"
    first = machine.mount(image)
    whole = trees.read(first)
    if machine.backend == "kernel":
        wait_until(lambda: list((machine.cache / "layers").glob("*/sound")))  # sealed: the kernel could read by itself
    target = machine.target()
    mounted = mount(image, str(target), parse([machine.options]), own_runtime=runtime)
    assert mounted.backend == machine.backend and not mounted.joined
    before = bytes_read(runtime, target)
    busybox = (target / "bin/busybox").read_bytes()
    assert bytes_read(runtime, target) - before >= len(busybox)
    assert trees.differences(target, trees.Tree(whole, frozenset())) == []
    unmount(target)
    end_daemon(runtime)
    assert trees.differences(first, trees.Tree(whole, frozenset())) == [], "the other daemon is as it was"


def test_two_have_nothing_in_common(kernel_host: Host, runtime: str) -> None:
    image = f"oci:{realimages.busybox()}:gzip"
    options = parse([kernel_host.options])
    another = rundir.own_runtime_directory()
    one, two = kernel_host.target(), kernel_host.target()
    try:
        devices = {
            mount(image, str(one), options, own_runtime=runtime).dev,
            mount(image, str(two), options, own_runtime=another).dev,
        }
        assert len(devices) == 2 and runtime != another
        unmount(one)
        end_daemon(runtime)
        assert (two / "bin/busybox").read_bytes()
    finally:
        unmount(two)
        end_daemon(another)


def test_to_end_what_never_ran_is_no_error() -> None:
    directory = rundir.own_runtime_directory()
    end_daemon(directory)
    end_daemon(directory)
    assert not os.path.exists(directory)
