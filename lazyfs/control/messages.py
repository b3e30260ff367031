"""The daemon's control protocol: JSON lines over a Unix socket, descriptors by SCM_RIGHTS.

One request a line, answered by any number of ``{"progress": text}`` lines and then exactly one of

    {"ok": true, ...}                                    for "mount" one descriptor comes with it, and
                                                         "image" (canonical), "manifest_digest", "joined"
    {"needs_index": true, "manifest_digest", "reasons"}  the image has no index yet: build one, ask again. "reasons":
                                                         why those that are attached were passed over
    {"error": {"kind", "code", "message", "hint"}}       kind: user, remote, image or host; code: LazyfsError.code,
                                                         more exact (an older daemon sends none, a newer one
                                                         perhaps others: then the kind counts)

Requests (`parse_request` checks them on the daemon's side):

    {"op": "mount", "image", "access": {...}, "timeout_s", "push_index"}
        "access" is sources/access.py's record; "push_index": the client makes a missing index, since it pushes it.
        The connection then stays open until the client has attached the mount and says
        {"attached": {"dev": "MAJ:MIN", "target", "ephemeral_upper": path or null, "image_dev"}}, answered by
        {"ok": true}.
        A connection that ends before that drops the mount. `dev` is the device of what lies at the target:
        the overlay's if there is one, over that of the image, `image_dev`. `ephemeral_upper` is removed when
        `dev` has gone.
    {"op": "fuse_mount", "image", "access", "timeout_s", "push_index", "target", "allow_other", "exec"}
        The same, said to a ``lazyfs.daemon.fuseworker`` process over the socket pair it is started with; it mounts
        at `target` itself and sends no descriptor.
    {"op": "attached", "attached": {...}}                a further mount joined: as above, in its own request
    {"op": "stats", "dev": "MAJ:MIN"}, {"op": "list"}, {"op": "ping"}, {"op": "upgrade"}, {"op": "stop"}

"list" answers {"cache", "mounts": [{"dev", "image", "manifest_digest", "backend", "platform" (as requested,
or null), "targets": [{"dev", "target", "ephemeral_upper"}]}]}; "dev" of a mount is that of its EROFS or FUSE
file system. "stats" takes that or the "dev" of a target and answers such an entry and the counters of its image
(serving/image.py). The light `mount` client imports this module: standard library only.
"""

from __future__ import annotations

from lazyfs.errors import HostError, ImageError, LazyfsError, NotFound, RemoteError, Unsupported, UserError
from lazyfs.records import NamedTuple
from lazyfs.sources import access
from lazyfs.sources.access import Access
from lazyfs.system import lightjson

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

MAX_REQUEST_BYTES = 64 * 1024
MAX_REPLY_BYTES = 4 * 1024 * 1024  # "list" with thousands of mounts
MAX_IMAGE_CHARACTERS = 4096
MAX_PATH_CHARACTERS = 4096  # PATH_MAX
MIN_TIMEOUT_S, MAX_TIMEOUT_S = 0.1, 86400.0
MAX_PROGRESS_CHARACTERS = 1000
MAX_REASONS = 20  # why attached indexes were passed over
MAX_FDS = 1  # descriptors with one reply

# What an error reply becomes, by its code, or else by its kind.
KINDS: dict[str, type[LazyfsError]] = {
    one.code: one for one in (UserError, RemoteError, ImageError, HostError, NotFound, Unsupported)
}

VERSIONS = "client and daemon may differ in version: lazyfs daemon --upgrade"

OPERATIONS = ("mount", "fuse_mount", "attached", "stats", "list", "ping", "upgrade", "stop")


class ProtocolError(HostError):
    """The other side said something that is not in the protocol."""


class Attached(NamedTuple):
    """Where a mount was attached. `image_dev`: the EROFS or FUSE file system below, where `dev` may be an
    overlay's."""

    dev: tuple[int, int]
    target: str
    ephemeral_upper: str | None = None
    image_dev: tuple[int, int] | None = None


class Request(NamedTuple):
    """A checked request; which fields are set depends on `op`."""

    op: str
    image: str = ""
    access: Access = Access()
    timeout_s: float = 30.0
    push_index: bool = False
    dev: tuple[int, int] | None = None
    attached: Attached | None = None
    target: str = ""
    allow_other: bool = False
    executable: bool = True  # "exec" on the wire


