"""Windows of gzip spans in groups, as the index artifact stores them."""

from __future__ import annotations

from collections.abc import Sequence

from lazyfs.core.index.sections import compress, decompress
from lazyfs.core.layer.deflate import WINDOW_BYTES
from lazyfs.core.layer.spans import WINDOWS_PER_GROUP
from lazyfs.errors import ImageError

# A stored group of windows: 1 MiB before compression, and what zstd adds to noise.
MAX_GROUP_BYTES = 2 * WINDOWS_PER_GROUP * WINDOW_BYTES


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
