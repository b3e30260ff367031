"""HTTP/1.1 on the wire: what is sent, and where an answer's head and body end, whoever sent it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.sources.http11 import (
    MAX_HEAD_BYTES,
    BadMessage,
    Body,
    ChunkedBody,
    LengthBody,
    UnboundedBody,
    body_of,
    parse_head,
    request_head,
    split_head,
)


def fed(body: Body, data: bytes, cuts: list[int]) -> bytes:
    """The body in `data`, which comes in pieces cut at `cuts`."""
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise(places)]
    return b"".join(piece for one in pieces for piece in (body.feed(one) if not body.ended else []))


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.lists(st.integers(0, 10_000), max_size=8))
def test_chunks_are_joined_wherever_they_are_cut(chunks: list[bytes], cuts: list[int]) -> None:
    data = b"".join(f"{len(chunk):X};a=b\r\n".encode() + chunk + b"\r\n" for chunk in chunks)
    body = ChunkedBody()
    assert fed(body, data + b"0\r\nTrailer: x\r\n\r\n", cuts) == b"".join(chunks)
    assert body.ended and not body.surplus
    body.end()


@pytest.mark.parametrize(
    "data",
    [b"x\r\n", b"-1\r\n", b"\r\n", b"5\r\nhello!\r\n", b"F" * 16 + b"\r\n", b"1" * 5000, b"0\r\n" + b"a: b\r\n" * 200],
)
def test_malformed_chunks(data: bytes) -> None:
    with pytest.raises(BadMessage):
        ChunkedBody().feed(data)


@pytest.mark.parametrize("body", [LengthBody(3), ChunkedBody()])
def test_what_breaks_off_is_noticed(body: Body) -> None:
    body.feed(b"2\r")
    with pytest.raises(BadMessage):
        body.end()


def test_what_follows_a_body_is_noticed() -> None:
    body = LengthBody(3)
    assert body.feed(b"abcd") == [b"abc"] and body.ended and body.surplus
    chunked = ChunkedBody()
    assert chunked.feed(b"1\r\na\r\n0\r\n\r\nHTTP") == [b"a"] and chunked.ended and chunked.surplus


def head(text: str) -> bytes:
    return ("\r\n".join(["HTTP/1.1 200 OK", *text.split("|")])).encode("latin-1")


@pytest.mark.parametrize(
    ("method", "raw", "kind"),
    [
        ("GET", head("Content-Length: 5"), LengthBody),
        ("GET", head("content-length: 5|Content-Length:5"), LengthBody),
        ("GET", head("Transfer-Encoding: Chunked|Content-Length: 5"), ChunkedBody),
        ("GET", head("Server: x"), UnboundedBody),
        ("HEAD", head("Transfer-Encoding: chunked"), LengthBody),
        ("GET", b"HTTP/1.0 304 Not Modified\nContent-Length: 9", LengthBody),
    ],
)
def test_where_a_body_ends(method: str, raw: bytes, kind: type[Body]) -> None:
    body = body_of(method, parse_head(raw))
    assert type(body) is kind
    assert body.ended == (method == "HEAD" or b"304" in raw)


@pytest.mark.parametrize(
    "fields",
    ["Content-Length: 5|Content-Length: 6", "Content-Length: -5", "Content-Length: 5x", "Transfer-Encoding: gzip"],
)
def test_doubtful_lengths_are_refused(fields: str) -> None:
    with pytest.raises(BadMessage):
        body_of("GET", parse_head(head(fields)))


@pytest.mark.parametrize(
    "raw",
    [b"", b"HTTP/2 200", b"HTTP/1.1 20 OK", b"SSH-2.0-x", *map(head, ("no colon", " folded", "a b: c", ": x"))],
)
def test_malformed_heads(raw: bytes) -> None:
    with pytest.raises(BadMessage):
        parse_head(raw)


def test_headers() -> None:
    found = parse_head(head("WWW-Authenticate: Basic|www-authenticate: Bearer x|X:  long|  value |Latin: \xe4"))
    assert found.headers["Www-Authenticate"] == "Basic, Bearer x"
    assert found.headers["x"] == "long value" and found.headers["latin"] == "\xe4"
    assert found.headers.get("absent") is None and "LATIN" in found.headers


@pytest.mark.parametrize(
    ("raw", "keeps"),
    [
        (head("A: b"), True),
        (head("Connection: Close"), False),
        (head("Connection: x, close"), False),
        (b"HTTP/1.0 200 OK", False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive", True),
    ],
)
def test_what_keeps_a_connection(raw: bytes, keeps: bool) -> None:
    assert parse_head(raw).keeps_open is keeps


def test_a_head_is_cut_off_and_bounded() -> None:
    assert split_head(b"HTTP/1.1 200 OK\r\nA: b\r\n") is None
    assert split_head(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\nbody") == (b"HTTP/1.1 200 OK\r\nA: b", b"body")
    with pytest.raises(BadMessage):
        split_head(b"HTTP/1.1 200 OK\r\nA: " + b"x" * MAX_HEAD_BYTES)


def test_a_request_is_what_it_says() -> None:
    raw = request_head("GET", "/v2/?a=b", {"Host": "h:1", "Accept": "*/*"})
    assert raw == b"GET /v2/?a=b HTTP/1.1\r\nHost: h:1\r\nAccept: */*\r\n\r\n"


@pytest.mark.parametrize(
    ("method", "target", "name", "value"),
    [
        ("GET", "/a b", "A", "b"),
        ("GET", "/\r\nX: y", "A", "b"),
        ("GE T", "/", "A", "b"),
        ("GET", "/", "A\r\nB", "c"),
        ("GET", "/", "A", "b\r\nC: d"),
        ("GET", "/", "A", "\xe4"),
        ("GET", "/", "A", "b\0"),
    ],
)
def test_nothing_is_smuggled_into_a_request(method: str, target: str, name: str, value: str) -> None:
    with pytest.raises(BadMessage):
        request_head(method, target, {name: value})
