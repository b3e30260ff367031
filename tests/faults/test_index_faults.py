"""Index artifacts that are damaged in the registry: passed over, or refused with a clear error."""

from __future__ import annotations

import errno
import hashlib
import json
import random
from pathlib import Path

from lazyfs.core.index.imageindex import ARTIFACT_TYPE, IMAGE_MEDIA_TYPE
from tests.conftest import Lazyfs
from tests.faults.conftest import Mount
from tests.faults.processes import end_daemon
from tests.faults.world import World, assert_right, read
from tests.servers import MANIFEST, RegistryServer

ROUNDS = 5
PATHS = ("l0/large", "l1/large", "l2/large", "l4/large", "l15/medium", "bulk/0", "bulk/30", "bulk/59")
INDEX = "application/vnd.oci.image.index.v1+json"


def _artifact(world: World, registry: RegistryServer, repository: str) -> dict[str, object]:
    """The manifest of the index artifact of the sound image."""
    subject = "sha256:" + hashlib.sha256(world.manifest()).hexdigest()
    tag = subject.replace(":", "-")
    status, _, body = registry.request("GET", f"/v2/{repository}/manifests/{tag}", headers={"Accept": INDEX})
    assert status == 200
    digest = json.loads(body)["manifests"][0]["digest"]
    _, _, body = registry.request("GET", f"/v2/{repository}/manifests/{digest}", headers={"Accept": MANIFEST})
    document: dict[str, object] = json.loads(body)
    assert document["artifactType"] == ARTIFACT_TYPE
    return document


def _attach(
    world: World, registry: RegistryServer, repository: str, artifact: dict[str, object], index: bytes
) -> None:
    """Makes `index` the only one of the image in `repository`."""
    layers = [dict(one) for one in artifact["layers"]]  # type: ignore[attr-defined]
    for one in layers:
        if one["mediaType"] == IMAGE_MEDIA_TYPE:
            one["digest"], one["size"] = registry.put_blob(repository, index), len(index)
        else:
            _, _, blob = registry.request("GET", f"/v2/{world.repository}/blobs/{one['digest']}")
            registry.put_blob(repository, blob)
    config = artifact["config"]
    assert isinstance(config, dict)
    _, _, blob = registry.request("GET", f"/v2/{world.repository}/blobs/{config['digest']}")
    registry.put_blob(repository, blob)
    raw = json.dumps(artifact | {"layers": layers}).encode()
    digest = registry.put_manifest(repository, raw)
    entry = {"mediaType": MANIFEST, "digest": digest, "size": len(raw), "artifactType": ARTIFACT_TYPE}
    listing = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}).encode()
    subject = "sha256:" + hashlib.sha256(world.manifest()).hexdigest()
    registry.put_manifest(repository, listing, INDEX, subject.replace(":", "-"))


def test_a_damaged_index_is_passed_over(
    world: World, registry: RegistryServer, mount: Mount, lazyfs: Lazyfs, target: Path, cache: Path
) -> None:
    """With right digests, so that nothing but its own checks notices: the mount builds an index of its own,
    or fails with a clear error, or reads fail; no wrong byte."""
    seed = 1
    rng = random.Random(seed)
    repository = "damaged-index"
    image = f"{registry.host}/{repository}:v1"
    for blob in (world.layout / "blobs" / "sha256").iterdir():
        registry.put_blob(repository, blob.read_bytes())
    registry.put_manifest(repository, world.manifest(), tag="v1")
    artifact = _artifact(world, registry, world.repository)
    described = artifact["layers"][0]  # type: ignore[index]
    _, _, sound = registry.request("GET", f"/v2/{world.repository}/blobs/{described['digest']}")
    for number in range(ROUNDS):
        damaged = bytearray(sound)
        if number == 0:
            del damaged[len(damaged) // 2 :]
        elif number == 1:
            damaged[:] = b"\x00" * 100
        for _ in range(0 if number < 2 else 1 + 3 * (number - 2)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        _attach(world, registry, repository, artifact, bytes(damaged))
        mounted = lazyfs("mount", "-o", f"cache={cache},timeout=5", image, target, check=False)
        assert "Traceback" not in mounted.stderr, f"seed {seed}, round {number}: {mounted.stderr}"
        if mounted.returncode == 0:
            for path in PATHS:
                outcome = read(target / path)
                assert outcome.error in (0, errno.EIO), f"seed {seed}, round {number}: {path}"
                assert outcome.data in (None, world.truth[path]), f"seed {seed}, round {number}: {path}"
            lazyfs("umount", target)
        else:
            # Not for ever: the index is forgotten, and a sound one would be found.
            assert mounted.stderr.startswith("lazyfs: "), f"seed {seed}, round {number}: {mounted.stderr}"
            assert not list(cache.glob("indexes/*/image-*"))
        end_daemon(cache)
        lazyfs("cache", "prune", "--cache", cache)
    _attach(world, registry, repository, artifact, sound)
    assert_right(world, mount(image, "backend=kernel"))
