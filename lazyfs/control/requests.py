"""What clients ask a daemon (control/messages.py): a record for each operation, read from untrusted lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lazyfs.control.messages import VERSIONS, Dev, ProtocolError, decode, format_dev, parse_dev, parse_timeout
from lazyfs.sources import access
from lazyfs.sources.access import Access

MAX_IMAGE_CHARACTERS = 4096
MAX_PATH_CHARACTERS = 4096  # PATH_MAX
MAX_NAME_CHARACTERS = 256  # of a hold


class Mount(NamedTuple):
    image: str
    access: Access = Access()
    timeout_s: float = 30.0
    push_index: bool = False
    traced: bool = False


class FuseMount(NamedTuple):
    mount: Mount
    target: str
    allow_other: bool = False
    executable: bool = True  # "exec" on the wire


class Attached(NamedTuple):
    """Where a mount was attached. `dev`: what lies there, perhaps an overlay; `image_dev`: the EROFS or FUSE file
    system below it."""

    dev: Dev
    target: str
    ephemeral_upper: str | None = None
    image_dev: Dev | None = None

    def to_json(self) -> dict[str, Any]:
        """What `parse_attached` reads."""
        return {
            "dev": format_dev(self.dev),
            "target": self.target,
            "ephemeral_upper": self.ephemeral_upper,
            "image_dev": format_dev(self.image_dev) if self.image_dev else None,
        }


class Hold(NamedTuple):
    name: str
    dev: Dev


class Release(NamedTuple):
    name: str


class Stats(NamedTuple):
    dev: Dev


class Profile(NamedTuple):
    dev: Dev


class List(NamedTuple):
    pass


class Ping(NamedTuple):
    pass


class Upgrade(NamedTuple):
    pass


class Stop(NamedTuple):
    pass


Request = Mount | FuseMount | Attached | Hold | Release | Stats | Profile | List | Ping | Upgrade | Stop


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


def parse_access(value: object) -> Access:
    """The "access" of a mount request. Raises ProtocolError."""
    try:
        return access.from_json(value)
    except ValueError as error:
        raise ProtocolError(f"control request: {error}", VERSIONS) from None


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


def _mount(message: Mapping[str, Any], more: frozenset[str] = frozenset()) -> Mount:
    """Unknown keys, but for those in `more`, are refused: a newer client may mean them seriously."""
    unknown = message.keys() - {"op", *Mount._fields} - more
    if unknown:
        raise ProtocolError(f"control request: unknown key {min(unknown)!r:.40}", VERSIONS)
    return Mount(
        image=_text(message.get("image"), "image", MAX_IMAGE_CHARACTERS),
        access=parse_access(message.get("access", {})),
        timeout_s=parse_timeout(message.get("timeout_s", 30.0)),
        push_index=_boolean(message.get("push_index", False), "push_index"),
        traced=_boolean(message.get("traced", False), "traced"),
    )


def _fuse_mount(message: Mapping[str, Any]) -> FuseMount:
    return FuseMount(
        _mount(message, frozenset(("target", "allow_other", "exec"))),
        target=_path(message.get("target"), "target"),
        allow_other=_boolean(message.get("allow_other", False), "allow_other"),
        executable=_boolean(message.get("exec", True), "exec"),
    )


def _name(message: Mapping[str, Any]) -> str:
    return _text(message.get("name"), "name", MAX_NAME_CHARACTERS)


# Name of a request -> its record and its parser.
OPERATIONS: dict[str, tuple[type[Request], Callable[[Mapping[str, Any]], Request]]] = {
    "lease": (Mount, _mount),
    "fuse_mount": (FuseMount, _fuse_mount),
    "attached": (Attached, lambda message: parse_attached(message.get("attached"))),
    "hold": (Hold, lambda message: Hold(_name(message), parse_dev(message.get("dev")))),
    "release": (Release, lambda message: Release(_name(message))),
    "stats": (Stats, lambda message: Stats(parse_dev(message.get("dev")))),
    "profile": (Profile, lambda message: Profile(parse_dev(message.get("dev")))),
    "list": (List, lambda _: List()),
    "ping": (Ping, lambda _: Ping()),
    "upgrade": (Upgrade, lambda _: Upgrade()),
    "stop": (Stop, lambda _: Stop()),
}


def parse_request(line: bytes) -> Request:
    """A request line, checked for shape and size. Raises ProtocolError, and nothing else."""
    message = decode(line)
    op = message.get("op")
    if not isinstance(op, str) or op not in OPERATIONS:
        raise ProtocolError(f"control request: unknown operation {op!r:.40}", VERSIONS)
    return OPERATIONS[op][1](message)


def op_of(request: Request) -> str:
    return next(op for op, (kind, _) in OPERATIONS.items() if kind is type(request))
