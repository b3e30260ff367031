"""Hosts that pull an image whole before a container starts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from benchmarks.hellobench.runners import Container, RuncContainer, Runner, overlay_container, unique
from benchmarks.host import Containerd, run


class CtrContainer(Container):
    """A container of containerd's default runtime, which is runc behind its shim."""

    def __init__(self, containerd: Containerd, name: str) -> None:
        super().__init__(containerd.directory / f"{name}.log")
        self._containerd = containerd
        self.name = name

    @property
    def command(self) -> list[str]:
        return [*self._containerd.ctr("task", "start", self.name)]

    def kill_command(self) -> list[str]:
        return [*self._containerd.ctr("task", "kill", "--signal", "SIGKILL", self.name)]

    def remove(self) -> None:
        run(*self._containerd.ctr("container", "rm", self.name))


class CtrRunner(Runner):
    """containerd with overlayfs snapshots, asked by its own command."""

    mode = "ctr"

    def __init__(self, directory: Path, template: Path) -> None:
        super().__init__(directory, template)
        self._containerd = Containerd(directory / "containerd")

    def services(self) -> contextlib.AbstractContextManager[object]:
        return self._containerd

    def pull(self, reference: str) -> None:
        self._containerd.pull(reference)

    def create(self, reference: str) -> Container:
        name = unique("hellobench")
        # The host's network, as for all runners.
        create = self._containerd.ctr("container", "create", "--snapshotter", "overlayfs", "--net-host")
        run(*create, reference, name)
        return CtrContainer(self._containerd, name)


class UmociRunner(Runner):
    """Without any daemon: skopeo fetches, umoci unpacks, the kernel's overlayfs and runc do the rest."""

    mode = "umoci"

    def __init__(self, directory: Path, template: Path) -> None:
        super().__init__(directory, template)
        self._roots: dict[str, Path] = {}

    @contextlib.contextmanager
    def services(self) -> Iterator[None]:
        yield

    def pull(self, reference: str) -> None:
        layout, tag, bundle = self.directory / "layout", unique("image"), self.directory / unique("unpacked")
        source = ("--src-tls-verify=false", f"docker://{reference}")
        run("skopeo", "--insecure-policy", "copy", "--quiet", *source, f"oci:{layout}:{tag}")
        run("umoci", "unpack", "--image", f"{layout}:{tag}", bundle)
        self._roots[reference] = bundle / "rootfs"

    def create(self, reference: str) -> RuncContainer:
        return overlay_container(self._roots[reference], self.directory / unique("container"), self.template)


class LocalRunner(Runner):
    """The image is unpacked on the host already, and in the page cache: the part of a start that no way of
    fetching can shorten. `root`: the unpacked image."""

    mode = "local"

    def __init__(self, directory: Path, template: Path, root: Path) -> None:
        super().__init__(directory, template)
        self._root = root

    @contextlib.contextmanager
    def services(self) -> Iterator[None]:
        yield

    def pull(self, reference: str) -> None:
        """Nothing is left to do."""

    def create(self, reference: str) -> RuncContainer:
        return overlay_container(self._root, self.directory / unique("container"), self.template)
