"""An image that is here as a whole, and was compared with its marks, is read by the kernel alone at its next mount."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests import realimages
from tests.servers import RegistryServer
from tests.whole import trees
from tests.whole.conftest import Pushed
from tests.whole.mounting import Host, processes, wait_for_exit, wait_until


def directly(machine: Host, target: Path) -> tuple[int, int]:
    """How many of the mount's layers the kernel reads by itself, and how many it has."""
    stats = machine.json("stats", target)
    return stats["layers_read_directly"], stats["layers"]


def seals(machine: Host) -> list[Path]:
    return sorted((machine.cache / "layers").glob("*/sound"))


def sealed(machine: Host, image: str) -> trees.Tree:
    """Reads the whole image by a mount of its own, until all of its layers are sealed."""
    target = machine.mount(image)
    assert directly(machine, target)[0] == 0
    tree = trees.Tree(trees.read(target), frozenset())
    wait_until(lambda: len(seals(machine)) == directly(machine, target)[1])
    machine.forget()
    return tree


@pytest.mark.parametrize("name", ["debian", "odd"])
def test_the_next_mount_needs_no_daemon(kernel_host: Host, layouts: dict[str, Path], name: str) -> None:
    image = f"oci:{layouts[name]}:gzip"
    expected = sealed(kernel_host, image)
    target = kernel_host.mount(image)
    direct, layers = directly(kernel_host, target)
    assert direct == layers > 0
    for pid in (running := processes(kernel_host.cache)):
        os.kill(pid, signal.SIGKILL)
    for pid in running:
        wait_for_exit(pid)
    Path("/proc/sys/vm/drop_caches").write_text("1")
    assert trees.differences(target, expected) == []


def test_an_image_that_was_read_in_part_is_not_sealed(
    kernel_host: Host, pushed: Pushed, registry: RegistryServer
) -> None:
    """With an index, so that the first mount does not bring all of it."""
    image = f"{registry.host}/{pushed('busybox', 'gzip', True)}"
    target = kernel_host.mount(image)
    (target / "etc/passwd").read_bytes()
    stats = kernel_host.json("stats", target)
    assert 0 < stats["blocks_present"] < stats["blocks_total"]
    kernel_host.forget()
    again = kernel_host.mount(image)
    assert directly(kernel_host, again) == (0, 1) and not seals(kernel_host)


@pytest.mark.parametrize("event", ["data was written to", "the machine was started anew", "a block was given up"])
def test_what_happened_since_makes_the_daemon_check_again(kernel_host: Host, event: str) -> None:
    image = f"oci:{realimages.busybox()}:gzip"
    expected = sealed(kernel_host, image)
    seal = seals(kernel_host)[0]
    if event == "data was written to":
        with seal.with_name("data").open("r+b") as data:
            data.write(b"\xff" * 100_000)
    elif event == "a block was given up":
        with seal.with_name("present").open("r+b") as marks:
            marks.write(bytes(8))
    else:
        seal.write_bytes(b"00000000-" + seal.read_bytes()[9:])
    before = seal.read_bytes()
    target = kernel_host.mount(image)
    assert directly(kernel_host, target)[0] == 0
    assert trees.differences(target, expected) == []
    wait_until(lambda: seal.read_bytes() not in (b"", before))
    kernel_host.forget()
    again = kernel_host.mount(image)
    assert directly(kernel_host, again)[0] == 1
