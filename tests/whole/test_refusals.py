"""Images that cannot be mounted: each is refused with one line that says why, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import random
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Lazyfs
from tests.layertar import LayerTar
from tests.layout import CONFIG_TYPE, GZIP, LAYER_TYPES, MANIFEST_TYPE, PLAIN, Descriptor, Layout
from tests.tarblocks import END, header, pax_member
from tests.whole.mounting import Host, foreground_daemon, host

GOOD = LayerTar().file("good", b"content" * 1000).data()


def gzipped(data: bytes) -> bytes:
    deflater = zlib.compressobj(6, zlib.DEFLATED, 31)
    return deflater.compress(data) + deflater.flush()


def bzipped(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:bz2") as tar:
        info = tarfile.TarInfo("file")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


TARS = {
    "link-outside": (LayerTar().hardlink("link", "../../etc/passwd").data(), "etc/passwd"),
    "link-to-nothing": (LayerTar().hardlink("link", "nothing").data(), "nothing"),
    "link-to-directory": (LayerTar().dir("d").hardlink("link", "d").data(), "link"),
    "below-a-file": (LayerTar().file("file").file("file/below").data(), "file"),
    "loop": (LayerTar().symlink("loop", "loop").file("loop/below").data(), "loop"),
    "cut": (GOOD[:3000], "ends in the middle"),
    "checksum": (GOOD[:100] + b"9" + GOOD[101:], "checksum"),
    "large-uid": (pax_member((b"uid", b"4294967296")) + header() + END, "uid or gid"),
    "large-attribute": (LayerTar().file("f", xattrs={"user.a": b"v" * 70_000}).data(), "64 KiB"),
    "long-name": (pax_member((b"path", b"n" * 256)) + header() + END, "too long"),
    "multi-volume": (header(b"v", b"M") + END, "multi-volume"),
}


@pytest.fixture(scope="module")
def machine(lazyfs: Lazyfs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The index pass is the same for both backends: here the kernel's asks for it. Its daemon stays."""
    directory = tmp_path_factory.mktemp("refusals")
    with host(lazyfs, directory, "kernel") as made, foreground_daemon(made.cache, linger_s=600):
        yield made


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def refused(machine: Host, layout: Layout, manifest: Descriptor, what: str) -> None:
    layout.tag("bad", manifest)
    code, message = machine.refused(f"oci:{layout.path}:bad")
    assert code == 32 and what in message
    assert message.startswith("lazyfs: ") and message.count("\n") == 1
    assert "Traceback" not in message and "bug" not in message
    assert not list((machine.cache / "tmp").iterdir())


@pytest.mark.parametrize("case", TARS)
def test_bad_layer(machine: Host, layout: Layout, case: str) -> None:
    tar, what = TARS[case]
    refused(machine, layout, layout.add_image([layout.add_layer(tar, PLAIN)]), what)


def image_of(layout: Layout, layers: list[Descriptor], diff_ids: list[str], **more: Any) -> Descriptor:
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": layout.add_json(config, CONFIG_TYPE),
        "layers": layers,
    }
    return layout.add_json(manifest | more, MANIFEST_TYPE)


def diff_id(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("blob", "what"),
    [
        (gzipped(GOOD)[:-1000], "layer"),
        (gzipped(GOOD)[:50] + b"\0\0\0\0" + gzipped(GOOD)[54:], "layer"),
        (bzipped(b"content"), "packed by bzip2"),
        (lzma.compress(GOOD), "packed by xz"),
        (gzipped(b""), "layer"),
        (b"", "the image config says"),
    ],
    ids=["cut", "damaged", "bzip2", "xz", "another", "empty"],
)
def test_bad_blob(machine: Host, layout: Layout, blob: bytes, what: str) -> None:
    layer = layout.add_blob(blob, LAYER_TYPES[GZIP])
    refused(machine, layout, image_of(layout, [layer], [diff_id(GOOD)]), what)


@pytest.mark.parametrize(
    ("media_type", "what"),
    [
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "is encrypted"),
        ("application/vnd.dev.cosign.simplesigning.v1+json", "no tar, but of type application/vnd.dev.cosign"),
        ("application/vnd.oci.image.layer.nydus.blob.v1", "no tar, but of type application/vnd.oci.image.layer.nydus"),
    ],
)
def test_layers_that_are_none_are_called_by_their_name(
    machine: Host, layout: Layout, media_type: str, what: str
) -> None:
    layer = layout.add_blob(random.Random(1).randbytes(2000), media_type)
    refused(machine, layout, image_of(layout, [layer], [diff_id(GOOD)]), what)


def test_an_artifact_is_called_by_its_type(machine: Host, layout: Layout) -> None:
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": layout.add_blob(b"{}", "application/vnd.cncf.helm.config.v1+json"),
        "layers": [layout.add_blob(b"chart", "application/vnd.cncf.helm.chart.content.v1.tar+gzip")],
    }
    what = "an artifact of type application/vnd.cncf.helm.config.v1+json"
    refused(machine, layout, layout.add_json(manifest, MANIFEST_TYPE), what)


def test_an_image_for_another_platform_is_mounted_only_if_that_is_asked_for(machine: Host, layout: Layout) -> None:
    layers = [layout.add_layer(LayerTar().file("good").data())]
    image = layout.add_image(layers, architecture="s390x")
    layout.tag("bad", image)
    for reference in (f"oci:{layout.path}:bad", f"oci:{layout.path}@{image['digest']}"):
        code, message = machine.refused(reference)
        assert code == 1 and "is an image for linux/s390x, not for linux/amd64" in message
        target = machine.mount(reference, options="platform=s390x")
        assert os.listdir(target) == ["good"]
        machine.umount(target)
    layout.tag("good", layout.add_image(layers, architecture="x86_64"))
    target = machine.mount(f"oci:{layout.path}:good")
    assert os.listdir(target) == ["good"]
    machine.umount(target)


def test_blob_that_is_not_the_one_the_manifest_names(machine: Host, layout: Layout) -> None:
    layer = layout.add_blob(gzipped(GOOD), LAYER_TYPES[GZIP])
    other = gzipped(GOOD.replace(b"content", b"CONTENT"))
    layout.blob_path(layer["digest"]).write_bytes(other[: layer["size"]].ljust(layer["size"], b"\0"))
    refused(machine, layout, image_of(layout, [layer], [diff_id(GOOD)]), layer["digest"][:19])


def test_config_that_names_another_layer(machine: Host, layout: Layout) -> None:
    layer = layout.add_blob(gzipped(GOOD), LAYER_TYPES[GZIP])
    refused(machine, layout, image_of(layout, [layer], [diff_id(b"other")]), "the image config says")
    refused(machine, layout, image_of(layout, [layer], []), "another number of layers")


def test_manifest_that_is_none(machine: Host, layout: Layout) -> None:
    refused(machine, layout, layout.add_json({"schemaVersion": 1}, MANIFEST_TYPE), "manifest")
    refused(machine, layout, layout.add_blob(b"[" * 100_000, MANIFEST_TYPE), "manifest")
