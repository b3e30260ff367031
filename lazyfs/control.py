"""The daemon's control protocol: JSON lines over a Unix socket, descriptors by SCM_RIGHTS.

One request a line, answered by any number of ``{"progress": text}`` lines and then exactly one of

    {"ok": true, ...}                                    for "mount" one descriptor comes with it, and
                                                         "image" (canonical), "manifest_digest", "joined"
    {"needs_index": true, "manifest_digest": ...}        the image has no index yet: build one, ask again
    {"error": {"kind", "message", "hint"}}               kind: user, remote, image or host

Requests (`parse_request` checks them on the daemon's side):

    {"op": "mount", "image", "options": {...}, "home": {environment variables that lead to credentials}}
        The connection then stays open until the client has attached the mount and says
        {"attached": {"dev": "MAJ:MIN", "target", "ephemeral_upper": path or null, "image_dev"}}, answered by
        {"ok": true}.
        A connection that ends before that drops the mount. `dev` is the device of what lies at the target:
        the overlay's if there is one, over that of the image, `image_dev`. `ephemeral_upper` is removed when
        `dev` has gone.
    {"op": "fuse_mount", "image", "options", "home", "target", "allow_other", "exec"}
        The same, said to a ``lazyfs.fusemount`` process over the socket pair it is started with; it mounts
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
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lazyfs.errors import HostError, ImageError, LazyfsError, RemoteError, UserError

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

_KINDS: dict[str, type[LazyfsError]] = {
    "user": UserError,
    "remote": RemoteError,
    "image": ImageError,
    "host": HostError,
}

_VERSIONS = "client and daemon may differ in version: lazyfs daemon --upgrade"

OPERATIONS = ("mount", "fuse_mount", "attached", "stats", "list", "ping", "upgrade", "stop")


class ProtocolError(HostError):
    """The other side said something that is not in the protocol."""


class DaemonSilent(HostError):
    """The daemon is there, but does not read or does not answer in time."""


class DaemonGone(HostError):
    """Nobody listens, or the connection ended before the answer."""


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
        raise ProtocolError("a control message is not JSON", _VERSIONS) from None
    if not isinstance(message, dict):
        raise ProtocolError("a control message is not an object", _VERSIONS)
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
        raise ProtocolError(f"control request: unknown option {min(unknown)!r:.40}", _VERSIONS)
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
        raise ProtocolError(f"control request: unknown operation {op!r:.40}", _VERSIONS)
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
    return encode(
        {"error": {"kind": error.fault, "message": error.message[:16384], "hint": error.hint[:16384]}}
    )


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end (SO_PEERCRED), as of when the connection was made."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return int(uid)


def peer_pid(connection: socket.socket) -> int:
    """The process that made the listening socket (or the pair) at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, _, _ = struct.unpack("3i", credentials)
    return int(pid)


# -- client's side ---------------------------------------------------------------------------------------


def error_from(reply: Mapping[str, Any]) -> LazyfsError:
    """The error that the daemon reported. A malformed one is a ProtocolError (returned, not raised)."""
    value = reply.get("error")
    if isinstance(value, dict):
        kind, message, hint = value.get("kind"), value.get("message"), value.get("hint", "")
        if isinstance(kind, str) and kind in _KINDS and isinstance(message, str) and isinstance(hint, str):
            return _KINDS[kind](message, hint)
    return ProtocolError("the daemon reported an error in an unknown form", "see its daemon.log")


def environment_home(environment: Mapping[str, str]) -> dict[str, str]:
    """The "home" of a mount request."""
    return {name: environment[name] for name in HOME_VARIABLES if environment.get(name)}


def _receive(connection: socket.socket) -> tuple[bytes, list[int], int]:
    # Not socket.recv_fds: Python 3.11 drops the flags it is given, and the descriptors would be inherited.
    space = socket.CMSG_SPACE(MAX_FDS * struct.calcsize("i"))
    data, ancillary, flags, _ = connection.recvmsg(65536, space, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, value in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += struct.unpack(f"{len(value) // 4}i", value[: len(value) // 4 * 4])
    return data, fds, flags


class Connection:
    """A blocking connection to a daemon. Owns its socket and the descriptors received and not yet taken."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lines = LineBuffer(MAX_REPLY_BYTES)
        self._fds: list[int] = []

    @classmethod
    def open(cls, path: str, timeout_s: float = 5.0) -> Connection:
        """Connects to the socket at `path`. Raises DaemonGone if nobody listens, HostError if another user
        does."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_s)
            connection.connect(path)
            if peer_uid(connection) not in (os.geteuid(), 0):
                raise HostError(f"{path} belongs to another user's process", "remove its directory")
        except OSError as error:
            connection.close()
            raise DaemonGone(f"no daemon answers at {path}: {error.strerror or error}") from None
        except BaseException:
            connection.close()
            raise
        return cls(connection)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent. Descriptors that nobody took are closed too: the daemon's mount then ends."""
        self._socket.close()
        while self._fds:
            os.close(self._fds.pop())

    def fileno(self) -> int:
        return self._socket.fileno()

    def peer_pid(self) -> int:
        return peer_pid(self._socket)

    def take_fd(self) -> int:
        """The descriptor that came with the last reply; the caller's from now on. Raises ProtocolError."""
        if not self._fds:
            raise ProtocolError("the daemon sent no descriptor with its reply", "see its daemon.log")
        return self._fds.pop(0)

    def send(self, message: Mapping[str, Any], timeout_s: float = 10.0) -> None:
        line = encode(message, MAX_REQUEST_BYTES)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.sendall(line)
        except TimeoutError:
            raise DaemonSilent("the daemon does not read its requests", "see its daemon.log") from None
        except OSError as error:
            raise DaemonGone(f"the daemon closed the connection: {error.strerror}") from None

    def receive(self, silence_s: float) -> dict[str, Any]:
        """The next message. Raises DaemonGone at the end of the stream, DaemonSilent after `silence_s`
        without a whole message, ProtocolError."""
        deadline = time.monotonic() + silence_s
        while (line := self._lines.next_line()) is None:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                data, fds, flags = _receive(self._socket)
            except TimeoutError:
                raise DaemonSilent(
                    f"the daemon did not answer within {silence_s:g} s",
                    "see its daemon.log, or raise timeout=",
                ) from None
            except OSError as error:
                message = f"the connection to the daemon broke: {error.strerror}"
                raise DaemonGone(message, "see its daemon.log") from None
            self._fds += fds
            if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
                raise ProtocolError("the daemon sent too many descriptors", "see its daemon.log")
            if not data:
                raise DaemonGone("the daemon ended before it answered", "see its daemon.log")
            self._lines.feed(data)
        return decode(line)

    def ask(
        self,
        message: Mapping[str, Any],
        silence_s: float = 10.0,
        on_progress: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """Sends a request and returns its final reply ("ok" or "needs_index"). `silence_s` bounds the time
        between two messages: a daemon that works says so. Raises what the daemon reports, as its own kind."""
        self.send(message)
        while True:
            reply = self.receive(silence_s)
            if "progress" in reply:
                if on_progress is not None and isinstance(reply["progress"], str):
                    on_progress(reply["progress"])
            elif "error" in reply:
                raise error_from(reply)
            elif reply.get("ok") is True or reply.get("needs_index") is True:
                return reply
            else:
                raise ProtocolError("the daemon answered in an unknown form", _VERSIONS)


def ask_once(path: str, message: Mapping[str, Any], silence_s: float = 10.0) -> dict[str, Any]:
    """One request on its own connection."""
    with Connection.open(path, min(silence_s, 5.0)) as connection:
        return connection.ask(message, silence_s)
