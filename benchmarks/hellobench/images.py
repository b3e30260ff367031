"""The workloads' images: one OCI layout with a tag for each, built when they are missing or their recipe changed.

    ensure([WORKLOADS["python"]], report)
    push(layout(), "python", f"{registry.host}/python:latest")

They live in the cache of the tests' images, below "hellobench":

    layout/              the OCI layout; blobs are shared, layers are gzip
    packages/NAME.json   package -> version, as dpkg-query had it when the image was built
    layers.json          DiffID -> digest, size, tar_bytes of every layer in the layout
    archives/            .deb files, so that none is downloaded twice; safe to delete, as all of it is
    building/            buildah's storage, only during a build

    python -m benchmarks.hellobench build      builds all; with --workload NAME, those named
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.hellobench.building import Session
from benchmarks.hellobench.imagestore import ImageStore, replace
from benchmarks.hellobench.recipes import recipe
from benchmarks.hellobench.workloads import Workload
from tests.layertar import LayerTar
from tests.layout import CONFIG_TYPE, GZIP, MANIFEST_TYPE, Layout
from tests.realimages import images_directory

Report = Callable[[str, int, int], None]
CHANGED_FILE = "app/release"  # in no image; text of one line, as a change of one constant in a source is small


@dataclass(frozen=True)
class Layer:
    """A layer of an image, the lowest first: `size_bytes` compressed, `tar_bytes` as a plain tar."""

    digest: str
    diff_id: str
    size_bytes: int
    tar_bytes: int


def directory() -> Path:
    return images_directory() / "hellobench"


def layout() -> Path:
    """The OCI layout with the images that were built; tags are names of workloads."""
    return directory() / "layout"


def ensure(workloads: Sequence[Workload], report: Report) -> None:
    """Build what is missing or was built from another recipe, in this order; needs root.

    `report(name, done, total)` is called before each build and once after the last. Another process' builds are
    waited for. An image gets its tag when it is whole; after an interruption the others are built by the next call.
    """
    directory().mkdir(parents=True, exist_ok=True)
    if not _missing(workloads):
        return  # without waiting for somebody who builds others
    with _locked():
        missing = _missing(workloads)
        if missing:
            with Session(ImageStore(layout()), directory() / "building", directory() / "archives") as session:
                for done, workload in enumerate(missing):
                    report(workload.name, done, len(missing))
                    _packages_path(workload.name).parent.mkdir(exist_ok=True)
                    versions = session.build(workload)
                    replace(_packages_path(workload.name), json.dumps(versions, indent=1))
            report("", len(missing), len(missing))


def _missing(workloads: Sequence[Workload]) -> list[Workload]:
    store = ImageStore(layout())
    return [workload for workload in workloads if store.built_recipe(workload.name) != recipe(workload)]


def packages(name: str) -> dict[str, str]:
    """Package -> version of an image that was built; of one from scratch, those of the builder of its files."""
    versions: dict[str, str] = json.loads(_packages_path(name).read_bytes())
    return versions


def layers(name: str) -> list[Layer]:
    """The layers of an image that was built."""
    store = ImageStore(layout())
    manifest, config = _documents(store, name)
    diff_ids: list[str] = config["rootfs"]["diff_ids"]
    return [
        Layer(layer["digest"], diff_id, layer["size"], store.layers[diff_id]["tar_bytes"])
        for layer, diff_id in zip(manifest["layers"], diff_ids, strict=True)
    ]


def changed(name: str, nonce: str, into: Path) -> str:
    """The image after a change of one file of its application: one more layer, in the OCI layout `into`.

    The layout is made if need be; it shares the blobs by hard links, or by symbolic ones across file systems.
    Another `nonce` is another layer. Gives the tag in `into`.
    """
    store, target = Layout(layout()), Layout(into)
    manifest, config = _documents(store, name)
    for layer in manifest["layers"]:
        _share(store.blob_path(layer["digest"]), target.blob_path(layer["digest"]))
    tar = LayerTar().dir("app").file(CHANGED_FILE, f"{name} {nonce}\n".encode()).data()
    layer, diff_id = target.add_layer(tar, GZIP)
    config["rootfs"]["diff_ids"].append(diff_id)
    config.setdefault("history", []).append({"created_by": f"COPY release /{CHANGED_FILE}"})
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": target.add_json(config, CONFIG_TYPE),
        "layers": [*manifest["layers"], layer],
    }
    target.tag(name, target.add_json(document, MANIFEST_TYPE))
    return name


def _documents(store: Layout, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and configuration of a tag."""
    try:
        manifest = store.document(store.resolve(name))
    except StopIteration:
        raise LookupError(f"the image {name} has not been built") from None
    return manifest, store.document(manifest["config"])


def _share(blob: Path, link: Path) -> None:
    if not link.exists():
        try:
            os.link(blob, link)
        except OSError:  # another file system
            link.symlink_to(blob)


def _packages_path(name: str) -> Path:
    return directory() / "packages" / f"{name}.json"


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    with (directory() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
