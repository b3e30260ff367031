"""The image of the fault tests with a startup pack, or with whatever a test attaches in its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lazyfs.cache.directory import CacheDirectory
from lazyfs.core.oci.digests import ContentRoot, Digest, sha256_digest
from lazyfs.core.oci.documents import MEDIA_INDEX, Descriptor
from lazyfs.core.oci.referrers import build_artifact, first_blob, referrers_tag
from lazyfs.core.starts.pack import PACK_ARTIFACT_TYPE, PACK_MEDIA_TYPE, build_pack, parse_head
from lazyfs.images.packs import REVISION, STARTS
from tests.conftest import Lazyfs, unmount
from tests.faults.processes import end_daemon
from tests.faults.world import World
from tests.layout import push
from tests.servers import MANIFEST, RegistryServer

REPOSITORY = "packed"
LAYERS = range(6)  # the pack has their files, in this order
FILES = [f"l{number}/{name}" for number in LAYERS for name in ("large", "small", "medium")]


@dataclass
class Packed:
    """The image in a repository of its own. `blocks`: of the files in FILES, with their content, in this order."""

    registry: RegistryServer
    manifest: bytes
    index: bytes  # the list of what is attached, with the image's index only
    blocks: list[tuple[ContentRoot, int, bytes]]
    scratch: Path  # a cache that has the image

    @property
    def digest(self) -> Digest:
        return sha256_digest(self.manifest)

    def image(self, host: str) -> str:
        return f"{host}/{REPOSITORY}:v1"

    def pack(self, manifest_digest: Digest | None = None, others: dict[int, bytes] | None = None) -> bytes:
        """The pack. `others`: contents in place of the right ones, by position."""
        contents = {(root, block): content for root, block, content in self.blocks}
        for number, content in (others or {}).items():
            contents[self.blocks[number][:2]] = content
        roots = list(dict.fromkeys(root for root, _, _ in self.blocks))
        needed = [(roots.index(root), block) for root, block, _ in self.blocks]
        return build_pack(manifest_digest or self.digest, roots, needed, lambda *key: contents[key], b"")

    def attach(self, pack: bytes) -> str:
        """Puts these bytes in the place of the pack; returns the path of the blob in requests."""
        digest = self.registry.put_blob(REPOSITORY, pack)
        self.registry.put_blob(REPOSITORY, b"{}")
        blobs = [Descriptor(PACK_MEDIA_TYPE, digest, len(pack))]
        annotations = first_blob(blobs) | {STARTS: "1", REVISION: "1"}
        subject = Descriptor(MANIFEST, self.digest, len(self.manifest))
        artifact = build_artifact(PACK_ARTIFACT_TYPE, blobs, subject, annotations)
        listed = json.loads(self.index)
        stored = self.registry.put_manifest(REPOSITORY, artifact)
        entry = Descriptor(MANIFEST, stored, len(artifact), annotations, None, PACK_ARTIFACT_TYPE)
        listed["manifests"].append(entry.to_json())
        self.registry.put_manifest(REPOSITORY, json.dumps(listed).encode(), MEDIA_INDEX, referrers_tag(self.digest))
        return f"/blobs/{digest}"


def build(world: World, registry: RegistryServer, lazyfs: Lazyfs, scratch: Path) -> Packed:
    """Pushes the image with its index, and reads what the pack shall have."""
    image = f"{registry.host}/{REPOSITORY}:v1"
    push(world.layout, "v1", image)
    cache, target = scratch / "cache", scratch / "target"
    cache.mkdir(mode=0o700)
    target.mkdir()
    lazyfs("index", "--push", "-o", f"cache={cache}", image)
    lazyfs("mount", "-o", f"cache={cache}", image, target)
    try:
        for path in FILES:
            assert (target / path).read_bytes() == world.truth[path]
    finally:
        unmount(target)
        end_daemon(cache)
    manifest = world.manifest()
    tag = referrers_tag(sha256_digest(manifest))
    status, _, listed = registry.request("GET", f"/v2/{REPOSITORY}/manifests/{tag}", headers={"Accept": MEDIA_INDEX})
    assert status == 200
    return Packed(registry, manifest, listed, list(_blocks(world, CacheDirectory(str(cache)))), cache)


def _blocks(world: World, cache: CacheDirectory) -> Iterator[tuple[ContentRoot, int, bytes]]:
    """Of the files in FILES, found in the cache by their beginnings."""
    found = {}
    with ExitStack() as stack:
        for entry in sorted(Path(cache.path, "layers").iterdir()):
            layer = cache.open_layer(ContentRoot(entry.name))
            assert layer is not None
            stack.callback(layer.close)
            for block in range(layer.table.count):
                if layer.has(block):
                    data = layer.read(layer.table.addresses[block], layer.table.lengths[block])
                    assert data is not None
                    found[bytes(data)] = (layer.content_root, block)
    for path in FILES:
        for at in range(0, len(world.truth[path]), 256 << 10):
            content = world.truth[path][at : at + (256 << 10)]
            yield (*found[content], content)


def frames_of(pack: bytes) -> list[range]:
    """Where the frames lie."""
    head = parse_head(pack, len(pack))
    return [range(frame.offset, frame.offset + frame.stored_bytes) for frame in head.frames]
