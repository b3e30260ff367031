"""Write OCI image layouts (image-spec image-layout.md): blobs, manifests, indexes, tags.

Only the writing side, for tests and benchmarks; the product has its own reader, so a mistake here cannot
hide a mistake there. Pushing to a registry is left to skopeo, an ordinary tool.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from backports import zstd

CHUNK_BYTES = 1 << 20
Descriptor = dict[str, Any]
GZIP, ZSTD, ZSTD_FRAMES, PLAIN = "gzip", "zstd", "zstd-frames", "none"
LAYER_TYPES = {
    GZIP: "application/vnd.oci.image.layer.v1.tar+gzip",
    ZSTD: "application/vnd.oci.image.layer.v1.tar+zstd",
    ZSTD_FRAMES: "application/vnd.oci.image.layer.v1.tar+zstd",
    PLAIN: "application/vnd.oci.image.layer.v1.tar",
}
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
# Frame size of ZSTD_FRAMES in uncompressed bytes: several frames even in a small test layer.
FRAME_BYTES = 1 << 20


class Layout:
    """An OCI image layout directory being written; writing a blob twice does no harm."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        marker = path / "oci-layout"
        if not marker.exists():
            marker.write_text('{"imageLayoutVersion":"1.0.0"}')
            self._write_index([])

    def blob_path(self, digest: str) -> Path:
        return self.path / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def add_blob(self, data: bytes, media_type: str) -> Descriptor:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.blob_path(digest).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def add_json(self, document: object, media_type: str) -> Descriptor:
        return self.add_blob(json.dumps(document, separators=(",", ":")).encode(), media_type)

    def add_layer(self, tar: bytes | Path, compression: str = GZIP) -> tuple[Descriptor, str]:
        """Compress a tar into a layer blob. Returns its descriptor and its DiffID."""
        with tempfile.NamedTemporaryFile(dir=self.path, delete=False) as out:
            uncompressed, compressed, size = hashlib.sha256(), hashlib.sha256(), 0

            def chunks() -> Iterator[bytes]:
                for chunk in _chunks(tar):
                    uncompressed.update(chunk)
                    yield chunk

            for piece in compress(chunks(), compression):
                compressed.update(piece)
                size += len(piece)
                out.write(piece)
        digest = "sha256:" + compressed.hexdigest()
        os.chmod(out.name, 0o644)
        os.replace(out.name, self.blob_path(digest))
        descriptor = {"mediaType": LAYER_TYPES[compression], "digest": digest, "size": size}
        return descriptor, "sha256:" + uncompressed.hexdigest()

    def add_image(
        self,
        layers: Sequence[tuple[Descriptor, str]],
        config: dict[str, Any] | None = None,
        *,
        architecture: str = "amd64",
        variant: str = "",
    ) -> Descriptor:
        """Add config and manifest over `layers` (from `add_layer`); `config` is the image's run-time part."""
        document: dict[str, Any] = {"architecture": architecture, "os": "linux", "config": config or {}}
        if variant:
            document["variant"] = variant
        document["rootfs"] = {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]}
        document["history"] = [{"created_by": "lazyfs tests"} for _ in layers]
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": self.add_json(document, CONFIG_TYPE),
            "layers": [descriptor for descriptor, _ in layers],
        }
        return self.add_json(manifest, MANIFEST_TYPE)

    def add_index(self, manifests: Sequence[tuple[Descriptor, dict[str, str]]]) -> Descriptor:
        """Add an image index over (manifest, platform) pairs."""
        entries = [{**descriptor, "platform": platform} for descriptor, platform in manifests]
        return self.add_json({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}, INDEX_TYPE)

    def tag(self, name: str, descriptor: Descriptor) -> None:
        """Point the tag `name` at a manifest or index, replacing an older one."""
        key = "org.opencontainers.image.ref.name"
        kept = [m for m in self._read_index() if m.get("annotations", {}).get(key) != name]
        self._write_index([*kept, {**descriptor, "annotations": {key: name}}])

    def resolve(self, name: str) -> Descriptor:
        key = "org.opencontainers.image.ref.name"
        return next(m for m in self._read_index() if m.get("annotations", {}).get(key) == name)

    def document(self, descriptor: Descriptor) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.blob_path(descriptor["digest"]).read_bytes())
        return document

    def _read_index(self) -> list[Descriptor]:
        manifests: list[Descriptor] = json.loads((self.path / "index.json").read_bytes())["manifests"]
        return manifests

    def _write_index(self, manifests: Sequence[Descriptor]) -> None:
        document = {"schemaVersion": 2, "manifests": list(manifests)}
        (self.path / "index.json").write_text(json.dumps(document))


def compress(chunks: Iterator[bytes], compression: str) -> Iterator[bytes]:
    """Compress a stream. Same input, same bytes: gzip's header carries neither name nor time."""
    if compression == PLAIN:
        yield from chunks
    elif compression == GZIP:
        deflater = zlib.compressobj(6, zlib.DEFLATED, 31)
        for chunk in chunks:
            yield deflater.compress(chunk)
        yield deflater.flush()
    else:
        zstandard = zstd.ZstdCompressor()
        for chunk in chunks:
            for start in range(0, len(chunk), FRAME_BYTES):
                piece = chunk[start : start + FRAME_BYTES]
                if compression == ZSTD_FRAMES:
                    yield zstandard.compress(piece, zstandard.FLUSH_FRAME)
                else:
                    yield zstandard.compress(piece)
        if compression == ZSTD:
            yield zstandard.flush()


def push(layout: Path, tag: str, destination: str, *, docker: bool = False) -> None:
    """Push one tag with skopeo over plain HTTP, all platforms of an index included.

    `docker` converts the manifests to Docker schema 2 on the way; otherwise every digest is kept.
    """
    skopeo = shutil.which("skopeo") or "/usr/bin/skopeo"
    form = ["--format", "v2s2"] if docker else ["--preserve-digests"]
    command = [skopeo, "--insecure-policy", "copy", "--quiet", "--all", *form, "--dest-tls-verify=false"]
    subprocess.run([*command, f"oci:{layout}:{tag}", f"docker://{destination}"], check=True, timeout=300)


def _chunks(tar: bytes | Path) -> Iterator[bytes]:
    if isinstance(tar, bytes):
        for start in range(0, len(tar), CHUNK_BYTES):
            yield tar[start : start + CHUNK_BYTES]
        return
    with tar.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk
