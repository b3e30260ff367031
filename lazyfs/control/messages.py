"""The daemon's control protocol: JSON lines over a Unix socket, descriptors by SCM_RIGHTS.

One request a line, answered by any number of ``{"progress": text}`` lines and then exactly one of

    {"ok": true, ...}                                    with fields of the operation (replies.py); for "lease" one
                                                         descriptor comes with it
    {"needs_index": true, "manifest_digest", "reasons"}  the image has no index yet: build one, ask again. "reasons":
                                                         why attached ones were passed over
    {"error": {"kind", "code", "message", "hint"}}       kind: user, remote, image or host; code: LazyfsError.code,
                                                         more exact. The kind counts if there is no code (an older
                                                         daemon) or an unknown one (a newer daemon)

Requests (control/requests.py: a record and a parser for each, control/replies.py: the fields of its answer):

    {"op": "lease", "image", "access": {...}, "timeout_s", "push_index", "traced"}
        A lease of the image, until this connection ends. "access" is the record of sources/access.py. "push_index":
        the client makes a missing index itself, because it pushes it. "traced": if the image is not mounted yet, all of
        its layers are read through the daemon, sealed ones, too, and what is read counts as a start if "profile" says
        when that is over, and only then.
    {"op": "fuse_mount", "image", "access", "timeout_s", "push_index", "traced", "target", "allow_other", "exec"}
        The same, sent to a ``lazyfs.daemon.fuseworker`` process over the socket pair it is started with. It mounts at
        `target` itself and sends no descriptor.
    {"op": "attached", "attached": {"dev": "MAJ:MIN", "target", "ephemeral_upper": path or null, "image_dev"}}
        The client has attached a mount of the image, which from now on holds the image in place of the connection.
        `dev`: the device at the target: the overlay's, if there is one; `image_dev`: the device of the image's own file
        system. `ephemeral_upper` is removed when `dev` has gone.
    {"op": "hold", "name", "dev"}, {"op": "release", "name"}
        A lease by name of an image that is mounted or leased. It needs neither target nor connection, and outlives the
        daemon's worker. `dev`: as "lease" or "list" gave it. A name holds one image: holding again moves it.
    {"op": "stats", "dev": "MAJ:MIN"}, {"op": "list"}, {"op": "ping"}, {"op": "upgrade"}, {"op": "stop"}
        "stats" takes the "dev" of an image or of a target. It answers with an `Entry` and the counters of its image
        (serving/image.py).
    {"op": "profile", "dev": "MAJ:MIN"}
        The start of the image (or of a target's image) is over: its trace ends, and is in the image's profile in the
        cache when this is answered.

A daemon runs on when its package is replaced, so client and daemon may differ in version. Either refuses what it does
not know if that may be meant seriously: an operation, and any key of "lease" and "fuse_mount". So a change of the form
of these needs another name. ("mount" was a lease with access in another form.)

The light `mount` client imports this module: standard library only, and no records, each of which costs 0.1 ms.
"""

from __future__ import annotations

from lazyfs.core import lightjson
from lazyfs.errors import HostError, ImageError, LazyfsError, NotFound, RemoteError, Unsupported, UserError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

MAX_REQUEST_BYTES = 64 * 1024
MAX_REPLY_BYTES = 4 * 1024 * 1024  # "list" with thousands of mounts
MAX_FDS = 1  # descriptors with one reply
MIN_TIMEOUT_S, MAX_TIMEOUT_S = 0.1, 86400.0

# What an error reply becomes, by its code, or else by its kind.
KINDS: dict[str, type[LazyfsError]] = {
    one.code: one for one in (UserError, RemoteError, ImageError, HostError, NotFound, Unsupported)
}

VERSIONS = "client and daemon may differ in version: lazyfs daemon --upgrade"

Dev = tuple[int, int]  # major and minor number of a file system


class ProtocolError(HostError):
    """The other side broke the protocol."""


def encode(message: Mapping[str, Any], limit_bytes: int = MAX_REPLY_BYTES) -> bytes:
    """One line. File names that are not UTF-8 travel as surrogate escapes (os.fsdecode). Raises
    ProtocolError if it is longer than the other side accepts."""
    line = lightjson.dumps(message).encode("ascii") + b"\n"
    if len(line) > limit_bytes:
        raise ProtocolError(f"a control message of {len(line)} bytes exceeds the limit of {limit_bytes}")
    return line


def decode(line: bytes) -> dict[str, Any]:
    """The message of one line. Raises ProtocolError for anything but a JSON object."""
    try:
        message = lightjson.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ProtocolError("a control message is not JSON", VERSIONS) from None
    if not isinstance(message, dict):
        raise ProtocolError("a control message is not an object", VERSIONS)
    return message


class LineBuffer:
    """Cuts a byte stream into lines of at most `limit_bytes`."""

    def __init__(self, limit_bytes: int = MAX_REQUEST_BYTES) -> None:
        self._limit = limit_bytes
        self._data = bytearray()
        self._searched = 0

    def feed(self, data: bytes) -> None:
        self._data += data

    def next_line(self) -> bytes | None:
        """The next whole line without its newline; None: feed more. Raises ProtocolError at the limit."""
        end = self._data.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._data)
            end_or_size = len(self._data)
        else:
            end_or_size = end
        if end_or_size >= self._limit:
            raise ProtocolError(f"a control message exceeds the limit of {self._limit} bytes")
        if end < 0:
            return None
        line = bytes(self._data[:end])
        del self._data[: end + 1]
        self._searched = 0
        return line


def parse_dev(value: object) -> Dev:
    """ "MAJ:MIN" as mountinfo writes it. Raises ProtocolError."""
    major, separator, minor = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not (separator and _is_number(major) and _is_number(minor)):
        raise ProtocolError("control request: dev is not MAJOR:MINOR")
    return int(major), int(minor)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10


def format_dev(dev: Dev) -> str:
    return f"{dev[0]}:{dev[1]}"


def parse_timeout(value: object) -> float:
    """Seconds, within the bounds that hold everywhere. Raises ProtocolError."""
    # Compared before it is converted: an integer of a thousand digits has no float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not MIN_TIMEOUT_S <= value <= MAX_TIMEOUT_S:
        raise ProtocolError("control request: timeout_s is not a number of seconds from 0.1 to a day")
    return float(value)
