"""What a daemon serves, and how its successor learns of it.

The state is JSON in a memory file that the keeper holds, like the mounts: it outlives the worker, ends with
the keeper, and is replaced as a whole. Only what the cache does not say is in there: which images, reached
how, mounted where.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lazyfs.control import messages
from lazyfs.control.messages import Attached
from lazyfs.daemon.keeperlink import KeeperLink
from lazyfs.serving.image import Image
from lazyfs.sources.access import Access
from lazyfs.system.mountinfo import MountEntry

_STATE = "state"


@dataclass(slots=True)
class Root:
    """An image that is mounted, or about to be."""

    image: Image
    access: Access
    timeout_s: float
    dev: tuple[int, int]  # of the EROFS mount, which the keeper holds
    direct: frozenset[str]  # content roots of the layers whose data the kernel reads by itself
    targets: list[Attached] = field(default_factory=list)
    pending: int = 0  # clients between our answer and their "attached"
    idle_since: float | None = None  # trio time
    backing_device: str | None = None  # whose read-ahead is to be widened once all blocks are here (tuning.py)

    @property
    def hold_name(self) -> str:
        """The name of the EROFS mount's descriptor at the keeper."""
        return hold_name(self.image.manifest_digest)


class Released(NamedTuple):
    """A device that was let go, and where to find its image: a private mount namespace may still read it."""

    content_root: str
    size_bytes: int
    manifest_digest: str
    image: str
    access: Access
    timeout_s: float


class Remembered(NamedTuple):
    """A root as the predecessor left it. `layers`: content root and size in bytes of each device."""

    image: str
    manifest_digest: str
    access: Access
    timeout_s: float
    targets: list[Attached]
    direct: frozenset[str]
    layers: list[tuple[str, int]]

    def as_released(self) -> list[Released]:
        """Its devices, for reads that open the image again."""
        return [
            Released(name, size_bytes, self.manifest_digest, self.image, self.access, self.timeout_s)
            for name, size_bytes in self.layers
        ]


def hold_name(manifest_digest: str) -> str:
    return f"image:{manifest_digest}"


def attached_json(target: Attached) -> dict[str, Any]:
    """As `control.parse_attached` reads it."""
    return {
        "dev": messages.format_dev(target.dev),
        "target": target.target,
        "ephemeral_upper": target.ephemeral_upper,
        "image_dev": messages.format_dev(target.image_dev) if target.image_dev else None,
    }


def save_state(link: KeeperLink, roots: list[Root], released: list[Released]) -> None:
    """Gives the keeper the new state."""
    state = {
        "roots": [
            {
                "image": root.image.reference,
                "manifest_digest": root.image.manifest_digest,
                "access": root.access.to_json(),
                "timeout_s": root.timeout_s,
                "targets": [attached_json(target) for target in root.targets],
                "direct": sorted(root.direct),
                "layers": [[handle.content_root, handle.size_bytes] for handle in root.image.layers],
            }
            for root in roots
        ],
        "released": [{**one._asdict(), "access": one.access.to_json()} for one in released],
    }
    fd = os.memfd_create("lazyfs-state", os.MFD_CLOEXEC)
    with open(fd, "w", closefd=False) as file:
        json.dump(state, file)
    link.hold(_STATE, fd)


def load_state(link: KeeperLink) -> tuple[list[Remembered], list[Released]]:
    """What the predecessor saved; nothing if there was none."""
    if _STATE not in link.held:
        return [], []
    fd = link.held[_STATE]
    state = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    roots = [
        Remembered(
            entry["image"],
            entry["manifest_digest"],
            messages.parse_access(entry["access"]),
            messages.parse_timeout(entry["timeout_s"]),
            [messages.parse_attached(target) for target in entry["targets"]],
            frozenset(map(str, entry.get("direct", []))),
            [(str(name), int(size_bytes)) for name, size_bytes in entry.get("layers", [])],
        )
        for entry in state["roots"]
    ]
    released = [
        Released(**{**entry, "access": messages.parse_access(entry["access"])})
        for entry in state["released"]
    ]
    return roots, released


def root_entry(root: Root) -> dict[str, Any]:
    return {
        "dev": messages.format_dev(root.dev),
        "image": root.image.reference,
        "manifest_digest": root.image.manifest_digest,
        "backend": "kernel",
        "platform": root.access.platform,
        "targets": [attached_json(target) for target in root.targets],
    }


def is_shown(target: Attached, entries: Sequence[MountEntry]) -> bool:
    """Whether `entries` of its device number have the mount. That of an overlay is soon another one's when it has
    gone, so there the upper directory decides."""
    if target.ephemeral_upper is None:
        return bool(entries)
    name = os.path.basename(target.ephemeral_upper)
    return any(name in option for entry in entries for option in entry.super_options)
