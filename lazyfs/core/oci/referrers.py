"""Artifacts that refer to an image: manifests with a `subject`, and the index that lists them under a fallback tag.

Formats: OCI image-spec manifest.md ("Guidelines for Artifact Usage"), distribution-spec "Referrers Tag Schema".
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from lazyfs.core.oci.digests import Digest, is_digest, parse_digest, sha256_digest
from lazyfs.core.oci.documents import (
    MEDIA_EMPTY,
    MEDIA_INDEX,
    MEDIA_MANIFEST,
    Descriptor,
    load_json,
    parse_manifest,
)
from lazyfs.errors import ImageError

_BLOB, _BLOB_BYTES = "vnd.lazyfs.blob", "vnd.lazyfs.blob.bytes"
_REFERRERS_TAG = re.compile(r"sha(?:256|512)-[0-9a-f]{64}")


def referrers_tag(subject_digest: Digest) -> str:
    """The tag of the index that lists what refers to a manifest. ImageError: not a digest."""
    algorithm, value = parse_digest(subject_digest)
    return f"{algorithm}-{value[:64]}"  # a tag has at most 128 characters, so the specification cuts sha512


def is_referrers_tag(name: str) -> bool:
    """Whether `name` is such a tag, so names no image."""
    return _REFERRERS_TAG.fullmatch(name) is not None


def listed_as(manifest: bytes, subject_digest: str) -> Descriptor:
    """The entry of the artifact `manifest` in the list of the subject's referrers. ImageError: it has another."""
    parsed = parse_manifest(manifest, MEDIA_MANIFEST)
    if parsed.subject is None or parsed.subject.digest != subject_digest:
        raise ImageError(f"the artifact does not refer to {subject_digest}")
    digest = sha256_digest(manifest)
    return Descriptor(
        parsed.media_type, digest, len(manifest), parsed.annotations, artifact_type=parsed.artifact_type
    )


def build_artifact(
    artifact_type: str, layers: Sequence[Descriptor], subject: Descriptor, annotations: dict[str, str]
) -> bytes:
    """An artifact manifest that refers to `subject` (manifest.md, "Guidelines for Artifact Usage").

    Its config is the empty descriptor: the blob `b"{}"` must be pushed as well.
    """
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MEDIA_MANIFEST,
        "artifactType": artifact_type,
        "config": Descriptor(MEDIA_EMPTY, sha256_digest(b"{}"), 2).to_json(),
        "layers": [layer.to_json() for layer in layers],
        "subject": Descriptor(subject.media_type, subject.digest, subject.size_bytes).to_json(),
    }
    if annotations:
        document["annotations"] = annotations
    return json.dumps(document, indent=1).encode()


def first_blob(layers: Sequence[Descriptor]) -> dict[str, str]:
    """Annotations of an artifact that say which blob its first one is."""
    return {_BLOB: layers[0].digest, _BLOB_BYTES: str(layers[0].size_bytes)}


def listed_blob(entry: Descriptor, media_type: str) -> Descriptor | None:
    """The first blob of an artifact, as its entry in a list says; None if it does not. A list repeats annotations
    (distribution-spec, "Listing Referrers"), so the manifest need not be fetched. No more than a hint: nobody has
    verified it."""
    digest, size = entry.annotations.get(_BLOB, ""), entry.annotations.get(_BLOB_BYTES, "")
    if not is_digest(digest) or not size.isascii() or not size.isdigit() or len(size) > 18:
        return None
    return Descriptor(media_type, Digest(digest), int(size))


def add_to_index(raw: bytes | None, descriptor: Descriptor) -> bytes:
    """The index `raw` (None: a new one) with `descriptor` appended unless it is listed; all else stays as it is."""
    if raw is None:
        document: dict[str, Any] = {"schemaVersion": 2, "mediaType": MEDIA_INDEX, "manifests": []}
    else:
        parse_manifest(raw, MEDIA_INDEX)
        document = load_json(raw, "the index")
    listed = document.get("manifests") or []
    if any(isinstance(item, dict) and item.get("digest") == descriptor.digest for item in listed):
        return raw or b""
    document["manifests"] = [*listed, descriptor.to_json()]
    return json.dumps(document, indent=1).encode()


def remove_from_index(raw: bytes, digest: str) -> bytes:
    """The index `raw` without the entry of that digest; all else stays as it is."""
    parse_manifest(raw, MEDIA_INDEX)
    document = load_json(raw, "the index")
    listed = document.get("manifests") or []
    left = [one for one in listed if not isinstance(one, dict) or one.get("digest") != digest]
    if len(left) == len(listed):
        return raw
    document["manifests"] = left
    return json.dumps(document, indent=1).encode()
