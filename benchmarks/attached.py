"""What is attached to an image, as the registry has it (independent of what lazyfs says)."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

ANSWER_S = 30.0
ACCEPT = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json"
PACK = "application/vnd.lazyfs.pack.v1"  # docs/FORMATS.md


def blobs(url: str, reference: str, artifact_type: str = "") -> dict[str, int]:
    """Digest -> bytes of all blobs of the artifacts (of one type) attached to an image, found by the fallback tag
    ``sha256-<hex>`` (distribution-spec, "Referrers Tag Schema"). `reference` is HOST/REPOSITORY:TAG."""
    repository, _, tag = reference.partition("/")[2].rpartition(":")
    _, digest = _manifest(url, repository, tag)
    referrers, _ = _manifest(url, repository, digest.replace(":", "-"))
    found: dict[str, int] = {}
    for entry in referrers["manifests"]:
        artifact, _ = _manifest(url, repository, entry["digest"])
        if artifact_type in ("", artifact.get("artifactType")):
            found |= {layer["digest"]: int(layer["size"]) for layer in artifact["layers"]}
    return found


def index_bytes(url: str, reference: str) -> int:
    """Bytes of the index of an image that has nothing else attached."""
    return sum(blobs(url, reference).values())


def _manifest(url: str, repository: str, name: str) -> tuple[dict[str, Any], str]:
    request = urllib.request.Request(f"{url}/v2/{repository}/manifests/{name}", headers={"Accept": ACCEPT})
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        return json.load(answer), answer.headers["Docker-Content-Digest"]
