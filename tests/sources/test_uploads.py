"""Uploads of what is as large as a startup pack."""

from __future__ import annotations

import socket

import pytest
import trio

from lazyfs.errors import RemoteError
from lazyfs.sources.connections import Connections
from lazyfs.sources.http import HttpClient
from tests.sources.repositories import BLOB, DEADLINE_S


@pytest.mark.parametrize(("patience_s", "arrives"), [(0.5, True), (0.05, False)])
async def test_an_upload_may_take_its_time_but_not_stand_still(patience_s: float, arrives: bool) -> None:
    """A slow link takes a piece each 0.1 s: longer in all than the client's patience, or each piece longer."""
    data = BLOB * (1 + (3 << 20) // len(BLOB))
    received = 0

    async def slow(stream: trio.SocketStream) -> None:
        nonlocal received
        head, _, body = (await stream.receive_some(1 << 16)).partition(b"\r\n\r\n")
        assert b"content-length: %d\r\n" % len(data) in head.lower() + b"\r\n"
        received = len(body)
        while received < len(data):
            await trio.sleep(0.1)
            for _ in range(20):
                piece = await stream.receive_some(16 << 10)
                received += len(piece)
                if not piece or received == len(data):
                    break
        await stream.send_all(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")

    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)
            nursery.start_soon(trio.serve_listeners, slow, [listener])
            url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/"
            client = HttpClient(Connections(), patience_s=patience_s)
            if arrives:
                answer = await client.send("PUT", url, content=data, retry=False)
                assert answer.status == 201 and received == len(data)
            else:
                with pytest.raises(RemoteError, match="no answer in time"):
                    await client.send("PUT", url, content=data, retry=False)
            await client.aclose()
            nursery.cancel_scope.cancel()
