"""Only what is read is fetched, and only once: counted by a proxy before the registry."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Lazyfs
from tests.layertar import LayerTar
from tests.layout import Layout, push
from tests.servers import FaultProxy, RegistryServer
from tests.whole.conftest import Pushed
from tests.whole.mounting import BACKENDS, Host, host

# One span of 1 MiB and a group of windows, and as much again for a block that straddles two spans.
ONE_READ_BYTES = 3 << 20
SMALL_FILES = ("etc/hostname", "etc/debian_version/inner", "opt/a/one", "opt/inserted/deep/file")


def layers_of(layout: Path, tag: str = "gzip") -> dict[str, int]:
    """Digest and size of each layer blob."""
    opened = Layout(layout)
    document: dict[str, Any] = opened.document(opened.resolve(tag))
    return {layer["digest"]: layer["size"] for layer in document["layers"]}


def lookups(proxy: FaultProxy) -> list[str]:
    """What was asked for, but for the question whether a server on loopback speaks http."""
    return [request.path.partition("/v2/")[2] for request in proxy.requests if request.path != "/v2/"]


def blob_requests(proxy: FaultProxy, digests: Iterable[str]) -> int:
    return proxy.count(path="/blobs/(" + "|".join(digests) + ")")


@pytest.fixture(scope="module")
def two_layers(
    tmp_path_factory: pytest.TempPathFactory, registry: RegistryServer, lazyfs: Lazyfs
) -> list[str]:
    """Two indexed images over one common layer, which has "common"; the second one has "own", too."""
    directory = tmp_path_factory.mktemp("two")
    layout = Layout(directory / "layout")
    common = layout.add_layer(LayerTar().file("common", os.urandom(300_000)).data())
    own = layout.add_layer(LayerTar().file("own", os.urandom(300_000)).data())
    layout.tag("first", layout.add_image([common]))
    layout.tag("second", layout.add_image([common, own]))
    (directory / "cache").mkdir(mode=0o700)
    for tag in ("first", "second"):
        push(layout.path, tag, f"{registry.host}/lazy/{tag}:latest")
        lazyfs("index", "--push", "-o", f"cache={directory / 'cache'}", f"{registry.host}/lazy/{tag}")
    return [common[0]["digest"], own[0]["digest"]]


def test_a_mount_fetches_documents_and_a_read_little(
    machine: Host, proxy: FaultProxy, pushed: Pushed, layouts: dict[str, Path]
) -> None:
    image = f"{proxy.host}/{pushed('debian', 'gzip', True)}"
    layers = layers_of(layouts["debian"])
    proxy.clear()
    target = machine.mount(image)
    assert sum(1 for _ in os.walk(target)) > 500
    assert blob_requests(proxy, layers) == 0
    # Manifest, config, index artifact and index: the index is the largest.
    mounted_bytes = proxy.bytes_sent
    assert mounted_bytes < sum(layers.values()) // 25
    assert proxy.count("GET") < 10

    for name in SMALL_FILES:
        proxy.clear()
        first = (target / name).read_bytes()
        assert proxy.bytes_sent < ONE_READ_BYTES
        proxy.clear()
        assert (target / name).read_bytes() == first
        os.posix_fadvise(descriptor := os.open(target / name, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(descriptor, len(first), 0) == first  # from the block cache
        os.close(descriptor)
        assert proxy.requests == []

    stats = machine.json("stats", target)
    assert mounted_bytes <= stats["bytes_fetched"] < mounted_bytes + len(SMALL_FILES) * ONE_READ_BYTES
    assert 0 < stats["blocks_present"] < stats["blocks_total"]
    assert stats["requests"] > 0 and stats["retries"] == 0 and stats["memory_bytes"] > 1 << 20


def test_a_second_mount_joins_and_fetches_nothing(machine: Host, proxy: FaultProxy, pushed: Pushed) -> None:
    image = f"{proxy.host}/{pushed('busybox', 'gzip', True)}"
    first = machine.mount(image)
    (first / "etc/passwd").read_bytes()
    proxy.clear()
    second = machine.mount(image)
    assert (second / "etc/passwd").read_bytes() == (first / "etc/passwd").read_bytes()
    assert second.stat().st_dev == first.stat().st_dev
    repository = image.partition("/")[2].partition(":")[0]
    wanted = [f"{repository}/manifests/latest"] if machine.backend == "kernel" else []
    assert lookups(proxy) == wanted
    proxy.close()  # from here on the registry is away
    for options in ("offline", ""):
        assert machine.mount(image, options=options).stat().st_dev == first.stat().st_dev
    listed = [entry for one in machine.json("ls") for entry in one["mounts"] if entry["image"] == image]
    assert [len(entry["targets"]) for entry in listed] == [4]


def test_a_shared_layer_is_fetched_for_one_image(
    machine: Host, proxy: FaultProxy, two_layers: list[str]
) -> None:
    common, own = two_layers
    first = machine.mount(f"{proxy.host}/lazy/first")
    content = (first / "common").read_bytes()
    assert blob_requests(proxy, [common]) > 0
    proxy.clear()
    second = machine.mount(f"{proxy.host}/lazy/second")
    assert (second / "common").read_bytes() == content
    assert blob_requests(proxy, [common, own]) == 0
    assert len((second / "own").read_bytes()) == 300_000
    assert blob_requests(proxy, [common]) == 0 < blob_requests(proxy, [own])


@pytest.fixture(scope="module", params=BACKENDS)
def filled(
    request: pytest.FixtureRequest,
    lazyfs: Lazyfs,
    registry: RegistryServer,
    layouts: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Host, FaultProxy, str]]:
    """A host that has the whole image in its cache after a first mount without an index."""
    directory = tmp_path_factory.mktemp(f"full-{request.param}")
    repository = f"lazy/full-{request.param}"
    push(layouts["busybox"], "gzip", f"{registry.host}/{repository}:latest")
    with host(lazyfs, directory, request.param) as machine, FaultProxy(registry) as proxy:
        image = f"{proxy.host}/{repository}"
        target = machine.mount(image, "--push-index")
        layers = layers_of(layouts["busybox"])
        assert [proxy.count("GET", f"/blobs/{digest}") for digest in layers] == [1] * len(layers)
        for path, _, names in os.walk(target):
            for name in names:
                if os.path.isfile(os.path.join(path, name)):
                    Path(path, name).read_bytes()
        assert [proxy.count("GET", f"/blobs/{digest}") for digest in layers] == [1] * len(layers)
        machine.forget()
        yield machine, proxy, image


@pytest.fixture
def full(filled: tuple[Host, FaultProxy, str]) -> Iterator[tuple[Host, FaultProxy, str]]:
    """That host, with nothing mounted and no process."""
    filled[1].clear()
    yield filled
    filled[0].forget()


def test_the_pushed_index_serves_another_cache(
    full: tuple[Host, FaultProxy, str], lazyfs: Lazyfs, tmp_path: Path, layouts: dict[str, Path]
) -> None:
    machine, proxy, image = full
    with host(lazyfs, tmp_path, machine.backend) as other:
        target = other.mount(image)
        layers = layers_of(layouts["busybox"])
        assert blob_requests(proxy, layers) == 0
        assert "root:x:0:0" in (target / "etc/passwd").read_text()
        assert blob_requests(proxy, layers) > 0
        assert all(request.range for request in proxy.matching(path="/blobs/(" + "|".join(layers) + ")"))


def test_the_index_is_found_by_the_fallback_tag(
    full: tuple[Host, FaultProxy, str], registry: RegistryServer, layouts: dict[str, Path]
) -> None:
    """docker-registry 2.8 has no referrers API (distribution-spec, "Referrers Tag Schema")."""
    image = full[2]
    repository = image.partition("/")[2]
    digest = Layout(layouts["busybox"]).resolve("gzip")["digest"]
    assert registry.request("GET", f"/v2/{repository}/referrers/{digest}")[0] == 404
    tag = digest.replace(":", "-")
    accept = {"Accept": "application/vnd.oci.image.index.v1+json"}
    status, _, body = registry.request("GET", f"/v2/{repository}/manifests/{tag}", headers=accept)
    assert status == 200 and b"lazyfs" in body


def test_a_cached_image_by_tag_asks_for_the_tag_only(full: tuple[Host, FaultProxy, str]) -> None:
    machine, proxy, image = full
    target = machine.mount(image)
    assert (target / "bin/busybox").read_bytes()
    assert lookups(proxy) == [f"{image.partition('/')[2]}/manifests/latest"]


def test_a_cached_image_needs_no_registry(
    full: tuple[Host, FaultProxy, str], layouts: dict[str, Path]
) -> None:
    """By its digest, with `offline`, or if its registry is away. The last test of `full`: it stops the registry."""
    machine, proxy, image = full
    digest = Layout(layouts["busybox"]).resolve("gzip")["digest"]
    by_digest = machine.mount(f"{image}@{digest}")  # seen for the first time in this form
    assert (by_digest / "bin/busybox").read_bytes()
    machine.forget()
    proxy.clear()
    proxy.close()
    for name, options in ((f"{image}@{digest}", ""), (image, "offline"), (image, "pull=missing")):
        target = machine.mount(name, options=options)
        assert (target / "bin/busybox").stat().st_size == len((target / "bin/busybox").read_bytes())
        machine.forget()
    words = ("mount", "-o", f"{machine.options},timeout=2", image, machine.target())
    warned = machine.lazyfs(*words).stderr
    assert warned.startswith(f"lazyfs: warning: {image} is as it was here last: ") and proxy.host in warned
    assert (Path(str(words[-1])) / "bin/busybox").read_bytes()
    machine.forget()
    code, message = machine.refused(f"{image}-other", options="timeout=2")  # another tag was never here
    assert code == 32 and proxy.host in message
    assert proxy.requests == []


def test_what_offline_cannot_do(machine: Host, proxy: FaultProxy, pushed: Pushed) -> None:
    image = f"{proxy.host}/{pushed('busybox', 'gzip', False)}"
    proxy.clear()
    code, message = machine.refused(image, options="offline")
    assert code == 1 and "is not in the cache" in message and "without 'offline'" in message
    assert proxy.requests == []
