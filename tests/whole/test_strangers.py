"""Images as other people's tools write them: what docker, containerd and umoci take is mounted, with their result."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backports import zstd

from tests.conftest import Lazyfs
from tests.layertar import LayerTar
from tests.layout import CONFIG_TYPE, GZIP, INDEX_TYPE, LAYER_TYPES, MANIFEST_TYPE, PLAIN, ZSTD, Descriptor, Layout
from tests.tarblocks import END, header, member, pax_member
from tests.whole.mounting import Host, foreground_daemon, host
from tests.whole.trees import differences, read, unpacked

Mount = Callable[[str], Path]
FILE = LayerTar().file("file", b"content" * 1000).data()


@pytest.fixture(scope="module")
def machine(lazyfs: Lazyfs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    directory = tmp_path_factory.mktemp("strangers")
    with host(lazyfs, directory, "kernel") as made, foreground_daemon(made.cache, linger_s=600):
        yield made


@pytest.fixture
def mount(machine: Host) -> Iterator[Mount]:
    """Mounts an image until the end of the test."""
    targets: list[Path] = []

    def at_a_new_target(image: str) -> Path:
        targets.append(machine.mount(image))
        return targets[-1]

    yield at_a_new_target
    for target in targets:
        machine.umount(target)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def same_as_unpacked(mount: Mount, layout: Layout, image: Descriptor, scratch: Path) -> Path:
    """Mounts it and compares it with what umoci makes of it."""
    layout.tag("image", image)
    started_ns = scratch.stat().st_mtime_ns
    command = ["umoci", "unpack", "--image", f"{layout.path}:image", str(scratch / "bundle")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    target = mount(f"oci:{layout.path}:image")
    assert differences(target, unpacked(scratch / "bundle/rootfs", started_ns)) == []
    return target


TARS = {
    "parents": member(b"./../dir/f", b"1") + member(b"a/../b", b"2") + header(b"../..", b"5") + END,
    "parents-in-a-hard-link": member(b"d/x", b"x") + header(b"e", b"1", linkname=b"d/../d/../../d/x") + END,
    "old-docker-prefix": member(b"f", b"data", prefix=b"d" * 120, magic=b"ustar  \0") + END,
}


@pytest.mark.parametrize("case", TARS)
def test_tars(mount: Mount, layout: Layout, tmp_path: Path, case: str) -> None:
    same_as_unpacked(mount, layout, layout.add_image([layout.add_layer(TARS[case], GZIP)]), tmp_path)


def test_ids_that_chown_takes_for_unchanged_are_roots(mount: Mount, layout: Layout) -> None:
    """As where containerd unpacks as root; umoci refuses them."""
    tar = pax_member((b"uid", b"4294967295"), (b"gid", b"4294967295")) + member(b"f", b"1") + END
    layout.tag("image", layout.add_image([layout.add_layer(tar, GZIP)]))
    status = (mount(f"oci:{layout.path}:image") / "f").stat()
    assert (status.st_uid, status.st_gid) == (0, 0)


def test_global_records_say_nothing(mount: Mount, layout: Layout) -> None:
    """As in containerd and Docker; umoci refuses them."""
    tar = pax_member((b"path", b"all"), (b"uid", b"7"), kind=b"g") + member(b"a", b"1", uid=b"0000003\0") + END
    layout.tag("image", layout.add_image([layout.add_layer(tar, GZIP)]))
    target = mount(f"oci:{layout.path}:image")
    assert os.listdir(target) == ["a"] and (target / "a").stat().st_uid == 3


@pytest.mark.parametrize("empty", [PLAIN, GZIP, ZSTD])
def test_a_layer_of_no_bytes(mount: Mount, layout: Layout, tmp_path: Path, empty: str) -> None:
    blob = {PLAIN: b"", GZIP: zlib.compressobj(6, zlib.DEFLATED, 31).flush(), ZSTD: zstd.compress(b"")}[empty]
    layer = layout.add_blob(blob, LAYER_TYPES[empty]), "sha256:" + hashlib.sha256(b"").hexdigest()
    image = layout.add_image([layer, layout.add_layer(FILE, GZIP), layer])
    if empty == ZSTD:  # umoci knows no zstd
        layout.tag("image", image)
        assert list(read(mount(f"oci:{layout.path}:image"))) == [b"", b"file"]
    else:
        same_as_unpacked(mount, layout, image, tmp_path)


@pytest.mark.parametrize("layers", [None, "missing", []])
def test_an_image_without_layers(mount: Mount, layout: Layout, layers: Any) -> None:
    config = {"architecture": "amd64", "os": "linux", "config": {"Labels": {"k": None}}, "rootfs": {"type": "layers"}}
    manifest = {
        "schemaVersion": 2,
        "config": layout.add_json(config, CONFIG_TYPE),
        "annotations": {"k": None},
        "layers": layers,
    }
    if layers == "missing":
        del manifest["layers"]
    layout.tag("image", layout.add_json(manifest, MANIFEST_TYPE))
    assert not list(mount(f"oci:{layout.path}:image").iterdir())


@pytest.mark.parametrize("number", [129, 300])
def test_many_layers(mount: Mount, layout: Layout, tmp_path: Path, number: int) -> None:
    layers = [layout.add_layer(LayerTar().file(f"f{n}", b"%d" % n).data(), GZIP) for n in range(number)]
    target = same_as_unpacked(mount, layout, layout.add_image(layers), tmp_path)
    assert (target / f"f{number - 1}").read_text() == str(number - 1)


@pytest.mark.parametrize("window_log", [27, 28, 29])
def test_zstd_windows_up_to_those_of_others(mount: Mount, layout: Layout, window_log: int) -> None:
    parameter = zstd.CompressionParameter
    options: dict[int, int] = {parameter.window_log: window_log, parameter.content_size_flag: 0}
    compressor = zstd.ZstdCompressor(options=options)
    blob = compressor.compress(FILE) + compressor.flush()
    layer = layout.add_blob(blob, LAYER_TYPES[ZSTD]), "sha256:" + hashlib.sha256(FILE).hexdigest()
    layout.tag("image", layout.add_image([layer]))
    assert (mount(f"oci:{layout.path}:image") / "file").read_bytes() == b"content" * 1000


def test_a_layout_whose_only_image_has_its_configs_artifact_type(mount: Mount, machine: Host, layout: Layout) -> None:
    """As crane pull and ko write it: one entry, without a name."""
    image = layout.add_image([layout.add_layer(FILE, GZIP)])
    entry = image | {"artifactType": CONFIG_TYPE}
    (layout.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    assert (mount(f"oci:{layout.path}") / "file").is_file()
    machine.lazyfs("index", "--push", "-o", f"cache={machine.cache}", f"oci:{layout.path}")
    assert json.loads((layout.path / "index.json").read_text())["manifests"] == [entry]


ODD = [{"artifactType": "sbom"}, {"annotations": {"k": None}, "platform": {}}, {"size": -1}]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_an_odd_neighbour_hides_neither_image_nor_index(
    machine: Host, layout: Layout, lazyfs: Lazyfs, tmp_path: Path, odd: dict[str, Any]
) -> None:
    platform = {"architecture": "amd64", "os": "linux"}
    image = layout.add_image([layout.add_layer(FILE, GZIP)])
    sbom = layout.add_json({"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "layers": []}, MANIFEST_TYPE)
    index = {
        "schemaVersion": 2,
        "mediaType": INDEX_TYPE,
        "manifests": [sbom | {"platform": platform} | odd, image | {"platform": platform, "annotations": {}}],
    }
    layout.tag("image", layout.add_json(index, INDEX_TYPE))
    tag = "sha256-" + image["digest"].removeprefix("sha256:")
    layout.tag(tag, layout.add_json({"schemaVersion": 2, "manifests": [sbom | odd]}, INDEX_TYPE))
    machine.lazyfs("index", "--push", "-o", f"cache={machine.cache}", f"oci:{layout.path}:image")
    with host(lazyfs, tmp_path, "kernel") as other:
        code, message = other.refused(f"oci:{layout.path}:absent")
        assert code == 32 and "has no image named absent" in message
        found = other.json("inspect", "-o", f"cache={other.cache}", f"oci:{layout.path}:image")
        assert found["index"] == "attached", found
