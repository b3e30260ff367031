"""What a daemon answers (control/messages.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lazyfs.control.messages import Dev, encode, format_dev
from lazyfs.control.requests import Attached
from lazyfs.errors import LazyfsError

MAX_PROGRESS_CHARACTERS = 1000
MAX_REASONS = 20  # why attached indexes were passed over
_MAX_ERROR_CHARACTERS = 16384


class Entry(NamedTuple):
    """An image that is served, as "list" and "stats" show it."""

    dev: Dev  # of its EROFS or FUSE file system
    image: str
    manifest_digest: str
    backend: str  # kernel or fuse
    platform: str | None  # as requested
    pid: int  # of the process that serves it
    targets: Sequence[Attached]
    holds: Sequence[str]  # names

    def to_json(self) -> dict[str, Any]:
        targets = [target.to_json() for target in self.targets]
        return {**self._asdict(), "dev": format_dev(self.dev), "targets": targets, "holds": list(self.holds)}


COUNTERS = (  # of serving/image.py
    "bytes_fetched", "requests", "retries", "blocks_present", "blocks_total", "blocks_foreseen", "blocks_awaited",
    "cache_hits", "cache_misses", "bytes_read", "memory_bytes",
)  # fmt: skip

# The fields of "ok" replies, besides "ok" itself. "mounts" is a list of entries in "list", else their number.
REPLIES: dict[str, tuple[str, ...]] = {
    # "index_place", "stale": as in serving/image.py
    "lease": ("manifest_digest", "image", "index_place", "stale", "joined", "dev"),
    "fuse_mount": ("manifest_digest", "image", "index_place", "stale", "joined", "dev"),
    "attached": (),
    "hold": (),
    "release": (),
    "list": ("cache", "mounts"),
    "stats": (*Entry._fields, *COUNTERS),  # and those of the backend
    "profile": ("manifest_digest", "blocks"),  # how many were touched since the trace began; 0 if none was under way
    "ping": ("pid", "mounts"),
    "upgrade": ("pid", "mounts"),
    "stop": ("pid", "mounts"),
}
STATS_OF_BACKEND = {"kernel": ("layers", "layers_read_directly"), "fuse": ("fuse",)}


def progress(text: str) -> bytes:
    return encode({"progress": text[:MAX_PROGRESS_CHARACTERS]})


def ok(**fields: Any) -> bytes:
    return encode({"ok": True, **fields})


def needs_index(manifest_digest: str, reasons: Sequence[str] = ()) -> bytes:
    texts = [reason[:MAX_PROGRESS_CHARACTERS] for reason in reasons[:MAX_REASONS]]
    return encode({"needs_index": True, "manifest_digest": manifest_digest, "reasons": texts})


def failure(error: LazyfsError) -> bytes:
    message, hint = error.message[:_MAX_ERROR_CHARACTERS], error.hint[:_MAX_ERROR_CHARACTERS]
    return encode({"error": {"kind": error.fault, "code": error.code, "message": message, "hint": hint}})
