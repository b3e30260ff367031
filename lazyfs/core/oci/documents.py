"""OCI and Docker documents as values: descriptors, manifests, image indexes, image configs.

Formats: OCI image-spec v1.1 (descriptor.md, manifest.md, image-index.md, config.md) and Docker's "Image
Manifest Version 2, Schema 2". All of them come from outside: any fault raises ImageError, never another exception.
"""

from __future__ import annotations

from types import MappingProxyType

from lazyfs.core import lightjson
from lazyfs.core.oci.digests import DiffId, Digest, checked_digest
from lazyfs.errors import ImageError
from lazyfs.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

MEDIA_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
MEDIA_INDEX = "application/vnd.oci.image.index.v1+json"
MEDIA_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
CONFIG_TYPES = frozenset({MEDIA_CONFIG, DOCKER_CONFIG})
MEDIA_EMPTY = "application/vnd.oci.empty.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFEST_TYPES = frozenset({MEDIA_MANIFEST, DOCKER_MANIFEST})
INDEX_TYPES = frozenset({MEDIA_INDEX, DOCKER_LIST})
ACCEPT = ", ".join((MEDIA_MANIFEST, MEDIA_INDEX, DOCKER_MANIFEST, DOCKER_LIST))
# Content types of servers that do not know the type: plain web servers, and old registries.
UNKNOWN_TYPES = frozenset({"", "application/json", "application/octet-stream", "text/plain"})

REF_NAME = "org.opencontainers.image.ref.name"

MAX_MANIFEST_BYTES = 4 << 20  # distribution-spec: registries should accept 4 MiB; docker-registry's own limit
MAX_CONFIG_BYTES = 8 << 20  # containerd's limit for documents it keeps in memory
MAX_LAYERS = 1024  # docker builds at most 127, other tools more; each layer is an EROFS device
MAX_MANIFESTS = 4096  # of one index; referrers lists are indexes too
MAX_INDEX_DEPTH = 4  # an index in an index is rare, more than two is abuse; for the callers' loops
MAX_BLOB_BYTES = 1 << 50
_MEDIA_TYPE_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!#$&^_.+-")


class Platform(NamedTuple):
    """os/architecture[/variant] in Go's words (GOOS, GOARCH)."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


class Descriptor(NamedTuple):
    """A pointer to a blob. `size_bytes` is of the blob as stored (compressed)."""

    media_type: str
    digest: Digest
    size_bytes: int
    annotations: Mapping[str, str] = MappingProxyType({})
    platform: Platform | None = None
    artifact_type: str = ""

    @property
    def is_image(self) -> bool:
        """Whether it may point to an image, or to images for several platforms: nothing calls it another artifact.
        (go-containerregistry gives images the artifact type of their config.)"""
        kinds = MANIFEST_TYPES | INDEX_TYPES
        return self.media_type in kinds and (not self.artifact_type or self.artifact_type in CONFIG_TYPES)

    def to_json(self) -> dict[str, Any]:
        """The JSON object of descriptor.md."""
        out: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size_bytes}
        if self.artifact_type:
            out["artifactType"] = self.artifact_type
        if self.annotations:
            out["annotations"] = dict(self.annotations)
        if self.platform is not None:
            out["platform"] = {"os": self.platform.os, "architecture": self.platform.architecture}
            if self.platform.variant:
                out["platform"]["variant"] = self.platform.variant
        return out


class Manifest(NamedTuple):
    """An image or artifact manifest."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: Descriptor | None
    artifact_type: str
    annotations: dict[str, str]


