"""Index repositories by whole commands: one host indexes an image that it cannot push to, others mount it lazily."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import Lazyfs
from tests.faults.processes import kill, the_worker, wait_for_successor
from tests.layertar import LayerTar
from tests.layout import Layout, push
from tests.servers import FaultProxy, RegistryServer
from tests.whole.mounting import Host

SAID = "has no index: reading its layers once"
FILES = 12
_ALPHABET = bytes(range(64))


def content(number: int) -> bytes:
    """Compresses to three quarters, so that gzip makes windows."""
    return random.Random(number).randbytes(1 << 20).translate(_ALPHABET * 4)


class Case(NamedTuple):
    image: str
    indexes: str  # an index repository, by way of the proxy


@pytest.fixture
def case(registry: RegistryServer, proxy: FaultProxy, tmp_path: Path) -> Case:
    layout = Layout(tmp_path / "layout")
    tar = LayerTar()
    for number in range(FILES):
        tar.file(f"file{number}", content(number))
    layout.tag("latest", layout.add_image([layout.add_layer(tar.data())]))
    name = "elsewhere/" + tmp_path.name.replace("[", "-").strip("]-_").lower()
    push(layout.path, "latest", f"{registry.host}/{name}/image:latest")
    return Case(f"{registry.host}/{name}/image:latest", f"{proxy.host}/{name}/indexes/{{registry}}/{{repository}}")


def test_one_host_indexes_what_others_mount(
    machine: Host, case: Case, lazyfs: Lazyfs, tmp_path: Path, proxy: FaultProxy
) -> None:
    done = lazyfs("index", "-o", f"cache={tmp_path}/maker", "--push-to", case.indexes, case.image)
    assert f"in {case.indexes}" in done.stdout
    words = ("-o", machine.options, case.image)
    assert machine.json("inspect", *words)["index"] == "none"

    target = machine.target()
    option = f"{machine.options},index_repository={case.indexes}"
    done = machine.lazyfs("mount", "-v", "-o", option, case.image, target)
    place = case.indexes.partition("{")[0]
    assert SAID not in done.stderr and f"comes from {place}" in done.stderr
    assert (target / "file0").read_bytes() == content(0)
    assert machine.json("stats", target)["bytes_fetched"] < 5 << 20
    assert proxy.matching("GET", "/blobs/") and machine.json("ls")

    # It is kept: the next mount needs no option, and reads windows from where they are.
    machine.umount(target)
    machine.forget()
    found = machine.json("inspect", *words)
    assert found["index"] == "in the cache" and found["index_repository"].startswith(place)
    proxy.clear()
    for group in (machine.cache / "scans").glob("*/*/[0-9]*"):  # a group of windows, as if it had not come along
        group.unlink()
    target = machine.mount(case.image)
    assert (target / f"file{FILES - 1}").read_bytes() == content(FILES - 1)
    assert proxy.matching("GET", "/blobs/")


def test_by_the_environment_and_through_a_dead_one(
    machine: Host, case: Case, lazyfs: Lazyfs, tmp_path: Path
) -> None:
    with FaultProxy("127.0.0.1:1") as dead:
        pass
    directory = f"oci:{tmp_path}/indexes"
    lazyfs("index", "-o", f"cache={tmp_path}/maker", "--push-to", directory, case.image)
    target = machine.target()
    env = {"LAZYFS_INDEX_REPOSITORY": f"{dead.host}/indexes,{directory}"}
    done = machine.lazyfs("mount", "-v", "-o", machine.options, case.image, target, env=env)
    assert SAID not in done.stderr and f"comes from {directory}" in done.stderr
    assert (target / "file3").read_bytes() == content(3)


def test_a_mount_that_finds_none_says_why_and_pushes_one(machine: Host, case: Case, tmp_path: Path) -> None:
    """To the first index repository, not to the image."""
    with FaultProxy("127.0.0.1:1") as dead:
        pass
    first = f"oci:{tmp_path}/first"
    options = f"{machine.options},index_repository={first},index_repository={dead.host}/indexes"
    target = machine.target()
    done = machine.lazyfs("mount", "-v", "--push-index", "-o", options, case.image, target)
    assert SAID in done.stderr and f"{dead.host}/indexes: " in done.stderr
    assert (target / "file0").read_bytes() == content(0)
    machine.forget()
    fresh = f"cache={tmp_path}/fresh"
    assert machine.json("inspect", "-o", fresh, case.image)["index"] == "none"
    found = machine.json("inspect", "-o", f"{fresh},index_repository={first}", case.image)
    assert (found["index"], found["index_repository"]) == ("attached", first)
    shown = machine.lazyfs("inspect", "-o", f"{fresh},index_repository={first}", case.image).stdout
    assert f"in the cache, from {first}" in shown


def test_windows_come_from_there_after_the_worker_was_killed(
    kernel_host: Host, case: Case, lazyfs: Lazyfs, tmp_path: Path, proxy: FaultProxy
) -> None:
    lazyfs("index", "-o", f"cache={tmp_path}/maker", "--push-to", case.indexes, case.image)
    target = kernel_host.mount(case.image, options=f"index_repository={case.indexes}")
    before = the_worker(kernel_host.cache)
    kill(before)
    wait_for_successor(kernel_host.cache, before)
    proxy.clear()
    for number in reversed(range(FILES)):
        assert (target / f"file{number}").read_bytes() == content(number)
    assert proxy.matching("GET", "/blobs/")
