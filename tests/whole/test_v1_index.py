"""An image whose index was attached by an older lazyfs mounts, from a layout and from a registry."""

from __future__ import annotations

from pathlib import Path

from tests.images import v1image
from tests.layout import push
from tests.servers import RegistryServer
from tests.whole.mounting import Host


def files(root: Path) -> dict[str, bytes]:
    return {f"/{path.relative_to(root)}": path.read_bytes() for path in root.rglob("*") if path.is_file()}


def expected(directory: Path) -> dict[str, bytes]:
    contents = v1image.contents(directory)
    return contents | {"/data/symbolic": contents["/data/large"]}


def test_an_index_of_version_1_mounts(machine: Host, tmp_path: Path) -> None:
    reference, _ = v1image.unpack(tmp_path / "v1")
    assert files(machine.mount(reference)) == expected(tmp_path / "v1")
    (kept,) = machine.cache.glob("indexes/*/index")
    assert kept.read_bytes().startswith(b"LZFSIDX1")


def test_a_new_one_of_the_same_image_mounts_from_a_registry(
    machine: Host, registry: RegistryServer, tmp_path: Path
) -> None:
    v1image.unpack(tmp_path / "v1")
    image = f"{registry.host}/v1/{machine.backend}:latest"
    push(tmp_path / "v1/image", "latest", image)
    machine.lazyfs("index", image, "--push", "-o", f"cache={machine.cache}")
    machine.lazyfs("cache", "prune", "--cache", machine.cache)
    assert files(machine.mount(image)) == expected(tmp_path / "v1")
    (kept,) = machine.cache.glob("indexes/*/image-attached")
    assert kept.read_bytes().startswith(b"LZFSIMG2")