# -- lines -----------------------------------------------------------------------------------------------


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


# -- requests and replies, daemon's side -----------------------------------------------------------------


def _text(value: object, what: str, limit: int = MAX_PATH_CHARACTERS) -> str:
    if not isinstance(value, str) or not value or len(value) > limit or "\0" in value:
        raise ProtocolError(f"control request: {what} is not a text of 1 to {limit} characters")
    return value


def _boolean(value: object, what: str) -> bool:
    if not isinstance(value, bool):
        raise ProtocolError(f"control request: {what} is neither true nor false")
    return value


def _path(value: object, what: str) -> str:
    path = _text(value, what)
    if not path.startswith("/"):
        raise ProtocolError(f"control request: {what} is a relative path")
    return path


def parse_dev(value: object) -> tuple[int, int]:
    """ "MAJ:MIN" as mountinfo writes it. Raises ProtocolError."""
    major, separator, minor = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not (separator and _is_number(major) and _is_number(minor)):
        raise ProtocolError("control request: dev is not MAJOR:MINOR")
    return int(major), int(minor)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10


def format_dev(dev: tuple[int, int]) -> str:
    return f"{dev[0]}:{dev[1]}"


def parse_access(value: object) -> Access:
    """The "access" of a mount request. Raises ProtocolError."""
    try:
        return access.from_json(value)
    except ValueError as error:
        raise ProtocolError(f"control request: {error}", VERSIONS) from None


def parse_timeout(value: object) -> float:
    """Seconds, within the bounds that hold everywhere. Raises ProtocolError."""
    # Compared, not converted: an integer of a thousand digits has no float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not MIN_TIMEOUT_S <= value <= MAX_TIMEOUT_S:
        raise ProtocolError("control request: timeout_s is not a number of seconds from 0.1 to a day")
    return float(value)


def parse_attached(value: object) -> Attached:
    """The client's report of where it attached the mount. Raises ProtocolError."""
    if not isinstance(value, dict):
        raise ProtocolError("control request: attached is not an object")
    upper = value.get("ephemeral_upper")
    image_dev = value.get("image_dev")
    return Attached(
        dev=parse_dev(value.get("dev")),
        target=_path(value.get("target"), "target"),
        ephemeral_upper=None if upper is None else _path(upper, "ephemeral_upper"),
        image_dev=None if image_dev is None else parse_dev(image_dev),
    )


def parse_request(line: bytes) -> Request:
    """A request line, checked for shape and size. Raises ProtocolError, and nothing else."""
    message = decode(line)
    op = message.get("op")
    if not isinstance(op, str) or op not in OPERATIONS:
        raise ProtocolError(f"control request: unknown operation {op!r:.40}", VERSIONS)
    if op == "stats":
        return Request(op, dev=parse_dev(message.get("dev")))
    if op == "attached":
        return Request(op, attached=parse_attached(message.get("attached")))
    if op not in ("mount", "fuse_mount"):
        return Request(op)
    request = Request(
        op,
        image=_text(message.get("image"), "image", MAX_IMAGE_CHARACTERS),
        access=parse_access(message.get("access", {})),
        timeout_s=parse_timeout(message.get("timeout_s", 30.0)),
        push_index=_boolean(message.get("push_index", False), "push_index"),
    )
    if op == "mount":
        return request
    return request._replace(
        target=_path(message.get("target"), "target"),
        allow_other=_boolean(message.get("allow_other", False), "allow_other"),
        executable=_boolean(message.get("exec", True), "exec"),
    )


def progress(text: str) -> bytes:
    return encode({"progress": text[:MAX_PROGRESS_CHARACTERS]})


def ok(**fields: Any) -> bytes:
    return encode({"ok": True, **fields})


def needs_index(manifest_digest: str, reasons: Sequence[str] = ()) -> bytes:
    texts = [reason[:MAX_PROGRESS_CHARACTERS] for reason in reasons[:MAX_REASONS]]
    return encode({"needs_index": True, "manifest_digest": manifest_digest, "reasons": texts})


def failure(error: LazyfsError) -> bytes:
    fields = {"kind": error.fault, "code": error.code, "message": error.message[:16384], "hint": error.hint[:16384]}
    return encode({"error": fields})
