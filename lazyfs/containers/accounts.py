"""The ids of a container's process: an image's `User`, resolved by the image's own passwd and group files.

Pure: the caller reads the two files inside the image. The host's accounts are never asked, because a host NSS module
would run with the host's rights on the image's word (CVE-2019-14271).
Formats: passwd(5), group(5). Rules: OCI image-spec conversion.md, "Config.User".
"""

from __future__ import annotations

from lazyfs.errors import ImageError
from lazyfs.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_ACCOUNT_FILE_BYTES = 1 << 20
"""An account file over this is refused, not read (memory exhaustion, CVE-2026-47262). Debian's: 1 KiB."""

MAX_ID = 2**31 - 1
"""Larger ids wrap to 0 in runtimes that keep them in 32 bits with a sign (CVE-2024-40635)."""

MAX_ADDITIONAL_GROUPS = 65536
"""NGROUPS_MAX, setgroups(2)."""


class Account(NamedTuple):
    """The ids of a container's process, as the container sees them, and its home directory. `additional_gids` are
    besides `gid`."""

    uid: int = 0
    gid: int = 0
    additional_gids: tuple[int, ...] = ()
    home: str = "/"


def resolve_user(user: str, passwd_bytes: bytes, group_bytes: bytes) -> Account:
    """Turn `user` (``""``, ``name``, ``uid``, each with an optional ``:group`` or ``:gid``) into ids.

    Numbers are taken verbatim. Without a group the user gets the primary group that passwd gives it, else 0, and the
    supplementary groups of the name that passwd gives it; with one, none of them. ``""`` is uid 0.
    Absent files are given as ``b""``.

    Raises ImageError: an unknown name, an id that is out of range, a malformed `user`, an oversized file.
    """
    for file, content in (("passwd", passwd_bytes), ("group", group_bytes)):
        if len(content) > MAX_ACCOUNT_FILE_BYTES:
            raise ImageError(
                f"the image's /etc/{file} is larger than {MAX_ACCOUNT_FILE_BYTES} bytes",
                "the image is damaged",
            )
    if user.count(":") > 1 or "\0" in user or "\n" in user or not _is_text(user):
        raise ImageError(f"the user {user[:80]!r} is malformed", "give it as USER[:GROUP]")
    who, _, group = user.partition(":")
    home = "/"
    gid = 0
    name = b""
    if not who or _is_decimal(who):
        uid = _checked_id(who or "0", "user")
        known = _passwd_entry(passwd_bytes, uid=uid)
        if known is not None:
            name, _, gid, home = known
    else:
        known = _passwd_entry(passwd_bytes, name=who.encode())
        if known is None:
            raise ImageError(
                f"the image has no user {who[:80]!r} in its /etc/passwd",
                "choose another one, or a number, with --user",
            )
        name, uid, gid, home = known
    if group:
        return Account(uid, _group_id(group_bytes, group), (), home)
    return Account(uid, gid, _memberships(group_bytes, name, gid) if name else (), home)


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: JSON allows lone surrogates."""
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in value)


def _is_decimal(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _checked_id(digits: str, what: str) -> int:
    # The length is checked first: int() of a very long string is slow, or refused.
    if len(digits.lstrip("0")) > 10 or int(digits) > MAX_ID:
        raise ImageError(
            f"the {what} id {digits[:20]} is larger than {MAX_ID}", "choose another one with --user"
        )
    return int(digits)


def _fields(content: bytes, count: int) -> Iterator[list[bytes]]:
    """The colon-separated lines that have at least `count` fields; comments and others are passed over."""
    for line in content.split(b"\n"):
        if line.startswith(b"#"):
            continue
        fields = line.split(b":")
        if len(fields) >= count:
            yield fields


def _number(field: bytes) -> int | None:
    text = field.decode("ascii", "replace")
    if not _is_decimal(text) or len(text) > 10:
        return None
    return int(text)


def _passwd_entry(content: bytes, *, name: bytes = b"", uid: int = -1) -> tuple[bytes, int, int, str] | None:
    """Name, uid, gid and home of the first entry with this name (or this uid)."""
    for fields in _fields(content, 6):
        entry_uid = _number(fields[2])
        if (fields[0] != name) if name else (entry_uid != uid):
            continue
        entry_gid = _number(fields[3])
        if entry_uid is None or entry_gid is None or max(entry_uid, entry_gid) > MAX_ID:
            raise ImageError(
                f"the image's /etc/passwd has no usable numbers for {(name or fields[0])[:80]!r}",
                "choose numbers with --user UID:GID",
            )
        return fields[0], entry_uid, entry_gid, _home(fields[5])
    return None


def _home(field: bytes) -> str:
    try:
        home = field.decode("utf-8")
    except UnicodeDecodeError:
        return "/"
    return home if home.startswith("/") and "\0" not in home else "/"


def _group_id(content: bytes, group: str) -> int:
    if _is_decimal(group):
        return _checked_id(group, "group")
    wanted = group.encode()
    for fields in _fields(content, 3):
        if fields[0] == wanted:
            gid = _number(fields[2])
            if gid is None or gid > MAX_ID:
                raise ImageError(
                    f"the image's /etc/group has no usable number for {group[:80]!r}",
                    "choose a number with --user",
                )
            return gid
    raise ImageError(
        f"the image has no group {group[:80]!r} in its /etc/group",
        "choose another one, or a number, with --user",
    )


def _memberships(content: bytes, name: bytes, primary_gid: int) -> tuple[int, ...]:
    gids: dict[int, None] = {}
    for fields in _fields(content, 4):
        gid = _number(fields[2])
        if gid is None or gid > MAX_ID or gid == primary_gid or name not in fields[3].split(b","):
            continue
        gids[gid] = None
    if len(gids) > MAX_ADDITIONAL_GROUPS:
        raise ImageError(
            f"the image's /etc/group puts its user into more than {MAX_ADDITIONAL_GROUPS} groups"
        )
    return tuple(gids)
