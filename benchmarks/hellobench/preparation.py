"""What a workload needs before it is measured: its image in the registry, and facts about it. Done once a run."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import attached, command
from benchmarks.command import PROGRAM, Lazyfs
from benchmarks.hellobench import images, needed, readiness
from benchmarks.hellobench.eager import LocalRunner
from benchmarks.hellobench.runners import INDEXED, PLAIN, unique
from benchmarks.hellobench.workloads import Workload
from benchmarks.host import drop_page_cache, now, run
from tests.layout import Layout, push
from tests.servers import RegistryServer

TAG = "latest"


@dataclass(frozen=True)
class Pushed:
    """What pushing an image for the first time took, in seconds: the image, and its index on top of that.

    `index_blobs`: digests."""

    image_s: float
    index_s: float
    index_blobs: frozenset[str]
    index_bytes: int


class Preparation:
    """Pushes images, makes the containers' configurations and measures what starts need. One user at a time."""

    def __init__(self, directory: Path, registry: RegistryServer) -> None:
        self.directory = directory
        self.registry = registry
        self.layout = Layout(images.layout())
        self._pushed: dict[str, Pushed] = {}
        self._templates: dict[str, Path] = {}
        self._lazyfs = Lazyfs(directory / "preparing")

    def repository(self, workload: Workload, kind: str) -> str:
        """The path of a workload's images in the registry. `kind`: PLAIN, INDEXED and so on."""
        return f"{kind}/{workload.name}"

    def pushed(self, workload: Workload) -> Pushed:
        """Bring the image to the registry, plain and with its index."""
        if workload.name not in self._pushed:
            host = self.registry.host
            started = now()
            self.push_to(host, images.layout(), workload.name, self.repository(workload, PLAIN), TAG)
            image_s = now() - started
            self.push_to(host, images.layout(), workload.name, self.repository(workload, INDEXED), TAG)
            started = now()
            reference = f"{host}/{self.repository(workload, INDEXED)}:{TAG}"
            command.index(reference, self.directory / "indexing")
            index_s = now() - started
            index = attached.blobs(self.registry.url, reference)
            self._pushed[workload.name] = Pushed(image_s, index_s, frozenset(index), sum(index.values()))
        return self._pushed[workload.name]

    def push_to(self, host: str, layout: Path, tag: str, repository: str, as_tag: str) -> None:
        """Push an image of a layout to the registry, which is called `host` from here."""
        push(layout, tag, f"{host}/{repository}:{as_tag}")

    def template(self, workload: Workload) -> Path:
        """A bundle whose configuration is made from the image's. Its root is not mounted."""
        if workload.name not in self._templates:
            bundle = self.directory / unique("template")
            image = f"oci:{images.layout()}:{workload.name}"
            run(PROGRAM, "bundle", "-o", self._lazyfs.options("rw"), image, bundle)
            self._lazyfs.umount(bundle / "rootfs")
            self._templates[workload.name] = bundle
        return self._templates[workload.name]

    @contextlib.contextmanager
    def unpacked(self, workload: Workload) -> Iterator[Path]:
        """The image's root on a local file system of its own, which reads nothing ahead."""
        directory = self.directory / unique("local")
        try:
            with needed.unpacked(images.layout(), workload.name, directory) as root:
                yield root
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def facts(self, workload: Workload, root: Path) -> dict[str, Any]:
        """The record "image": sizes, and what a start reads. `root`: as from `unpacked`."""
        layers = images.layers(workload.name)
        found = self._needed(workload, root)
        pushed = self.pushed(workload)
        return {
            "record": "image",
            "workload": workload.name,
            "category": workload.category,
            "kind": workload.kind,
            "fat": workload.fat,
            "compressed_bytes": sum(layer.size_bytes for layer in layers),
            "tar_bytes": sum(layer.tar_bytes for layer in layers),
            "layers": [
                {"compressed_bytes": layer.size_bytes, "tar_bytes": layer.tar_bytes, "read_bytes": read}
                for layer, read in zip(layers, found.layer_bytes, strict=True)
            ],
            "files": found.files,
            "needed_bytes": found.plain_bytes,
            "needed_compressed_bytes": found.compressed_bytes,
            "first_push_s": pushed.image_s,
            "index_s": pushed.index_s,
            "index_bytes": pushed.index_bytes,
            "packages": images.packages(workload.name),
        }

    def _needed(self, workload: Workload, root: Path) -> needed.Needed:
        layers = needed.layers_of(self.layout, workload.name)
        runner = LocalRunner(self.directory / unique("host"), self.template(workload), root)
        container = runner.create(workload.name)
        drop_page_cache()
        try:
            process = container.start()
            readiness.wait_until_ready(workload.ready, process, workload.deadline_s)
            return needed.touched(root, layers)
        finally:
            container.kill()
            container.remove()
