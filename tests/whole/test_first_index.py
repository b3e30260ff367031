"""Images without an index: who makes it. Little to read is read by the daemon, at once; whole images by the command."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Lazyfs
from tests.layertar import LayerTar
from tests.layout import Layout, push
from tests.servers import FaultProxy, RegistryServer
from tests.whole.mounting import Host, host

SAID = "has no index: reading its layers once"
BASE = random.Random(3).randbytes(6 << 20)  # more than a daemon reads for an index
Push = Callable[..., str]


@pytest.fixture
def pushed(tmp_path: Path, registry: RegistryServer, proxy: FaultProxy) -> Push:
    """Pushes an image of one layer for each tar as `name`; returns its reference, by way of the proxy."""
    layout = Layout(tmp_path / "layout")

    def do(name: str, *tars: LayerTar) -> str:
        layout.tag(name, layout.add_image([layout.add_layer(tar.data()) for tar in tars]))
        repository = f"first/{tmp_path.name.replace('[', '-').strip(']-_')}/{name}".lower()
        push(layout.path, name, f"{registry.host}/{repository}:latest")
        proxy.clear()
        return f"{proxy.host}/{repository}:latest"

    return do


def mount(machine: Host, image: str, *more: str) -> tuple[Path, bool]:
    """The mount, and whether the command said that it reads the layers."""
    target = machine.target()
    done = machine.lazyfs("mount", "-v", "-o", machine.options, *more, image, target)
    return target, SAID in done.stderr


def fetched_blobs(proxy: FaultProxy) -> int:
    """Configs, indexes and layers, whole or in part, that were asked for since the proxy was cleared."""
    return len(proxy.matching("GET", "/blobs/"))


def test_a_changed_image_is_read_by_the_daemon(machine: Host, proxy: FaultProxy, pushed: Push) -> None:
    base = LayerTar().file("base", BASE).file("changed", b"old")
    first, said = mount(machine, pushed("v1", base))
    assert said and (first / "changed").read_bytes() == b"old"

    change = LayerTar().file("changed", b"new").file("added", b"data" * 1000)
    image = pushed("v2", base, change)
    second, said = mount(machine, image)
    assert not said
    assert fetched_blobs(proxy) == 2  # the config, and the layer that is new
    assert (second / "base").read_bytes() == BASE
    assert (second / "changed").read_bytes() == b"new"
    assert (second / "added").read_bytes() == b"data" * 1000
    assert fetched_blobs(proxy) == 2
    assert (first / "changed").read_bytes() == b"old"


def test_a_small_image_is_read_by_the_daemon(machine: Host, pushed: Push) -> None:
    target, said = mount(machine, pushed("small", LayerTar().file("file", b"content").symlink("link", "file")))
    assert not said
    assert (target / "link").read_bytes() == b"content"


def test_a_small_blob_that_holds_much_is_read_by_the_command(machine: Host, pushed: Push) -> None:
    image = pushed("bomb", LayerTar().file("zeros", bytes(48 << 20)))
    target, said = mount(machine, image)
    assert said
    assert (target / "zeros").stat().st_size == 48 << 20
    with (target / "zeros").open("rb") as file:
        file.seek(47 << 20)
        assert file.read() == bytes(1 << 20)


def test_a_large_layer_whose_scan_is_damaged_is_read_by_the_command(machine: Host, pushed: Push) -> None:
    base = LayerTar().file("zeros", bytes(48 << 20))
    assert mount(machine, pushed("v1", base))[1]
    (scan,) = (machine.cache / "scans").glob("*/*/layer")
    scan.write_bytes(b"")
    target, said = mount(machine, pushed("v2", base, LayerTar().file("added", b"data")))
    assert said
    assert (target / "added").read_bytes() == b"data" and (target / "zeros").stat().st_size == 48 << 20


def test_an_index_that_is_to_be_pushed_is_pushed(
    machine: Host, proxy: FaultProxy, pushed: Push, lazyfs: Lazyfs, tmp_path: Path
) -> None:
    image = pushed("attached", LayerTar().file("file", os.urandom(5000)))
    first, said = mount(machine, image, "--push-index")
    assert said
    (tmp_path / "other").mkdir()
    with host(lazyfs, tmp_path / "other", machine.backend) as other:
        proxy.clear()
        second, said = mount(other, image)
        assert not said and not proxy.matching("PUT", "/manifests/")
        layer = [request for request in proxy.matching("GET", "/blobs/") if request.range]
        assert not layer  # lazily
        assert (second / "file").read_bytes() == (first / "file").read_bytes()
        assert [request for request in proxy.matching("GET", "/blobs/") if request.range]


def test_a_broken_small_image_is_refused(machine: Host, tmp_path: Path) -> None:
    """The daemon's own error, as the command's would be, and the daemon lives."""
    layout = Layout(tmp_path / "layout")
    layer, _ = layout.add_layer(LayerTar().file("file", b"content").data())
    layout.tag("broken", layout.add_image([(layer, "sha256:" + 64 * "0")]))
    code, message = machine.refused(f"oci:{layout.path}:broken")
    assert code == 32 and "but the image config says" in message
    if machine.backend == "kernel":
        assert machine.daemon_pid()
