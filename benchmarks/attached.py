"""How large an attached index is, as the registry has it (independent of what lazyfs says)."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

ANSWER_S = 30.0
ACCEPT = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json"


def index_bytes(url: str, reference: str) -> int:
    """Bytes of all blobs of the artifacts attached to an image, found by the fallback tag
    ``sha256-<hex>`` (distribution-spec, "Referrers Tag Schema"). `reference` is HOST/REPOSITORY:TAG."""
    repository, _, tag = reference.partition("/")[2].rpartition(":")
    _, digest = _manifest(url, repository, tag)
    referrers, _ = _manifest(url, repository, digest.replace(":", "-"))
    total = 0
    for entry in referrers["manifests"]:
        artifact, _ = _manifest(url, repository, entry["digest"])
        total += sum(int(layer["size"]) for layer in artifact["layers"])
    return total


def _manifest(url: str, repository: str, name: str) -> tuple[dict[str, Any], str]:
    request = urllib.request.Request(f"{url}/v2/{repository}/manifests/{name}", headers={"Accept": ACCEPT})
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        return json.load(answer), answer.headers["Docker-Content-Digest"]
