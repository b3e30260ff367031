"""HTTP/1.1 as it is on the wire: a request's head, an answer's head, and where an answer's body ends. No I/O.

RFC 9112, with what RFC 9110 says of headers. Answers come from outside: everything is bounded, and what is malformed
raises BadMessage.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

MAX_HEAD_BYTES = 100 << 10
MAX_LINE_BYTES = 4 << 10  # of a chunk's size with its extensions, or a trailer
MAX_TRAILERS = 100

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t\x20-\x7e]*")
_TARGET = re.compile(r"[\x21-\x7e]+")
_STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?: .*)?")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?")
_HEAD_END = re.compile(rb"\r?\n\r?\n")


class BadMessage(Exception):
    """An answer is malformed or ends too early, or a request cannot be sent."""


class Headers(Mapping[str, str]):
    """Header fields. Names are case-insensitive; the values of one that comes several times are joined by commas."""

    def __init__(self, fields: Iterable[tuple[str, str]]) -> None:
        self._values: dict[str, str] = {}
        for name, value in fields:
            key = name.lower()
            self._values[key] = f"{self._values[key]}, {value}" if key in self._values else value

    def __getitem__(self, name: str) -> str:
        return self._values[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Head(NamedTuple):
    """An answer's head. `minor`: of the version, 1.`minor`."""

    minor: int
    status: int
    headers: Headers

    @property
    def keeps_open(self) -> bool:
        """Whether the connection can be used again after this answer."""
        options = [option.strip().lower() for option in self.headers.get("Connection", "").split(",")]
        return "close" not in options if self.minor else "keep-alive" in options


def request_head(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    """The bytes before a request's body."""
    if not _TOKEN.fullmatch(method) or not _TARGET.fullmatch(target):
        raise BadMessage("a request line with odd characters")
    lines = [f"{method} {target} HTTP/1.1"]
    for name, value in headers.items():
        if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise BadMessage("a header with odd characters")
        lines.append(f"{name}: {value}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def split_head(data: bytes) -> tuple[bytes, bytes] | None:
    """An answer's head and what follows it; None: more is needed."""
    end = _HEAD_END.search(data, 0, MAX_HEAD_BYTES)
    if end is None:
        if len(data) >= MAX_HEAD_BYTES:
            raise BadMessage("an answer's head is too long")
        return None
    return data[: end.start()], data[end.end() :]


def parse_head(raw: bytes) -> Head:
    """What `split_head` found."""
    first, *lines = raw.split(b"\n")
    status_line = _STATUS_LINE.fullmatch(first.rstrip(b"\r"))
    if status_line is None:
        raise BadMessage("no HTTP/1 answer")
    fields: list[tuple[str, str]] = []
    for line in lines:
        text = _decoded(line.rstrip(b"\r"))
        if text[:1] in (" ", "\t") and fields:  # an old form: the value goes on
            fields[-1] = (fields[-1][0], f"{fields[-1][1]} {text.strip()}")
            continue
        name, colon, value = text.partition(":")
        if not colon or not _TOKEN.fullmatch(name) or "\0" in value or "\r" in value:
            raise BadMessage("a malformed header")
        fields.append((name, value.strip(" \t")))
    return Head(int(status_line[1]), int(status_line[2]), Headers(fields))


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("latin-1")


# -- bodies ----------------------------------------------------------------------------------------------


class Body(Protocol):
    """Cuts a body out of what a connection brings. `ended`: it is here as a whole. `surplus`: more came behind it."""

    ended: bool
    surplus: bool

    def feed(self, data: bytes) -> list[bytes]:
        """The pieces of the body in `data`."""

    def end(self) -> None:
        """The connection ended. Raises BadMessage if the body had not."""


def body_of(method: str, head: Head) -> Body:
    """The body that follows `head`, the answer to `method` (RFC 9112, section 6.3)."""
    if method == "HEAD" or head.status in (204, 304):
        return LengthBody(0)
    coding = head.headers.get("Transfer-Encoding", "").strip().lower()
    if coding:
        if coding != "chunked":
            raise BadMessage("an unknown transfer coding")
        return ChunkedBody()
    lengths = {length.strip() for length in head.headers.get("Content-Length", "").split(",")} - {""}
    if not lengths:
        return UnboundedBody()
    length = lengths.pop()
    if lengths or not (length.isascii() and length.isdigit() and len(length) <= 18):
        raise BadMessage("a malformed length")
    return LengthBody(int(length))


class LengthBody:
    """A body whose length is known."""

    def __init__(self, length: int) -> None:
        self._left = length
        self.ended = length == 0
        self.surplus = False

    def feed(self, data: bytes) -> list[bytes]:
        piece = data[: self._left]
        self._left -= len(piece)
        self.ended = not self._left
        self.surplus = len(piece) < len(data)
        return [piece] if piece else []

    def end(self) -> None:
        if not self.ended:
            raise BadMessage("an answer broke off")


class UnboundedBody:
    """A body that ends with its connection."""

    ended = False
    surplus = False

    def feed(self, data: bytes) -> list[bytes]:
        return [data] if data else []

    def end(self) -> None:
        self.ended = True


class ChunkedBody:
    """A body in chunks that say their length; trailers are dropped."""

    def __init__(self) -> None:
        self.ended = False
        self.surplus = False
        self._pending = b""  # the beginning of a line
        self._left = 0  # of the chunk
        self._expected = self._size_line
        self._trailers = 0

    def feed(self, data: bytes) -> list[bytes]:
        pieces = []
        data = self._pending + data
        position = 0
        while position < len(data) and not self.ended:
            if self._left:
                piece = data[position : position + self._left]
                pieces.append(piece)
                position += len(piece)
                self._left -= len(piece)
                continue
            end = data.find(b"\n", position, position + MAX_LINE_BYTES)
            if end < 0:
                if len(data) - position >= MAX_LINE_BYTES:
                    raise BadMessage("a chunk's line is too long")
                break
            self._expected(data[position:end].removesuffix(b"\r"))
            position = end + 1
        self._pending = b"" if self.ended else data[position:]
        self.surplus = self.ended and position < len(data)
        return pieces

    def end(self) -> None:
        if not self.ended:
            raise BadMessage("an answer broke off")

    def _size_line(self, line: bytes) -> None:
        size = _CHUNK_SIZE.fullmatch(line)
        if size is None:
            raise BadMessage("a malformed chunk")
        self._left = int(size[1], 16)
        self._expected = self._empty_line if self._left else self._trailer

    def _empty_line(self, line: bytes) -> None:
        if line:
            raise BadMessage("a chunk is longer than it says")
        self._expected = self._size_line

    def _trailer(self, line: bytes) -> None:
        self._trailers += 1
        if self._trailers > MAX_TRAILERS:
            raise BadMessage("too many trailers")
        self.ended = not line
