"""What passes a link is told apart by what was asked for, however the bytes were cut."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.hellobench.tally import Tally

DIGEST = "sha256:" + "0a" * 32
HEADS = [
    b"GET /v2/plain/python/manifests/latest HTTP/1.1\r\nHost: x\r\nAccept: application/json\r\n\r\n",
    f"GET /v2/plain/python/blobs/{DIGEST} HTTP/1.1\r\nHost: x\r\nRange: bytes=0-9\r\n\r\n".encode(),
    f"HEAD /v2/plain/python/blobs/{DIGEST} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    b"PUT /v2/plain/python/blobs/uploads/7?digest=" + DIGEST.encode() + b" HTTP/1.1\r\nHost: x\r\n\r\n",
]


@pytest.mark.parametrize("piece_bytes", [1, 7, 4096])
def test_each_answer_belongs_to_the_last_request(piece_bytes: int) -> None:
    blobs: Counter[str] = Counter()
    tally = Tally(blobs)
    for size, head in zip((100, 20, 3), HEADS, strict=False):
        for start in range(0, len(head), piece_bytes):
            tally.up(head[start : start + piece_bytes])
        tally.down(size)
    assert tally.requests == 3
    assert blobs == {"": 100, DIGEST: 23}


def test_the_body_of_an_upload_is_no_request() -> None:
    tally = Tally(Counter())
    tally.up(HEADS[3] + bytes(1 << 20))
    tally.up(b"\r\n\r\n GET / no line of a request\r\n" * 1000)
    assert tally.requests == 1
    tally.up(HEADS[1])
    assert (tally.requests, tally.asked) == (2, DIGEST)
