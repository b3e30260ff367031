"""What passes a link, by what was asked for: HTTP requests and the bytes of each blob, seen from the wire.

So that neither has to be believed of who fetches. Requests of one connection are answered in turn (no client here
sends a second one before it has the answer), so what comes down belongs to the last one.
"""

from __future__ import annotations

from collections import Counter

_LINE_END = b" HTTP/1.1\r\n"
_LONGEST_LINE_BYTES = 8192
_BLOBS = "/blobs/"


class Tally:
    """One connection's. `blobs`: digest -> bytes, which all connections of a link share; "" is whatever is no blob."""

    def __init__(self, blobs: Counter[str]) -> None:
        self.requests = 0
        self.asked = ""
        self._blobs = blobs
        self._rest = b""  # of what came up: the beginning of a line, perhaps

    def up(self, data: bytes) -> None:
        """What the client sent: heads, and bodies of uploads."""
        data = self._rest + data
        begin = 0
        while (end := data.find(_LINE_END, begin)) >= 0:
            path = data[max(begin, end - _LONGEST_LINE_BYTES) : end].rpartition(b" ")[2].decode(errors="replace")
            self.requests += 1
            self.asked = path.rpartition(_BLOBS)[2] if _BLOBS in path else ""
            begin = end + len(_LINE_END)
        self._rest = data[max(begin, len(data) - _LONGEST_LINE_BYTES) :]

    def down(self, size: int) -> None:
        """So many bytes reached the client."""
        self._blobs[self.asked] += size
