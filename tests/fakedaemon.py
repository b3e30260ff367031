"""A stand-in for lazyfs.daemon.keeper and lazyfs.daemon.fuseworker: a real process that speaks the control protocol.

    fakedaemon.py lazyfs.daemon.keeper --cache DIR --runtime DIR
    fakedaemon.py lazyfs.daemon.fuseworker --cache DIR --runtime DIR --status-fd N -- IMAGE TARGET

It hands out mounts of the EROFS image CACHE/indexes/fake/namespace.erofs, which the test has made. The image
name says how it behaves:  indexed | unindexed | broken | hostproblem | diskfull | dies | dies-once | leaves
What it was asked and told is appended to CACHE/said, a JSON line each.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import sys
import threading
from pathlib import Path

from lazyfs.control import messages, replies, requests
from lazyfs.errors import HostError, RemoteError, Unsupported
from lazyfs.system.detached import attach, clone_mount, erofs_mount_detached
from lazyfs.system.mountapi import MNT_DETACH, umount2
from lazyfs.system.mountinfo import mounts

DIGEST = "sha256:" + "ab" * 32


class Fake:
    def __init__(self, cache: Path, runtime: Path, backend: str) -> None:
        self.cache = cache
        self.runtime = runtime
        self.backend = backend
        self.lock = threading.Lock()
        self.mount_fd: int | None = None
        self.image = ""
        self.targets: list[dict[str, object]] = []

    def say(self, **fields: object) -> None:
        with self.lock, open(self.cache / "said", "a", encoding="utf-8") as file:
            file.write(json.dumps({"backend": self.backend, "pid": os.getpid(), **fields}) + "\n")

    def root(self) -> int:
        if self.mount_fd is None:
            self.mount_fd = erofs_mount_detached(str(self.cache / "indexes/fake/namespace.erofs"), [])
        return self.mount_fd

    def dev(self) -> str:
        device = os.fstat(self.root()).st_dev
        return f"{os.major(device)}:{os.minor(device)}"

    def entry(self) -> dict[str, object]:
        here = {f"{entry.dev[0]}:{entry.dev[1]}" for entry in mounts()}
        targets = [target for target in self.targets if target["dev"] in here]
        return {
            "dev": self.dev(),
            "image": self.image,
            "manifest_digest": DIGEST,
            "backend": self.backend,
            "platform": None,
            "targets": targets,
        }

    def serve(self, connection: socket.socket) -> None:
        lines = messages.LineBuffer()
        with connection:
            while True:
                while (line := lines.next_line()) is None:
                    data = connection.recv(65536)
                    if not data:
                        return
                    lines.feed(data)
                self.answer(connection, line)

    def answer(self, connection: socket.socket, line: bytes) -> None:
        message = messages.decode(line)
        request = requests.parse_request(line)
        if isinstance(request, requests.Attached):
            self.targets.append(message["attached"])
            self.say(attached=message["attached"], op="attached")
            connection.sendall(replies.ok())
        elif isinstance(request, requests.Mount):
            self.mount(connection, "lease", request, None)
        elif isinstance(request, requests.FuseMount):
            self.mount(connection, "fuse_mount", request.mount, request.target)
        else:
            self.say(op=requests.op_of(request))
            self.answer_about(connection, request)

    def answer_about(self, connection: socket.socket, request: requests.Request) -> None:
        if isinstance(request, requests.List):
            entries = [self.entry()] if self.mount_fd is not None else []
            connection.sendall(replies.ok(cache=str(self.cache), mounts=entries))
        elif isinstance(request, requests.Stats):
            known = {self.dev(), *(target["dev"] for target in self.targets)}
            if messages.format_dev(request.dev) in known:
                connection.sendall(replies.ok(image=self.image, bytes_fetched=1234567, requests=3))
            else:
                connection.sendall(replies.failure(HostError("not mine")))
        elif isinstance(request, requests.Stop):
            connection.sendall(replies.ok())
            os._exit(0)
        else:
            connection.sendall(replies.ok())

    def mount(self, connection: socket.socket, op: str, request: requests.Mount, place: str | None) -> None:
        self.say(op=op, image=request.image, timeout_s=request.timeout_s)
        name = request.image.rpartition("/")[2].partition(":")[0]
        if name == "broken":
            connection.sendall(replies.failure(RemoteError("registry.test answers 503", "try later")))
            return
        if name == "hostproblem" and op == "lease":
            connection.sendall(replies.failure(Unsupported("no EROFS from files here")))
            return
        if name == "diskfull":
            connection.sendall(replies.failure(HostError("no space left on the cache's disk")))
            return
        if name == "dies" or (name == "dies-once" and not (self.cache / "died").exists()):
            (self.cache / "died").touch()
            print("something terrible happened", file=sys.stderr, flush=True)
            os._exit(3)
        if name == "unindexed" and not (self.cache / "built").exists():
            connection.sendall(replies.needs_index(DIGEST))
            return
        joined = bool(self.targets)
        self.image = request.image if ":" in request.image else f"docker.io/library/{request.image}:latest"
        connection.sendall(replies.progress("reading the index"))
        clone_fd = clone_mount(self.root())
        fields = {"image": self.image, "manifest_digest": DIGEST, "joined": joined}
        if place is None:
            socket.send_fds(connection, [replies.ok(**fields)], [clone_fd])
            os.close(clone_fd)
            return
        attach(clone_fd, place)
        os.close(clone_fd)
        connection.sendall(replies.ok(**fields))

    def listen(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(16)
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self.serve, args=[connection], daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--runtime", type=Path, required=True)
    parser.add_argument("--status-fd", type=int)
    arguments, _, words = " ".join(sys.argv[1:]).partition(" -- ")
    args = parser.parse_args(arguments.split(" "))
    place = words.rpartition(" ")[2]
    if args.module == "lazyfs.daemon.keeper":
        if (args.cache / "nokeeper").exists():
            sys.exit("no keeper today")
        Fake(args.cache, args.runtime, "kernel").listen(args.runtime / "control.sock")
    fake = Fake(args.cache, args.runtime, "fuse")
    socket_path = args.runtime / f"fuse-{os.getpid()}.sock"
    threading.Thread(target=fake.listen, args=[socket_path], daemon=True).start()
    fake.serve(socket.socket(fileno=args.status_fd))
    if not fake.targets:  # the client gave up
        for entry in mounts():
            if entry.mountpoint == place:
                umount2(entry.mountpoint, MNT_DETACH)
    else:  # until the last mount has gone, as a FUSE process does
        with open("/proc/self/mountinfo", "rb") as table:
            poll = select.poll()
            poll.register(table, select.POLLPRI)
            own = tuple(map(int, fake.dev().split(":")))
            known = {own, *(tuple(map(int, str(target["dev"]).split(":"))) for target in fake.targets)}
            while any(entry.dev in known for entry in mounts()):
                poll.poll(200)
                known |= {tuple(map(int, str(target["dev"]).split(":"))) for target in fake.targets}
    socket_path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
