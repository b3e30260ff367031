"""The OCI layout that holds all images, and what is known of its layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from tests.layout import Descriptor, Layout

# In the annotations of a manifest: the hash of what its image was built from.
RECIPE_KEY = "org.lazyfs.hellobench.recipe"


class KnownLayer(TypedDict):
    """A layer blob and the size of its plain tar."""

    digest: str
    size: int
    tar_bytes: int


class ImageStore(Layout):
    """The layout with the results, and what is known of its layers. Its index is replaced, never half written."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._layers_path = path.parent / "layers.json"
        known: dict[str, KnownLayer] = {}
        if self._layers_path.exists():
            known = json.loads(self._layers_path.read_bytes())
        self.layers = known  # by DiffID

    def remember(self, diff_id: str, digest: str, size: int, tar_bytes: int) -> None:
        self.layers[diff_id] = {"digest": digest, "size": size, "tar_bytes": tar_bytes}
        replace(self._layers_path, json.dumps(self.layers, indent=1))

    def built_recipe(self, tag: str) -> str | None:
        """The recipe that a tag was built from; None without such an image."""
        try:
            manifest = self.document(self.resolve(tag))
        except (StopIteration, FileNotFoundError):
            return None
        found: str | None = manifest.get("annotations", {}).get(RECIPE_KEY)
        return found

    def sweep(self) -> None:
        """Delete blobs that no tag needs: of images that were replaced, or of an interrupted build."""
        kept: set[str] = set()
        for descriptor in self._read_index():
            manifest = self.document(descriptor)
            kept |= {descriptor["digest"], manifest["config"]["digest"]}
            kept |= {layer["digest"] for layer in manifest["layers"]}
        for blob in (self.path / "blobs" / "sha256").iterdir():
            if f"sha256:{blob.name}" not in kept:
                blob.unlink()
        self.layers = {diff_id: layer for diff_id, layer in self.layers.items() if layer["digest"] in kept}
        replace(self._layers_path, json.dumps(self.layers, indent=1))

    def _write_index(self, manifests: Sequence[Descriptor]) -> None:
        replace(self.path / "index.json", json.dumps({"schemaVersion": 2, "manifests": list(manifests)}))


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)
