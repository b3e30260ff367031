"""One image for all fault tests, and mounts of it through a fault proxy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Lazyfs, unmount
from tests.faults import world as worlds
from tests.faults.processes import end_daemon
from tests.faults.world import World
from tests.servers import FaultProxy, RegistryServer

Mount = Callable[..., Path]


@pytest.fixture(scope="session")
def world(registry: RegistryServer, lazyfs: Lazyfs, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The image in the session's registry, its index attached."""
    built = worlds.build(tmp_path_factory.mktemp("faults-image"))
    worlds.upload(built, registry.host)
    scratch = tmp_path_factory.mktemp("faults-index")
    for image in (built.image(registry.host), f"{registry.host}/{built.other}:v1"):
        lazyfs("index", "--push", "-o", f"cache={scratch}", image)
    return built


@pytest.fixture
def proxy(registry: RegistryServer) -> Iterator[FaultProxy]:
    """Between lazyfs and the registry; add rules once the image is mounted."""
    with FaultProxy(registry) as server:
        yield server


@pytest.fixture(params=["kernel", "fuse"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def mount(lazyfs: Lazyfs, cache: Path, tmp_path: Path) -> Iterator[Mount]:
    """``mount(image, "backend=kernel", "timeout=2")`` at a new mount point, which it returns. All is
    unmounted in the end, and the daemon ended."""
    targets: list[Path] = []

    def at_a_new_place(image: str, *options: str) -> Path:
        target = Path(tempfile.mkdtemp(prefix="mount-", dir=tmp_path))
        targets.append(target)
        lazyfs("mount", "-o", ",".join([f"cache={cache}", *options]), image, target)
        return target

    yield at_a_new_place
    for target in targets:
        unmount(target)
    end_daemon(cache)
