"""Makes the windows of entry points sparse while the pass over a gzip layer goes on.

A large layer gets a process for it, because most of the work is Python and would hold up the pass (101 MB/s of tar;
with a thread 90).

The process reads jobs and writes the resulting windows. It ends when its input ends, so a killed parent leaves
nothing behind. If the process is killed or stopped, the parent goes on with the work.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

from lazyfs.core.layer import deflate
from lazyfs.core.layer.deflate import WINDOW_BYTES
from lazyfs.decoding.zstream import DeflateError, ZStream
from lazyfs.system.process import environment, python_command

# So much of the blob behind an entry point is kept. It decodes to 32 KiB; if it does not, the window stays whole.
PROBE_BYTES = 128 * 1024
# With so many windows (a layer of some 10 MB) a process is worth its start.
_PROCESS_FROM = 16
_JOB = struct.Struct("=BII")  # shift, length of the window, length of the blob behind
_PIPE_BYTES = 256 * 1024  # a whole job fits
_ANSWER_S = 10.0  # a window takes milliseconds: a process that is so late was stopped


def trim(stream: ZStream, shift: int, window: bytes, behind: bytes) -> bytes:
    """The window with those bytes zeroed to which `behind`, the blob from the entry point on, does not refer."""
    if not behind:
        return window
    entered = deflate.entered(shift, behind)
    try:
        plain, complete = stream.decode(entered, window, WINDOW_BYTES)
        if not complete:
            return window
        high, low = (stream.decode(entered, probe, WINDOW_BYTES)[0] for probe in deflate.probes())
        sparse = deflate.sparse_window(window, high, low)
        # A cheap check against the worst that a wrong window could do: make a span undecodable for ever.
        return sparse if stream.decode(entered, sparse, WINDOW_BYTES)[0] == plain else window
    except DeflateError:
        return window


class WindowTrimmer:
    """Trims the windows of one layer, in order. The caller closes it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "windows")
        self._closing = False
        # Only the pool's thread touches these.
        self._stream = ZStream(raw=True)
        self._jobs = 0
        self._process: subprocess.Popen[bytes] | None = None

    def submit(self, shift: int, window: bytes, behind: bytes) -> Future[bytes]:
        """As `trim`, later."""
        return self._pool.submit(self._trim, shift, window, behind)

    def close(self) -> None:
        """Drops unfinished work and ends thread and process, which takes milliseconds. May be called twice.

        Never call it in a finalizer: that may run while its thread holds a lock of concurrent.futures.
        """
        if not self._closing:
            self._closing = True
            self._pool.submit(self._end)
        self._pool.shutdown(wait=True)

    def _trim(self, shift: int, window: bytes, behind: bytes) -> bytes:
        if self._closing:
            return window
        self._jobs += 1
        if self._jobs == _PROCESS_FROM:
            with contextlib.suppress(OSError):
                self._process = _start()
        if self._process is not None:
            try:
                return _ask(self._process, shift, window, behind)
            except OSError:
                self._end()
        return trim(self._stream, shift, window, behind)

    def _end(self) -> None:
        if self._process is None:
            return
        with self._process as process:
            process.kill()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        self._process = None


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        python_command("lazyfs.decoding.trimming"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(),
        pipesize=_PIPE_BYTES,
    )


def _ask(process: subprocess.Popen[bytes], shift: int, window: bytes, behind: bytes) -> bytes:
    """Raises OSError if the process has died or does not answer in time."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(_JOB.pack(shift, len(window), len(behind)))
    process.stdin.write(window)
    process.stdin.write(behind)
    process.stdin.flush()
    answer = bytearray()
    answers = select.poll()
    answers.register(process.stdout, select.POLLIN)
    deadline_s = time.monotonic() + _ANSWER_S
    while len(answer) < len(window):
        if not answers.poll(max(0, deadline_s - time.monotonic()) * 1000):
            raise TimeoutError
        piece = os.read(process.stdout.fileno(), len(window) - len(answer))
        if not piece:
            raise BrokenPipeError
        answer += piece
    return bytes(answer)


def _serve(jobs: IO[bytes], windows: IO[bytes]) -> None:
    stream = ZStream(raw=True)
    while header := jobs.read(_JOB.size):
        shift, window_bytes, behind_bytes = _JOB.unpack(header)
        windows.write(trim(stream, shift, jobs.read(window_bytes), jobs.read(behind_bytes)))
        windows.flush()


def main() -> None:
    """The process: takes jobs from standard input, writes windows to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the parent, too, which decides
    os.chdir("/")
    with contextlib.suppress(BrokenPipeError, struct.error):  # the parent is gone
        _serve(sys.stdin.buffer, sys.stdout.buffer)
    os._exit(0)


if __name__ == "__main__":
    main()
