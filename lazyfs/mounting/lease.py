"""A root that a process of lazyfs holds for this one: what is asked for, and the lease. attach.py attaches it."""

from __future__ import annotations

import os

from lazyfs.control import messages
from lazyfs.control.client import Connection, DaemonGone
from lazyfs.errors import HostError, UserError
from lazyfs.mounting import launch
from lazyfs.records import NamedTuple
from lazyfs.system.devices import dev_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from lazyfs.indexing.missing import Bars
    from lazyfs.sources.access import Access

    Progress = Callable[[str], None]

SILENCE_ALLOWANCE_S = 30.0  # beyond timeout_s, until a silent daemon is given up


class Wanted(NamedTuple):
    """The root that is asked for. `backend`: kernel, fuse, or auto: fuse if the kernel cannot. `place`: where an
    ordinary user's fuse process mounts it, because such a user cannot move mounts. `cache`, `runtime`: directories."""

    image: str
    access: Access
    cache: str
    runtime: str
    backend: str = "auto"
    timeout_s: float = 30.0
    push_index: bool = False  # of an index that has to be made
    allow_other: bool = False  # fuse only
    executable: bool = True  # fuse only, where it is mounted at `place`
    place: str | None = None
    traced: bool = False  # the daemon shall see every read

    def request(self) -> dict[str, Any]:
        """What of it the daemon has to know."""
        return {
            **({"traced": True} if self.traced else {}),  # an older daemon does not know the key
            "image": self.image,
            "access": self.access.for_user_of(os.environ).to_json(),
            "timeout_s": self.timeout_s,
            "push_index": self.push_index,
        }

    def silence_s(self) -> float:
        return self.timeout_s + SILENCE_ALLOWANCE_S


class Lease:
    """A daemon or fuse process holds an image's root until this is released, or as long as what was reported is
    attached.

    It owns a connection, and `fd`: the detached root, None if the fuse process mounted it at `place`.
    """

    def __init__(self, wanted: Wanted, connection: Connection, reply: dict[str, Any], backend: str) -> None:
        """`reply`: what the process said of the root. The caller sets `fd`."""
        self.image = str(reply.get("image") or wanted.image)  # canonical
        self.manifest_digest = str(reply.get("manifest_digest") or "")
        self.backend = backend  # kernel or fuse
        self.joined = False  # shares an earlier mount's superblock
        self.fd: int | None = None
        self.wanted = wanted
        self._connection = connection

    @property
    def dev(self) -> tuple[int, int]:
        """The device of the EROFS or FUSE file system."""
        return dev_of(str(self.wanted.place) if self.fd is None else self.fd)

    def report(self, dev: tuple[int, int], target: str, ephemeral_upper: str | None = None) -> None:
        """Reports where the root was attached. From then on that holds it, not this lease. `dev`: of what lies at
        `target`, perhaps an overlay. Raises LazyfsError."""
        attached = {
            "dev": messages.format_dev(dev),
            "target": target,
            "ephemeral_upper": ephemeral_upper,
            "image_dev": messages.format_dev(self.dev),
        }
        request = {"op": "attached", "attached": attached}
        try:
            self._connection.ask(request)
        except DaemonGone:
            if self.backend == "fuse":
                raise
            # The daemon died just now: its successor is told.
            with launch.connect_or_start(self.wanted.cache, self.wanted.runtime) as again:
                again.ask(request)

    def release(self) -> None:
        """Ends the lease. What was attached and reported stays. Idempotent."""
        self._connection.close()
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Reporter(NamedTuple):
    """Where progress is shown: lines of text, and `bars` while layers of an image without an index are read. `warn`:
    takes lines that the user has to see."""

    progress: Progress = lambda text: None
    bars: Bars | None = None
    warn: Progress = lambda text: None


SILENT = Reporter()


def until_indexed(wanted: Wanted, ask: Callable[[], dict[str, Any]], reporter: Reporter) -> dict[str, Any]:
    """The answer of `ask`. If that says that the index is missing, builds the index and asks again."""
    reply = ask()
    image = wanted.image
    if reply.get("needs_index") is not True:
        if stale := reply.get("stale"):
            reporter.warn(f"{image} is as it was here last: {stale}")
        if place := reply.get("index_place"):
            reporter.progress(f"the index of {image} comes from {place}")
        return reply
    if wanted.access.offline:
        raise UserError(f"{image} has no index, and none may be built offline", "mount it once without offline")
    reasons = reply.get("reasons")
    for reason in reasons if isinstance(reasons, list) else []:
        reporter.progress(f"an index was passed over: {reason}")
    reporter.progress(f"{image} has no index: reading its layers once (`lazyfs index --push` attaches one)")
    from lazyfs.indexing.missing import build_missing_index

    known = reply.get("manifest_digest")
    known = known if isinstance(known, str) else None  # of the manifest that was found to lack an index
    build_missing_index(image, wanted.cache, wanted.access, wanted.push_index, reporter.bars, known)
    reply = ask()
    if reply.get("needs_index") is True:
        raise HostError(
            f"the index of {image} was built, but the daemon does not find it", "check the cache's disk"
        )
    return reply
