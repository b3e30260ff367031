"""A worker for the keeper's tests: serves CACHE/data as one device, and mounts CACHE/meta.erofs on it.

CACHE/device.json: {"root": content root, "miss": share of reads that wait like one over the network}. On the
control socket it answers one line: "pid" with its process id, "mount" with ok and a clone of the EROFS mount,
"let go", "crash" by exit code 3.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import trio

from lazyfs.daemon.handover import EXIT_ENDED, EXIT_SUCCESSOR
from lazyfs.daemon.keeperlink import KeeperLink
from lazyfs.fuse.device import Device
from lazyfs.fuse.devices import DeviceServer, node_of
from lazyfs.system.detached import clone_mount, erofs_mount_detached
from lazyfs.system.sockets import send_fds


class LocalFile:
    """A device that answers from a file, sometimes only after a while."""

    def __init__(self, path: Path, content_root: str, miss: float) -> None:
        self.content_root = content_root
        self.size_bytes = path.stat().st_size
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._miss = miss

    def read_cached(self, address: int, size: int) -> bytes | None:
        return None if random.random() < self._miss else os.pread(self._fd, size, address)

    async def read(self, address: int, size: int) -> bytes:
        await trio.sleep(random.random() * 0.05)  # a fetch over the network
        return os.pread(self._fd, size, address)


class OneDevice:
    def __init__(self, device: LocalFile) -> None:
        self._device = device

    def by_name(self, content_root: bytes) -> Device | None:
        return self._device if content_root.decode() == self._device.content_root else None

    def by_node(self, nodeid: int) -> Device | None:
        return self._device if nodeid == node_of(self._device.content_root) else None

    def names(self) -> Sequence[str]:
        return [self._device.content_root]


def _mount(link: KeeperLink, cache: Path, content_root: str) -> None:
    link.hold(
        "erofs",
        erofs_mount_detached(str(cache / "meta.erofs"), [f"/proc/self/fd/{link.mount_fd}/{content_root}"]),
    )


async def _control(link: KeeperLink, server: DeviceServer, cache: Path, content_root: str) -> None:
    assert link.listen_fd is not None
    listener = trio.socket.from_stdlib_socket(socket.socket(fileno=os.dup(link.listen_fd)))
    while True:
        connection, _ = await listener.accept()
        with connection:
            word = (await connection.recv(64)).decode().strip()
            if word == "pid":
                await connection.send(str(os.getpid()).encode())
            elif word == "mount":
                if "erofs" not in link.held:
                    await trio.to_thread.run_sync(_mount, link, cache, content_root)
                clone_fd = clone_mount(link.held["erofs"])
                with socket.socket(fileno=os.dup(connection.fileno())) as plain:
                    send_fds(plain, b"ok", [clone_fd])
                os.close(clone_fd)
            elif word == "let go":
                server.release_mount()
                link.let_go()
                listener.close()
                await connection.send(b"ok")
                return
            elif word == "crash":
                os._exit(3)


async def _main(cache: Path) -> int:
    described = json.loads((cache / "device.json").read_text())
    if described.get("broken"):
        return 3
    link = KeeperLink.from_environment()
    device = LocalFile(cache / "data", described["root"], described["miss"])
    server = DeviceServer(link.fuse_fd, OneDevice(device), link.mount_fd)
    ended = False
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def drain_on_signal() -> None:
                async for _ in signals:
                    await server.drain(10)

            nursery.start_soon(drain_on_signal)
            if link.listen_fd is not None:
                nursery.start_soon(_control, link, server, cache, described["root"])
            ended = await server.run()
            nursery.cancel_scope.cancel()
    return EXIT_ENDED if ended else EXIT_SUCCESSOR


if __name__ == "__main__":
    arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    os._exit(trio.run(_main, Path(arguments["--cache"])))
