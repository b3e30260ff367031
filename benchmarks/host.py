"""The host's side of a measurement: a work directory on ext4, cold caches, private containerd, clean-up."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

COMMAND_DEADLINE_S = 600.0
READY_DEADLINE_S = 30.0
LOOP_BYTES = 8 << 30
# On a disk, unlike /tmp on many hosts.
WORK_ROOT, WORK_PREFIX = os.environ.get("LAZYFS_BENCH_DIRECTORY", "/var/tmp"), "lazyfs-bench-"


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Run a command, give its standard output; RuntimeError with its messages if it fails."""
    words = [str(word) for word in command]
    result = subprocess.run(
        words, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S
    )
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: exit {result.returncode}\n{result.stderr[-4000:]}")
    return result.stdout


def now() -> float:
    """Seconds of a clock that only goes forward."""
    return time.perf_counter()


def timed(*command: str | Path, env: dict[str, str] | None = None) -> float:
    """Seconds that a command takes."""
    started = time.perf_counter()
    run(*command, env=env)
    return time.perf_counter() - started


def drop_page_cache() -> None:
    """Write back and forget all clean pages, dentries and inodes (proc(5), drop_caches).

    Needed before whatever makes many files on ext4: it does not take inodes again that were deleted within the last
    minutes, and as long as it has their tables in memory it looks at each. Measured: 10,000 empty files in 0.28 s;
    after as many were deleted, 9 s; a `ctr image pull` of 108 MB in 3 s; after another was removed, 6 to 11 s.
    """
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def file_system(path: Path) -> str:
    return run("findmnt", "-n", "-o", "FSTYPE", "-T", path).strip()


@contextlib.contextmanager
def work_directory() -> Iterator[Path]:
    """An empty directory on ext4 for both sides of every comparison: the disk's own, or a loop device's.

    Whatever is still mounted below is unmounted at the end, also after an error.
    """
    # SIGTERM as an exception, so that everything below here is undone then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    directory = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=WORK_ROOT))
    directory.chmod(0o711)  # containers of user namespaces pass through
    # Locked as long as it is in use: others can tell it from what a killed run has left.
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        if file_system(directory) == "ext4":
            yield directory
        else:
            image, mountpoint = directory / "ext4.img", directory / "ext4"
            with image.open("wb") as file:
                file.truncate(LOOP_BYTES)
            mountpoint.mkdir()
            run("mkfs.ext4", "-q", "-F", image)
            run("mount", "-o", "loop", image, mountpoint)
            yield mountpoint
    finally:
        os.close(lock)
        unmount_below(directory)
        # --one-file-system: if something could not be unmounted, its files are not ours to delete.
        run("rm", "-rf", "--one-file-system", directory)


def unmount_below(directory: Path) -> None:
    """Unmount, innermost first, everything mounted at or below a directory."""
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    points = [line.split()[4] for line in lines]
    for point in reversed([p for p in points if Path(p).is_relative_to(directory)]):
        subprocess.run(["umount", "-l", "--", point], check=False, timeout=COMMAND_DEADLINE_S)


class Containerd:
    """A containerd with its own root, state and socket, to time `ctr image pull`: download and unpack."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "containerd.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Containerd:
        self.directory.mkdir()
        config = self.directory / "config.toml"
        config.write_text(
            'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n'
            f'root = "{self.directory}/root"\nstate = "{self.directory}/state"\n'
            f'[grpc]\naddress = "{self.socket}"\n[debug]\naddress = "{self.directory}/debug.sock"\n'
        )
        log = (self.directory / "log").open("wb")
        self._process = subprocess.Popen(["containerd", "-c", str(config)], stdout=log, stderr=log)
        log.close()
        deadline = time.monotonic() + READY_DEADLINE_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                text = (self.directory / "log").read_text()
                self.__exit__()
                raise RuntimeError(f"containerd did not start:\n{text[-4000:]}")
            select.select([], [], [], 0.05)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(READY_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        unmount_below(self.directory)

    def pull(self, reference: str) -> float:
        """Seconds of a full pull with overlayfs snapshots."""
        return timed(*self.ctr("image", "pull", "--plain-http", "--snapshotter", "overlayfs", reference))

    def run_container(self, reference: str, name: str, *command: str) -> str:
        """Standard output of a command in a new container that is removed afterwards; on the host's network, as
        lazyfs' containers are."""
        words = ("run", "--rm", "--net-host", "--snapshotter", "overlayfs", reference, name, *command)
        return run(*self.ctr(*words))

    def remove(self, reference: str) -> None:
        """Remove an image, and wait until its layers are gone unless another image has them."""
        run(*self.ctr("image", "rm", "--sync", reference))

    def ctr(self, *arguments: str) -> Sequence[str]:
        """The command line of `ctr` for this containerd."""
        return ["ctr", "--address", str(self.socket), *arguments]

    def _answers(self) -> bool:
        result = subprocess.run(self.ctr("version"), capture_output=True, timeout=READY_DEADLINE_S)
        return result.returncode == 0
