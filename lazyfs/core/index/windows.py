"""Windows of gzip spans in groups, as the index artifact stores them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from lazyfs.core.index.sections import compress, decompress
from lazyfs.core.layer.deflate import WINDOW_BYTES
from lazyfs.core.layer.spans import WINDOWS_PER_GROUP
from lazyfs.errors import ImageError

# A stored group of windows: 1 MiB before compression, and what zstd adds to noise.
MAX_GROUP_BYTES = 2 * WINDOWS_PER_GROUP * WINDOW_BYTES


class WindowGroup(NamedTuple):
    """A stored group: its place in a blob of the index, in bytes, and its sha256 as 64 hex digits (version 1 does not
    say: empty)."""

    offset: int
    length: int
    sha256: str = ""

    def unpack(self, stored: bytes) -> bytes:
        """The windows of this group, back to back. ImageError if it is another one, or damaged."""
        if self.sha256 and hashlib.sha256(stored).hexdigest() != self.sha256:
            raise ImageError("a group of windows does not have the digest that the index gives")
        return unpack_windows(stored)


def pack_windows(windows: Sequence[bytes]) -> list[bytes]:
    """Windows in their order -> the stored groups of one layer. Short windows are padded with zeros in front."""
    groups = []
    for first in range(0, len(windows), WINDOWS_PER_GROUP):
        group = windows[first : first + WINDOWS_PER_GROUP]
        groups.append(compress(b"".join(window.rjust(WINDOW_BYTES, b"\0") for window in group)))
    return groups


def unpack_windows(stored: bytes) -> bytes:
    """One stored group -> its windows back to back. ImageError if damaged (the frame carries a checksum)."""
    raw = decompress(stored, WINDOWS_PER_GROUP * WINDOW_BYTES, "the index")
    if not raw or len(raw) % WINDOW_BYTES:
        raise ImageError("a group of windows in the index has the wrong length")
    return raw
