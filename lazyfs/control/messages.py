"""The daemon's control protocol: JSON lines over a Unix socket, descriptors by SCM_RIGHTS.

One request a line, answered by any number of ``{"progress": text}`` lines and then exactly one of

    {"ok": true, ...}                                    for "mount" one descriptor comes with it, and
                                                         "image" (canonical), "manifest_digest", "joined"
    {"needs_index": true, "manifest_digest": ...}        the image has no index yet: build one, ask again
    {"error": {"kind", "code", "message", "hint"}}       kind: user, remote, image or host; code: LazyfsError.code,
                                                         more exact (an older daemon sends none, a newer one
                                                         perhaps others: then the kind counts)

Requests (`parse_request` checks them on the daemon's side):

    {"op": "mount", "image", "options": {...}, "home": {environment variables that lead to credentials}}
        The connection then stays open until the client has attached the mount and says
        {"attached": {"dev": "MAJ:MIN", "target", "ephemeral_upper": path or null, "image_dev"}}, answered by
        {"ok": true}.
        A connection that ends before that drops the mount. `dev` is the device of what lies at the target:
        the overlay's if there is one, over that of the image, `image_dev`. `ephemeral_upper` is removed when
        `dev` has gone.
    {"op": "fuse_mount", "image", "options", "home", "target", "allow_other", "exec"}
        The same, said to a ``lazyfs.daemon.fuseworker`` process over the socket pair it is started with; it mounts
        at `target` itself and sends no descriptor.
    {"op": "attached", "attached": {...}}                a further mount joined: as above, in its own request
    {"op": "stats", "dev": "MAJ:MIN"}, {"op": "list"}, {"op": "ping"}, {"op": "upgrade"}, {"op": "stop"}

"list" answers {"cache", "mounts": [{"dev", "image", "manifest_digest", "backend", "platform" (as requested,
or null), "targets": [{"dev", "target", "ephemeral_upper"}]}]}; "dev" of a mount is that of its EROFS or FUSE
file system. "stats" takes that or the "dev" of a target and answers the counters of that image: "image",
"manifest_digest", "backend", "bytes_fetched", "requests", "retries", "blocks_present", "blocks",
"cache_hits", "memory_bytes". The light `mount` client imports this module: standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from lazyfs.errors import HostError, ImageError, LazyfsError, NotFound, RemoteError, Unsupported, UserError

MAX_REQUEST_BYTES = 64 * 1024
MAX_REPLY_BYTES = 4 * 1024 * 1024  # "list" with thousands of mounts
MAX_IMAGE_CHARACTERS = 4096
MAX_PATH_CHARACTERS = 4096  # PATH_MAX
MAX_FILES = 64  # CA or authentication files named in one request
MAX_PROGRESS_CHARACTERS = 1000
MAX_FDS = 1  # descriptors with one reply

# What leads to credentials (section "Credentials" of the README): nothing else of the client's environment
# is sent.
HOME_VARIABLES = (
    "HOME",
    "XDG_CONFIG_HOME",
    "XDG_RUNTIME_DIR",
    "DOCKER_CONFIG",
    "REGISTRY_AUTH_FILE",
    "PATH",  # where docker-credential-* helpers are
)

# What an error reply becomes, by its code, or else by its kind.
KINDS: dict[str, type[LazyfsError]] = {
    one.code: one for one in (UserError, RemoteError, ImageError, HostError, NotFound, Unsupported)
}

VERSIONS = "client and daemon may differ in version: lazyfs daemon --upgrade"

OPERATIONS = ("mount", "fuse_mount", "attached", "stats", "list", "ping", "upgrade", "stop")


class ProtocolError(HostError):
    """The other side said something that is not in the protocol."""


class RequestOptions(NamedTuple):
    """What the daemon has to know of the mount options."""

    offline: bool = False
    insecure: bool = False
    timeout_s: float = 30.0
    platform: str | None = None
    ca_files: tuple[str, ...] = ()
    auth_files: tuple[str, ...] | None = None  # None: the usual places
    push_index: bool = False  # the client makes a missing index, since it pushes it


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
    options: RequestOptions = RequestOptions()
    home: Mapping[str, str] = {}
    dev: tuple[int, int] | None = None
    attached: Attached | None = None
    target: str = ""
    allow_other: bool = False
    executable: bool = True  # "exec" on the wire


# -- lines -----------------------------------------------------------------------------------------------


def encode(message: Mapping[str, Any], limit_bytes: int = MAX_REPLY_BYTES) -> bytes:
    """One line. File names that are not UTF-8 travel as surrogate escapes (os.fsdecode). Raises
    ProtocolError if it is longer than the other side accepts."""
    line = json.dumps(message, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
    if len(line) > limit_bytes:
        raise ProtocolError(f"a control message of {len(line)} bytes exceeds the limit of {limit_bytes}")
    return line


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def decode(line: bytes) -> dict[str, Any]:
    """The message of one line. Raises ProtocolError for anything but a JSON object."""
    try:
        message = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
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


def _paths(value: object, what: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_FILES:
        raise ProtocolError(f"control request: {what} is not a list of at most {MAX_FILES} paths")
    paths = tuple(_text(item, what) for item in value)
    if not all(path.startswith("/") for path in paths):
        raise ProtocolError(f"control request: {what} has a relative path")
    return paths


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


def parse_options(value: object) -> RequestOptions:
    """The "options" of a mount request. Unknown keys are refused: a newer client may mean them seriously."""
    if not isinstance(value, dict):
        raise ProtocolError("control request: options is not an object")
    unknown = set(value) - set(RequestOptions._fields)
    if unknown:
        raise ProtocolError(f"control request: unknown option {min(unknown)!r:.40}", VERSIONS)
    timeout_s = value.get("timeout_s", 30.0)
    # Compared, not converted: an integer of a thousand digits has no float.
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= 86400:
        raise ProtocolError("control request: timeout_s is not a number of seconds up to a day")
    platform = value.get("platform")
    auth_files = value.get("auth_files")
    return RequestOptions(
        offline=_boolean(value.get("offline", False), "offline"),
        insecure=_boolean(value.get("insecure", False), "insecure"),
        timeout_s=float(timeout_s),
        platform=None if platform is None else _text(platform, "platform", 100),
        ca_files=_paths(value.get("ca_files", []), "ca_files"),
        auth_files=None if auth_files is None else _paths(auth_files, "auth_files"),
        push_index=_boolean(value.get("push_index", False), "push_index"),
    )


def parse_attached(value: object) -> Attached:
    """The client's report of where it attached the mount. Raises ProtocolError."""
    if not isinstance(value, dict):
        raise ProtocolError("control request: attached is not an object")
    upper = value.get("ephemeral_upper")
    target = _text(value.get("target"), "target")
    if not target.startswith("/"):
        raise ProtocolError("control request: target is a relative path")
    image_dev = value.get("image_dev")
    return Attached(
        dev=parse_dev(value.get("dev")),
        target=target,
        ephemeral_upper=None if upper is None else _paths([upper], "ephemeral_upper")[0],
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
    home = message.get("home", {})
    if not isinstance(home, dict) or not all(name in HOME_VARIABLES for name in home):
        raise ProtocolError("control request: home has an unknown variable")
    request = Request(
        op,
        image=_text(message.get("image"), "image", MAX_IMAGE_CHARACTERS),
        options=parse_options(message.get("options", {})),
        home={name: _text(value, name, MAX_REQUEST_BYTES) for name, value in home.items()},
    )
    if op == "mount":
        return request
    return request._replace(
        target=_paths([message.get("target")], "target")[0],
        allow_other=_boolean(message.get("allow_other", False), "allow_other"),
        executable=_boolean(message.get("exec", True), "exec"),
    )


def progress(text: str) -> bytes:
    return encode({"progress": text[:MAX_PROGRESS_CHARACTERS]})


def ok(**fields: Any) -> bytes:
    return encode({"ok": True, **fields})


def needs_index(manifest_digest: str) -> bytes:
    return encode({"needs_index": True, "manifest_digest": manifest_digest})


def failure(error: LazyfsError) -> bytes:
    fields = {"kind": error.fault, "code": error.code, "message": error.message[:16384], "hint": error.hint[:16384]}
    return encode({"error": fields})
