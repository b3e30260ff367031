"""One mount as its steps see it: what was asked for, and the root that was acquired."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from lazyfs.control.client import Connection
from lazyfs.errors import HostError, UserError
from lazyfs.mounting.options import MountOptions

if TYPE_CHECKING:
    from lazyfs.indexing.missing import Bars

SILENCE_ALLOWANCE_S = 30.0  # beyond timeout=, until a silent daemon is given up

Progress = Callable[[str], None]


class Mounted(NamedTuple):
    """A mount that is in place."""

    image: str  # canonical reference
    manifest_digest: str
    target: str  # real path
    backend: str  # kernel or fuse
    joined: bool  # shares an earlier mount's superblock
    dev: tuple[int, int]
    ephemeral_upper: str | None


class Acquired(NamedTuple):
    """An image's root, not yet attached. `fd` is None if the fuse process mounted at the target itself."""

    fd: int | None
    connection: Connection
    reply: dict[str, Any]
    backend: str
    joined: bool


class MountRequest(NamedTuple):
    image: str
    target: str
    options: MountOptions
    cache: str
    runtime: str
    push_index: bool
    progress: Progress
    bars: Bars | None  # shown while an image without an index is read
    on_attached: Callable[[Mounted], None] | None

    def request(self) -> dict[str, Any]:
        """What of it the daemon has to know."""
        return {
            "image": self.image,
            "access": self.options.access.for_user_of(os.environ).to_json(),
            "timeout_s": self.options.timeout_s,
            "push_index": self.push_index,
        }

    def silence_s(self) -> float:
        return self.options.timeout_s + SILENCE_ALLOWANCE_S


def ignore(_: str) -> None:
    pass


# -- getting a root --------------------------------------------------------------------------------------


def until_indexed(job: MountRequest, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer of `ask`, after having built the index that it says is missing."""
    reply = ask()
    if reply.get("needs_index") is not True:
        return reply
    if job.options.access.offline:
        raise UserError(
            f"{job.image} has no index, and offline forbids to build one", "mount it once without offline"
        )
    reasons = reply.get("reasons")
    for reason in reasons if isinstance(reasons, list) else []:
        job.progress(f"an index was passed over: {reason}")
    job.progress(f"{job.image} has no index: reading its layers once (`lazyfs index --push` attaches one)")
    from lazyfs.indexing.missing import build_missing_index

    build_missing_index(job.image, job.cache, job.options.access, job.push_index, job.bars)
    reply = ask()
    if reply.get("needs_index") is True:
        raise HostError(
            f"the index of {job.image} was built, but the daemon does not find it", "check the cache's disk"
        )
    return reply


def dev_of(place: int | str) -> tuple[int, int]:
    device = os.stat(place).st_dev
    return os.major(device), os.minor(device)
