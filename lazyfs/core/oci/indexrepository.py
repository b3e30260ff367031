"""Index repositories: where the index of any image is kept beside the image's own repository.

One is written as a repository without tag, a layout directory or a layout on a web server, with `{registry}` and
`{repository}` in it or the same for all images. What lies there is bound to the digest of an image's manifest, so
images whose names lead to one repository do not get in each other's way.
"""

from __future__ import annotations

import re

from lazyfs.core.oci.reference import (
    DirectoryReference,
    Reference,
    RegistryReference,
    WebReference,
    parse_reference,
)
from lazyfs.errors import UserError

_NO_COMPONENT = re.compile(r"[^a-z0-9]+")
_SEPARATOR = re.compile(r"[._]|__|-+")  # what may stand between letters, see reference.py


def index_repository(template: str, image: Reference) -> Reference:
    """The repository or layout that `template` means for `image`. Raises UserError if that is none.

    `{registry}` in front is the image's registry itself, elsewhere its name as part of a path.
    """
    text = template
    if text.startswith("{registry}/") and isinstance(image, RegistryReference):
        text = image.registry + text.removeprefix("{registry}")
    registry, repository = _names(image)
    text = text.replace("{registry}", registry).replace("{repository}", repository)
    hint = "write HOST/REPOSITORY, oci:DIR or oci+https://HOST/PATH, with {registry} and {repository} if you like"
    if "{" in text or "}" in text:
        raise UserError(f"index repository {template!r} has an unknown placeholder", hint)
    found = parse_reference(text)
    if _is_tagged(found, text):
        raise UserError(f"index repository {template!r} has a tag or digest, or no repository", hint)
    return found


def _is_tagged(found: Reference, text: str) -> bool:
    if isinstance(found, RegistryReference):  # parsing adds a tag
        return found.digest is not None or ":" in text.rpartition("/")[2]
    return found.ref is not None


def place_of(repository: Reference) -> str:
    """`repository` as text, without tag: what index_repository() and parse_reference() read."""
    if isinstance(repository, RegistryReference):
        return f"{repository.registry}/{repository.repository}"
    return str(repository._replace(ref=None))


def _names(image: Reference) -> tuple[str, str]:
    """What the placeholders become, in the characters of a repository's name. Layouts have no registry: "oci" stands
    for a directory's, the host for a web server's."""
    match image:
        case RegistryReference():
            registry, repository = image.registry, image.repository
        case DirectoryReference():
            registry, repository = "oci", image.path
        case WebReference():
            registry, _, repository = image.url.partition("://")[2].partition("/")
    parts = [_component(part) for part in repository.split("/")]
    return _component(registry) or "unnamed", "/".join(filter(None, parts)) or "unnamed"


def _component(text: str) -> str:
    """`text` as a component of a repository's name; empty if nothing is left of it."""
    plain = _NO_COMPONENT.sub(lambda found: found[0] if _SEPARATOR.fullmatch(found[0]) else "-", text.lower())
    return plain.strip("._-")
