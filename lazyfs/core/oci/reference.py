"""Image references: what the user types, parsed into where the image is.

Grammar of registry names: github.com/distribution/reference (reference.go, normalize.go), which docker,
containerd and podman share. `oci:` is skopeo's name for an OCI image layout directory
(containers-transports(5)); `oci+https:` is ours, for a layout behind a plain web server.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from lazyfs.core.oci.digests import is_digest
from lazyfs.errors import UserError

MAX_REFERENCE_CHARS = 4096 + 512  # a path (PATH_MAX) and a tag or digest
MAX_NAME_CHARS = 255  # reference.go: NameTotalLengthMax

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[(?:[a-fA-F0-9:]+)\])(?::[0-9]{{1,5}})?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
# A name in an image layout's index.json (image-spec annotations.md, org.opencontainers.image.ref.name).
_REF_NAME = re.compile(r"[A-Za-z0-9]+(?:(?:[-._:@/+]|--)[A-Za-z0-9]+)*")
_UNSUPPORTED = ("oci-archive:", "docker-archive:", "docker-daemon:", "containers-storage:", "dir:")

DOCKER_HUB = "docker.io"


class RegistryReference(NamedTuple):
    """An image in a registry. `registry` is host[:port] as users write it (docker.io, not its API host)."""

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @property
    def selector(self) -> str:
        """What `Source.manifest()` takes: the digest if there is one (it wins over the tag), else the tag."""
        return self.digest or self.tag or "latest"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.registry}/{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")


class DirectoryReference(NamedTuple):
    """An image in an OCI image layout. `ref` is its name there, or a digest; None = the only one."""

    path: str
    ref: str | None = None

    @property
    def selector(self) -> str:
        """What `Source.manifest()` takes."""
        return self.ref or ""

    def __str__(self) -> str:
        return f"oci:{self.path}{_suffix(self.ref)}"


class WebReference(NamedTuple):
    """An image in an OCI image layout behind a web server. `url` is http(s), without a trailing slash."""

    url: str
    ref: str | None = None

    @property
    def selector(self) -> str:
        """What `Source.manifest()` takes."""
        return self.ref or ""

    def __str__(self) -> str:
        return f"oci+{self.url}{_suffix(self.ref)}"


Reference = RegistryReference | DirectoryReference | WebReference


def parse_reference(text: str) -> Reference:
    """Parse `[docker://]name[:tag][@digest]`, `oci:DIR[:ref]` or `oci+http(s)://host/path[:ref]`.

    Raises UserError, which quotes what is wrong.
    """
    if not text or len(text) > MAX_REFERENCE_CHARS or not text.isprintable():
        raise UserError("the image reference is empty, too long or has unprintable characters")
    if text.startswith(("oci+http://", "oci+https://")):
        return _parse_web(text)
    if text.startswith("oci:"):
        return _parse_directory(text)
    if text.startswith(_UNSUPPORTED):
        kind = text.partition(":")[0]
        raise UserError(
            f"{kind}: references are not supported", f"skopeo copy {kind}:… oci:DIR makes a layout"
        )
    return _parse_registry(text.removeprefix("docker://"), text)


def repository_of(reference: Reference) -> str:
    """Where all versions of an image are: the reference without tag, name or digest."""
    if isinstance(reference, RegistryReference):
        return str(reference._replace(tag=None, digest=None))
    return str(reference._replace(ref=None))


def _suffix(ref: str | None) -> str:
    if not ref:
        return ""
    return f"@{ref}" if is_digest(ref) else f":{ref}"


def _parse_registry(rest: str, text: str) -> RegistryReference:
    digest: str | None = None
    if "@" in rest:
        rest, digest = rest.split("@", 1)
        if not is_digest(digest):
            raise UserError(f"{text!r}: not a sha256 or sha512 digest after '@'")
    registry, repository = DOCKER_HUB, rest
    first, slash, remainder = rest.partition("/")
    # normalize.go splitDockerDomain: a first part without '.' or ':' is a path, unless it is localhost.
    if slash and ("." in first or ":" in first or first == "localhost" or first.lower() != first):
        registry, repository = first, remainder
    tag: str | None = None
    head, colon, last = repository.rpartition(":")
    if colon and "/" not in last:
        repository, tag = head, last
        if not _TAG.fullmatch(tag):
            raise UserError(
                f"{text!r}: bad tag {tag!r}", "tags are letters, digits, '_', '.', '-', at most 128"
            )
    if registry == "index.docker.io":
        registry = DOCKER_HUB
    if registry == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    if not _REGISTRY.fullmatch(registry):
        raise UserError(f"{text!r}: bad registry host {registry!r}")
    if not _REPOSITORY.fullmatch(repository) or len(registry) + 1 + len(repository) > MAX_NAME_CHARS:
        raise UserError(
            f"{text!r}: bad image name {repository!r}", "names are lower case, e.g. docker.io/library/debian"
        )
    if tag is None and digest is None:
        tag = "latest"
    return RegistryReference(registry, repository, tag, digest)


def _split_ref(rest: str, text: str) -> tuple[str, str | None]:
    """Split a location from its `:ref` or `@digest`."""
    location, at, digest = rest.rpartition("@")
    if at and is_digest(digest):
        return location, digest
    location, colon, ref = rest.partition(":")
    if colon and not _REF_NAME.fullmatch(ref):
        raise UserError(f"{text!r}: bad name {ref!r} after ':'")
    return location, ref or None


def _parse_directory(text: str) -> DirectoryReference:
    path, ref = _split_ref(text.removeprefix("oci:"), text)
    if not path or ":" in path:
        raise UserError(
            f"{text!r}: no directory given, or one with ':' in its name", "write oci:DIR or oci:DIR:TAG"
        )
    return DirectoryReference(path, ref)


def _parse_web(text: str) -> WebReference:
    scheme, _, rest = text.removeprefix("oci+").partition("://")
    host, slash, path = rest.partition("/")
    if not _REGISTRY.fullmatch(host):
        raise UserError(f"{text!r}: bad host {host!r}", "write oci+https://host/path[:tag]; no user names")
    if any(mark in path for mark in "?#\\ ") or not path.isascii():
        raise UserError(f"{text!r}: the path may not hold '?', '#', '\\', spaces or non-ASCII characters")
    path, ref = _split_ref(path, text)
    if any(part in (".", "..") for part in path.split("/")) or ":" in path or "@" in path:
        raise UserError(f"{text!r}: the path may not hold '..', ':' or '@'")
    return WebReference(f"{scheme}://{host}{slash}{path}".rstrip("/"), ref)