class ImageIndex(NamedTuple):
    """A list of manifests: one image for several platforms, or a referrers list."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    subject: Descriptor | None
    artifact_type: str
    annotations: dict[str, str]


class ImageConfig(NamedTuple):
    """What config.md says about running the image. Texts are as written there: hostile until checked."""

    os: str
    architecture: str
    variant: str
    diff_ids: tuple[DiffId, ...]
    env: tuple[str, ...]
    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    user: str
    working_dir: str
    labels: dict[str, str]
    volumes: tuple[str, ...]
    stop_signal: str
    exposed_ports: tuple[str, ...]


# -- strict JSON -----------------------------------------------------------------------------------------


def load_json(raw: bytes, what: str, max_bytes: int = MAX_MANIFEST_BYTES) -> dict[str, Any]:
    """Parse a JSON object. ImageError if it is too large, malformed, too deep or names a key twice.

    Keys named twice are refused because programs differ in which one they believe.
    """
    if len(raw) > max_bytes:
        raise ImageError(f"{what} is larger than {max_bytes} bytes")
    try:
        text = raw.decode()
        document = lightjson.loads(text, unique_keys=True)
        if "\\u" in text:
            import json  # here, because it takes 8 ms, and few documents need it

            # Lone surrogates parse, but cannot be written: refuse them here, not at the first write.
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{what} is not valid JSON: {type(error).__name__}") from None
    if not isinstance(document, dict):
        raise ImageError(f"{what} is not a JSON object")
    return document


def _text(document: dict[str, Any], key: str, what: str) -> str:
    """A string without NUL, "" if missing or null (Go writes null for empty values)."""
    value = document.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value:
        raise ImageError(f"{what}: {key!r} is not a text")
    return value


def _texts(document: dict[str, Any], key: str, what: str) -> tuple[str, ...]:
    value = document.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) and "\0" not in item for item in value):
        raise ImageError(f"{what}: {key!r} is not a list of texts")
    return tuple(value)


def _text_map(document: dict[str, Any], key: str, what: str) -> dict[str, str]:
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(item is None or isinstance(item, str) for item in value.values()):
        raise ImageError(f"{what}: {key!r} is not a map of texts")
    return {name: text or "" for name, text in value.items()}


def _list(document: dict[str, Any], key: str, what: str, limit: int) -> list[Any]:
    """A list, empty if missing or null."""
    value = document.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > limit:
        raise ImageError(f"{what}: {key!r} is not a list of at most {limit} items")
    return value


def _objects(document: dict[str, Any], key: str, what: str) -> dict[str, Any]:
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ImageError(f"{what}: {key!r} is not an object")
    return value


# -- documents -------------------------------------------------------------------------------------------


def parse_descriptor(value: object, what: str) -> Descriptor:
    """Parse one descriptor object; ImageError names `what` it belongs to."""
    if not isinstance(value, dict):
        raise ImageError(f"{what}: a descriptor is not an object")
    media_type = _media_type(_text(value, "mediaType", what), what)
    digest = checked_digest(_text(value, "digest", what))
    size = value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_BLOB_BYTES:
        raise ImageError(f"{what}: the size of {digest} is not a number of bytes")
    artifact_type = _text(value, "artifactType", what)  # not checked to be a media type: old oras wrote "sbom"
    platform: Platform | None = None
    if (fields := _objects(value, "platform", what)) or isinstance(value.get("platform"), dict):
        platform = Platform(*(_text(fields, key, what) for key in ("os", "architecture", "variant")))
    return Descriptor(
        media_type, digest, size, _text_map(value, "annotations", what), platform, artifact_type
    )


def _media_type(text: str, what: str) -> str:
    names = text.split("/")  # type and subtype: RFC 6838, section 4.2
    if len(names) != 2 or not all(0 < len(name) < 128 and _MEDIA_TYPE_CHARACTERS.issuperset(name) for name in names):
        raise ImageError(f"{what}: bad media type {text[:80]!r}")
    return text


def parse_manifest(raw: bytes, media_type: str) -> Manifest | ImageIndex:
    """Parse a manifest or index as served with `media_type` (a Content-Type; "" = not known).

    ImageError if document and server disagree about the type, or if the document could be read as both kinds
    (CVE-2021-41190: two clients would see two images).
    """
    document = load_json(raw, "the manifest")
    served = media_type.partition(";")[0].strip().lower()
    own = _text(document, "mediaType", "the manifest")
    if served in UNKNOWN_TYPES:
        served = own
    if own and own != served:
        raise ImageError(f"the manifest says {own[:80]!r}, its server {served[:80]!r}")
    is_list, is_image = "manifests" in document, "layers" in document or "config" in document
    if is_list and is_image:
        raise ImageError("the manifest is ambiguous: it has both 'manifests' and 'layers' or 'config'")
    if not served:
        served = MEDIA_INDEX if is_list else MEDIA_MANIFEST
    if document.get("schemaVersion") != 2 or isinstance(document.get("schemaVersion"), bool):
        raise ImageError(
            f"manifests of type {served[:80]!r} and this schemaVersion are not supported",
            "push the image again with a current tool, e.g. skopeo copy --format oci",
        )
    subject = document.get("subject")
    rest = (
        parse_descriptor(subject, "the subject") if subject is not None else None,
        _text(document, "artifactType", "the manifest"),
        _text_map(document, "annotations", "the manifest"),
    )
    if served in INDEX_TYPES:
        items = _list(document, "manifests", "the index", MAX_MANIFESTS)
        return ImageIndex(served, tuple(_readable(items)), *rest)
    if served in MANIFEST_TYPES:
        layers = _list(document, "layers", "the manifest", MAX_LAYERS)
        config = parse_descriptor(document.get("config"), "the config")
        return Manifest(served, config, tuple(parse_descriptor(item, "a layer") for item in layers), *rest)
    raise ImageError(f"manifests of type {served[:80]!r} are not supported")


def _readable(items: list[Any]) -> Iterator[Descriptor]:
    """The entries of an index that can be read. What somebody else attached, or listed for another platform, in an odd
    way does not hide the rest."""
    for item in items:
        try:
            descriptor = parse_descriptor(item, "the index")
        except ImageError:
            continue
        yield descriptor


def parse_config(raw: bytes) -> ImageConfig:
    """Parse an image config (config.md)."""
    what = "the image config"
    document = load_json(raw, what, MAX_CONFIG_BYTES)
    rootfs = _objects(document, "rootfs", what)
    if rootfs.get("type") != "layers":
        raise ImageError(f"{what}: 'rootfs.type' is not 'layers'")
    diff_ids = _texts(rootfs, "diff_ids", what)
    if len(diff_ids) > MAX_LAYERS:
        raise ImageError(f"{what}: more than {MAX_LAYERS} layers")
    run = _objects(document, "config", what)
    return ImageConfig(
        os=_text(document, "os", what),
        architecture=_text(document, "architecture", what),
        variant=_text(document, "variant", what),
        diff_ids=tuple(DiffId(checked_digest(text)) for text in diff_ids),
        env=_texts(run, "Env", what),
        entrypoint=_texts(run, "Entrypoint", what),
        cmd=_texts(run, "Cmd", what),
        user=_text(run, "User", what),
        working_dir=_text(run, "WorkingDir", what),
        labels=_text_map(run, "Labels", what),
        volumes=tuple(_objects(run, "Volumes", what)),
        stop_signal=_text(run, "StopSignal", what),
        exposed_ports=tuple(_objects(run, "ExposedPorts", what)),
    )
