"""The commands around a mount: ls, stats, inspect, doctor, and the care of the cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.layertar import LayerTar
from tests.layout import Layout
from tests.servers import RegistryServer
from tests.whole.conftest import Pushed
from tests.whole.mounting import Host

FILE_BYTES = 600_000


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[str], str]:
    """References of two unrelated images, "a" and "b", of FILE_BYTES that do not compress."""
    layout = Layout(tmp_path / "layout")
    for tag in ("a", "b"):
        tar = LayerTar().file("file", os.urandom(FILE_BYTES)).data()
        layout.tag(tag, layout.add_image([layout.add_layer(tar)]))
    return lambda tag: f"oci:{layout.path}:{tag}"


def entries(machine: Host) -> list[dict[str, Any]]:
    report = machine.json("cache", "du", "--cache", machine.cache)
    assert report["cache"] == str(machine.cache)
    assert report["size_bytes"] == sum(entry["size_bytes"] for entry in report["entries"])
    listed: list[dict[str, Any]] = report["entries"]
    return listed


def test_what_is_mounted_is_never_evicted(machine: Host, pair: Callable[[str], str]) -> None:
    mounted = machine.mount(pair("a"))
    other = machine.mount(pair("b"))
    content = (mounted / "file").read_bytes()
    machine.umount(other)
    if machine.backend == "kernel":  # its daemon keeps it a little while: it shall go now
        in_use = [entry for entry in entries(machine) if entry["in_use"]]
        assert len(in_use) in (3, 6)
    report = machine.json("cache", "gc", "--max-size", "1k", "--cache", machine.cache)
    assert report["left_bytes"] >= FILE_BYTES
    kept = entries(machine)  # of profiles, those of starts that end later
    assert all(entry["in_use"] or entry["kind"] == "profile" for entry in kept)
    with (mounted / "file").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read() == content
    again = machine.mount(pair("a"), options="offline")
    assert (again / "file").read_bytes() == content

    machine.forget()
    assert {entry["kind"] for entry in entries(machine)} == {"image", "layer", "profile", "scan"}
    report = machine.json("cache", "prune", "--cache", machine.cache)
    assert report["freed_bytes"] >= FILE_BYTES
    assert {entry["kind"] for entry in entries(machine)} == {"profile"}  # for the next cold start
    report = machine.json("cache", "gc", "--max-size", "1", "--cache", machine.cache)
    assert report["left_bytes"] == 0 and entries(machine) == []


def test_gc_takes_the_least_recently_used(machine: Host, pair: Callable[[str], str]) -> None:
    for tag in ("b", "a", "b"):
        target = machine.mount(pair(tag))
        (target / "file").read_bytes()
        machine.forget()
    report = machine.json("cache", "gc", "--max-size", f"{FILE_BYTES * 3 // 2}", "--cache", machine.cache)
    assert report["freed_bytes"] >= FILE_BYTES
    (machine.mount(pair("b"), options="offline") / "file").read_bytes()


def test_verify_finds_damage_which_is_fetched_again(
    machine: Host, pair: Callable[[str], str], tmp_path: Path
) -> None:
    target = machine.mount(pair("a"))
    content = (target / "file").read_bytes()
    machine.forget()
    report = machine.json("cache", "verify", "--cache", machine.cache)
    assert report["checked_blocks"] >= 3 and not report["damaged_blocks"] and not report["broken_entries"]
    (data,) = (machine.cache / "layers").glob("*/data")
    with data.open("r+b") as file:
        file.seek(300_000)
        file.write(b"rot")
    result = machine.lazyfs("cache", "verify", "--cache", machine.cache, check=False)
    assert result.returncode == 1 and " 1 damaged" in result.stdout
    target = machine.mount(pair("a"))
    assert (target / "file").read_bytes() == content


def test_ls_and_stats_tell_of_a_mount(machine: Host, pair: Callable[[str], str]) -> None:
    target = machine.mount(pair("a"), options="rw")
    (one,) = [
        entry
        for daemon in machine.json("ls")
        for entry in daemon["mounts"]
        if str(target) in [place["target"] for place in entry["targets"]]
    ]
    assert (one["image"], one["backend"]) == (pair("a"), machine.backend)
    line = next(line for line in machine.lazyfs("ls").stdout.splitlines() if line.startswith(f"{target} "))
    assert pair("a") in line and machine.backend in line
    (target / "file").read_bytes()
    stats = machine.json("stats", target)
    assert stats["image"] == pair("a") and stats["backend"] == machine.backend
    assert stats["manifest_digest"] == one["manifest_digest"]
    for name in ("bytes_fetched", "requests", "retries", "blocks_present", "blocks_total", "memory_bytes"):
        assert stats[name] >= 0, name
    assert stats["blocks_present"] == stats["blocks_total"] == 3
    assert "blocks_present" in machine.lazyfs("stats", target).stdout
    result = machine.lazyfs("stats", machine.cache, check=False)
    assert result.returncode == 1 and "is not a lazyfs mount" in result.stderr


@pytest.mark.parametrize("indexed", [True, False])
def test_inspect_shows_layers_and_index(
    machine: Host, pushed: Pushed, registry: RegistryServer, indexed: bool
) -> None:
    image = f"{registry.host}/{pushed('odd', 'gzip', indexed)}"
    report = machine.json("inspect", "-o", f"cache={machine.cache}", image)
    assert report["index"] == ("attached" if indexed else "none")
    assert report["image_bytes"] == sum(layer["size_bytes"] for layer in report["layers"])
    assert len(report["layers"]) == 4 and report["platform"] == "linux/amd64"
    text = machine.lazyfs("inspect", "-o", f"cache={machine.cache}", image).stdout
    assert report["manifest_digest"] in text and ("lazyfs index --push" in text) is not indexed
    if indexed:  # inspect has kept it
        again = machine.json("inspect", "-o", f"cache={machine.cache}", image)
        assert again["index"] == "in the cache"
        assert [layer["compression"] for layer in again["layers"]] == ["gzip"] * 4


def test_doctor_finds_both_backends(machine: Host) -> None:
    checks = machine.json("doctor", "--cache", machine.cache)
    assert all(check["status"] in ("ok", "warn") for check in checks), checks
    assert {"name", "status", "finding", "advice"} <= set(checks[0])
