"""Fixtures of the system tests: hosts, and images in the registry, with an attached index and without."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import realimages
from tests.conftest import Lazyfs
from tests.layout import Layout, push
from tests.servers import FaultProxy, RegistryServer
from tests.whole import oddities
from tests.whole.mounting import BACKENDS, Host, host
from tests.whole.trees import Tree, unpacked

Pushed = Callable[[str, str, bool], str]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def machine(lazyfs: Lazyfs, tmp_path: Path, backend: str) -> Iterator[Host]:
    """A host with an empty cache; every mount of it ends with the test."""
    with host(lazyfs, tmp_path, backend) as made:
        yield made


@pytest.fixture
def kernel_host(lazyfs: Lazyfs, tmp_path: Path) -> Iterator[Host]:
    with host(lazyfs, tmp_path, "kernel") as made:
        yield made


@pytest.fixture
def proxy(registry: RegistryServer) -> Iterator[FaultProxy]:
    """Stands before the registry and counts."""
    with FaultProxy(registry) as made:
        yield made


@pytest.fixture(scope="session")
def image() -> str:
    """A small image that needs no server."""
    return f"oci:{realimages.busybox()}:gzip"


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return oddities.image(tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="session")
def layouts(odd: Layout) -> dict[str, Path]:
    return {"debian": realimages.debian(), "busybox": realimages.busybox(), "odd": odd.path}


@pytest.fixture(scope="session")
def trees(layouts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tree]:
    """What umoci makes of an image; its tags all hold the same tree."""

    @functools.cache
    def tree(name: str) -> Tree:
        bundle = tmp_path_factory.mktemp(f"umoci-{name}")
        return unpacked(realimages.unpack(layouts[name], "gzip", bundle / "bundle"), bundle.stat().st_mtime_ns)

    return tree


@pytest.fixture(scope="session")
def pushed(
    layouts: dict[str, Path],
    registry: RegistryServer,
    lazyfs: Lazyfs,
    tmp_path_factory: pytest.TempPathFactory,
) -> Pushed:
    """Repository and tag of an image variant in the registry: ``pushed("debian", "zstd", indexed)``. The tag
    "docker" is "gzip" with Docker's schema 2 manifests."""
    cache = tmp_path_factory.mktemp("index-cache")

    @functools.cache
    def push_once(name: str, tag: str, indexed: bool) -> str:
        repository = f"system/{name}-{tag}-{'indexed' if indexed else 'plain'}:latest"
        source = "gzip" if tag == "docker" else tag
        push(layouts[name], source, f"{registry.host}/{repository}", docker=tag == "docker")
        if indexed:
            lazyfs("index", "--push", "-o", f"cache={cache}", f"{registry.host}/{repository}")
        return repository

    return push_once
