"""A fuse process over local files instead of an image in a registry, whose reads a test can disturb.

    python -m tests.daemon.localimage DIRECTORY CACHE RUNTIME STATUS_FD FAULT_FD

DIRECTORY has `namespace.erofs` and `data-0` and `data-1`. Layer 0 is always there. The other behaves as the
last word on FAULT_FD said: "present", "absent" (a read waits for "present"), "error", "bug", "short",
"group". Each word is answered by "ok" once it holds; "waiting N" when N reads wait; "freeze" stops the
whole process until the next word comes. Images "no-index" and "gone" cannot be opened.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from lazyfs.control.requests import Mount
from lazyfs.core.oci.digests import Digest
from lazyfs.daemon.fuseworker import OpenedImage, run
from lazyfs.errors import RemoteError
from lazyfs.images.documents import Missing
from lazyfs.tasks import open_nursery


class Disturbance:
    def __init__(self) -> None:
        self.mode = "present"
        self.waiting = 0
        self.changed = trio.Event()

    def change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def obey(self, connection: socket.socket) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
        number = connection.fileno()
        async with stream:
            while word := (await stream.receive_some(100)).decode():
                if word == "freeze":  # without a checkpoint, so before anything that just became ready
                    os.write(number, b"ok")
                    select.select([number], [], [])
                    continue
                if word.startswith("waiting "):
                    while self.waiting < int(word.split()[1]):
                        await self.changed.wait()
                else:
                    self.mode = word
                    self.change()
                await stream.send_all(b"ok")


class LocalLayer:
    def __init__(self, path: str, disturbance: Disturbance | None) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size_bytes = os.fstat(self._fd).st_size
        self._disturbance = disturbance

    def read_cached(self, address: int, size_bytes: int, /) -> bytes | None:
        if self._disturbance is None or self._disturbance.mode == "present":
            return os.pread(self._fd, size_bytes, address)
        return None

    async def read(self, address: int, size_bytes: int, /) -> bytes:
        state = self._disturbance
        assert state is not None
        if state.mode == "error":
            raise RemoteError("the registry is down", "start it")
        if state.mode == "bug":
            raise ZeroDivisionError("a bug")
        if state.mode == "group":
            raise ExceptionGroup("from a nursery", [RemoteError("the registry is down")])
        if state.mode == "short":
            return os.pread(self._fd, size_bytes - 1, address)
        state.waiting += 1
        state.change()
        try:
            while state.mode == "absent":
                await state.changed.wait()
        finally:
            state.waiting -= 1
        return os.pread(self._fd, size_bytes, address)


@dataclass
class LocalImage:
    reference: str
    manifest_digest: str
    namespace_path: str
    layers: Sequence[LocalLayer]
    index_place: str | None = None
    stale: str = ""

    def statistics(self) -> dict[str, Any]:
        return {}

    async def end_trace(self) -> int:
        return 7


def main() -> int:
    directory, cache, runtime, status_fd, fault_fd = sys.argv[1:]

    @contextlib.asynccontextmanager
    async def opener(_: str, request: Mount) -> AsyncIterator[OpenedImage | Missing]:
        if request.image == "no-index":
            yield Missing(Digest("sha256:" + 64 * "1"))
            return
        if request.image == "gone":
            raise RemoteError("the registry has no such image", "check the name")
        disturbance = Disturbance()
        layers = [LocalLayer(f"{directory}/data-0", None), LocalLayer(f"{directory}/data-1", disturbance)]
        async with open_nursery() as nursery:
            nursery.start_soon(disturbance.obey, socket.socket(fileno=int(fault_fd)))
            yield LocalImage(request.image, "sha256:" + 64 * "0", f"{directory}/namespace.erofs", layers)
            nursery.cancel_scope.cancel()

    return run(cache, runtime, int(status_fd), opener)


if __name__ == "__main__":
    sys.exit(main())
