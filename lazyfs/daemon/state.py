"""What a daemon's successor is told.

It is JSON in a memory file that the keeper holds, as it holds the mounts: it outlives the worker, ends with the keeper,
and is replaced as a whole. It says only what the cache does not: which images, reached how, mounted where, held by
whom. It has a version. State from before version 1 is understood, too, so that an upgrade loses no mount.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from lazyfs.control.messages import parse_timeout
from lazyfs.control.requests import Attached, parse_access, parse_attached
from lazyfs.core.oci.digests import ContentRoot, Digest
from lazyfs.errors import LazyfsError
from lazyfs.sources.access import Access

log = logging.getLogger("lazyfs.daemon")

VERSION = 1
_HELD_AS = "state"

_T = TypeVar("_T")


class ReleasedLayer(NamedTuple):
    """A released device, and where to find its image, because a private mount namespace may still read it."""

    content_root: ContentRoot
    size_bytes: int
    manifest_digest: Digest
    image: str
    access: Access
    timeout_s: float


class SavedRoot(NamedTuple):
    """A mounted image. `layers`: content root and size in bytes of each device; `direct`: content roots of those that
    the kernel reads by itself."""

    image: str
    manifest_digest: Digest
    access: Access
    timeout_s: float
    targets: Sequence[Attached]
    holds: Sequence[str]
    direct: frozenset[ContentRoot]
    layers: Sequence[tuple[ContentRoot, int]]

    def released(self) -> list[ReleasedLayer]:
        """Its devices, for reads that open the image again."""
        return [
            ReleasedLayer(name, size_bytes, self.manifest_digest, self.image, self.access, self.timeout_s)
            for name, size_bytes in self.layers
        ]


class State(NamedTuple):
    roots: Sequence[SavedRoot]
    released: Sequence[ReleasedLayer]


class Keeping(Protocol):
    """The part of KeeperLink that holds descriptors for a successor."""

    @property
    def held(self) -> Mapping[str, int]: ...

    def hold(self, name: str, fd: int) -> None: ...


def save(link: Keeping, state: State) -> None:
    """Gives the keeper the new state."""
    fd = os.memfd_create("lazyfs-state", os.MFD_CLOEXEC)
    with open(fd, "w", closefd=False) as file:
        file.write(json.dumps(_to_json(state)))  # not json.dump, which encodes in Python
    link.hold(_HELD_AS, fd)


def load(link: Keeping) -> State:
    """What the predecessor saved, empty if there was none. Entries that are not understood are logged and left out."""
    if _HELD_AS not in link.held:
        return State([], [])
    fd = link.held[_HELD_AS]
    return _from_json(json.loads(os.pread(fd, os.fstat(fd).st_size, 0)))


def _to_json(state: State) -> dict[str, Any]:
    roots = [
        {
            **root._asdict(),
            "access": root.access.to_json(),
            "targets": [target.to_json() for target in root.targets],
            "direct": sorted(root.direct),
        }
        for root in state.roots
    ]
    released = [{**one._asdict(), "access": one.access.to_json()} for one in state.released]
    return {"version": VERSION, "roots": roots, "released": released}


def _from_json(value: Mapping[str, Any]) -> State:
    return State(_read(value["roots"], _root), _read(value["released"], _released))


def _read(entries: list[dict[str, Any]], read: Callable[[dict[str, Any]], _T]) -> list[_T]:
    found = []
    for entry in entries:
        try:
            found.append(read(entry if "access" in entry else _upgraded(entry)))
        except (LazyfsError, KeyError, TypeError, ValueError) as error:
            log.error("what was served of %s is not understood: %r", entry.get("image"), error)
    return found


def _upgraded(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry as it was before there were versions: "options" and "home" were the access and its environment."""
    options = dict(entry.pop("options"))
    timeout_s = options.pop("timeout_s")
    options.pop("push_index", None)
    return {**entry, "access": {**options, "environ": entry.pop("home")}, "timeout_s": timeout_s}


def _root(entry: dict[str, Any]) -> SavedRoot:
    return SavedRoot(
        str(entry["image"]),
        Digest(str(entry["manifest_digest"])),
        parse_access(entry["access"]),
        parse_timeout(entry["timeout_s"]),
        [parse_attached(target) for target in entry["targets"]],
        [str(name) for name in entry.get("holds", [])],
        frozenset(ContentRoot(str(name)) for name in entry.get("direct", [])),
        [(ContentRoot(str(name)), int(size_bytes)) for name, size_bytes in entry.get("layers", [])],
    )


def _released(entry: dict[str, Any]) -> ReleasedLayer:
    return ReleasedLayer(
        ContentRoot(str(entry["content_root"])),
        int(entry["size_bytes"]),
        Digest(str(entry["manifest_digest"])),
        str(entry["image"]),
        parse_access(entry["access"]),
        parse_timeout(entry["timeout_s"]),
    )
