"""`lazyfs analyze`: layers, visible data, what is cached, and what a start reads."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tests import leaks, realimages
from tests.conftest import Lazyfs
from tests.layertar import LayerTar
from tests.layout import GZIP, Layout
from tests.servers import RegistryServer
from tests.whole.conftest import Pushed
from tests.whole.mounting import Host, host, processes, wait_until

PNG = b"\x89PNG"


def analysed(machine: Host, *words: object) -> dict[str, Any]:
    found: dict[str, Any] = machine.json("analyze", "-o", machine.options, *words)
    return found


def visible_bytes(root: Path) -> tuple[int, int]:
    """Regular files below `root` that have data, each inode once, and their bytes."""
    sizes = {}
    for directory, _, names in os.walk(root):
        for name in names:
            status = os.lstat(os.path.join(directory, name))
            if stat.S_ISREG(status.st_mode) and status.st_size:
                sizes[status.st_ino] = status.st_size
    return len(sizes), sum(sizes.values())


def test_layers_from_the_bottom_up(kernel_host: Host, layouts: dict[str, Path]) -> None:
    image = f"oci:{layouts['debian']}:gzip"
    report = analysed(kernel_host, image)
    layers = report["layers"]
    assert [layer["depth"] for layer in layers] == list(range(1, len(layers) + 1)) and len(layers) > 2
    assert "start" not in report
    assert all(layer["cached_bytes"] == layer["cached_elsewhere_bytes"] == 0 for layer in layers)
    assert not processes(kernel_host.cache)  # nothing was mounted
    target = kernel_host.mount(image)
    files, size_bytes = visible_bytes(target)
    assert sum(layer["visible_files"] for layer in layers) == files
    assert sum(layer["visible_bytes"] for layer in layers) == size_bytes
    bottom = layers[0]
    assert bottom["visible_bytes"] < bottom["data_bytes"]  # later layers replace some of it
    assert (target / "usr/bin/dpkg").read_bytes()
    again = analysed(kernel_host, image)
    assert [layer["cached_bytes"] for layer in again["layers"]] != [0] * len(layers)
    assert all(one["cached_bytes"] <= one["data_bytes"] for one in again["layers"])


def test_blocks_of_other_images_are_found(lazyfs: Lazyfs, tmp_path: Path) -> None:
    """The same root, stored otherwise, has the same layer; with one more file, another one of the same blocks."""
    layout = Layout(tmp_path / "layout")
    for tag, extra in (("one", b""), ("two", b"more")):
        tar = LayerTar()
        tar.file("big", bytes(range(256)) * 4096)
        if extra:
            tar.file("extra", extra)
        layout.tag(tag, layout.add_image([layout.add_layer(tar.data(), GZIP)], {}))
    with host(lazyfs, tmp_path, "kernel") as machine:
        (machine.mount(f"oci:{layout.path}:one") / "big").read_bytes()
        (layer,) = analysed(machine, f"oci:{layout.path}:two")["layers"]
        assert (layer["cached_bytes"], layer["cached_elsewhere_bytes"]) == (0, 1 << 20)
        assert layer["data_bytes"] == (1 << 20) + 4
        (own,) = analysed(machine, f"oci:{layout.path}:one")["layers"]
        assert (own["cached_bytes"], own["cached_elsewhere_bytes"]) == (1 << 20, 0)


def test_what_a_start_reads(machine: Host, pushed: Pushed, registry: RegistryServer, tmp_path: Path) -> None:
    image = f"{registry.host}/{pushed('busybox', 'gzip', True)}"
    figure = tmp_path / "layers.png"
    runtimes = set(leaks.RUNTIME_ROOT.iterdir())
    result = machine.lazyfs(
        "analyze", "-o", machine.options, "--json", "--plot", figure, image, "--", "sh", "-c", "echo said; exit 3",
        check=False,
    )  # fmt: skip
    assert result.returncode == 3
    start = json.loads(result.stdout)["start"]  # standard output has nothing else
    assert "said\n" in result.stderr
    assert start["command"] == ["sh", "-c", "echo said; exit 3"] and start["exit_code"] == 3
    program = Path("/bin/busybox") if Path("/bin/busybox").exists() else Path("/usr/bin/busybox")
    assert 100_000 < start["read_bytes"] <= program.stat().st_size + 10_000
    assert start["fetched_bytes"] > 100_000 and start["requests"] > 1
    assert figure.read_bytes().startswith(PNG)
    assert not list((machine.cache / "tmp").iterdir())
    new = set(leaks.RUNTIME_ROOT.iterdir()) - runtimes
    # Those of other programs on this machine get a link to their cache; whether it leads to ours is seen by leaks.py.
    wait_until(lambda: all((one / "cache").is_symlink() or not one.exists() for one in new))
    text = machine.lazyfs("analyze", "-o", machine.options, image, "--", "true").stdout
    assert "DEPTH" in text and "a start reads" in text


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--plot", "/nonexistent/x.png"], 1, "cannot draw to /nonexistent/x.png"),
        (["--plot", "/tmp/x.nothing"], 1, "cannot draw to /tmp/x.nothing"),
    ],
)
def test_refusals(kernel_host: Host, words: list[str], code: int, text: str) -> None:
    image = f"oci:{realimages.busybox()}:gzip"
    result = kernel_host.lazyfs("analyze", "-o", kernel_host.options, *words, image, check=False)
    assert result.returncode == code and text in result.stderr and "Traceback" not in result.stderr
