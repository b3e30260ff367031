"""Makes the windows of entry points sparse, beside the pass over a gzip layer.

For a large layer in a process of its own: most of this work is Python, and would hold up the pass. Measured on 2 cores,
a layer of 309 MB, medians of 7 in turn: 101 MB/s of tar with the process, 90 with a thread.

The process reads jobs and writes the windows that come of them. It ends with its input, so a parent that is killed
leaves nothing behind; if it is killed or stopped itself, the work goes on in the parent.
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

# Of the blob behind an entry point: enough to decode 32 KiB, but for freak streams (then the window stays whole).
PROBE_BYTES = 128 * 1024
# From so many windows on (a layer of some 10 MB) a process is worth its start.
_PROCESS_FROM = 16
_JOB = struct.Struct("=BII")  # shift, length of the window, length of the blob behind
_PIPE_BYTES = 256 * 1024  # a job fits in
_ANSWER_S = 10.0  # a window takes milliseconds; who is that late was stopped


def thin(stream: ZStream, shift: int, window: bytes, behind: bytes) -> bytes:
    """The window without the bytes that `behind` (the blob from the entry point on) does not refer to."""
    if not behind:
        return window
    entered = deflate.entered(shift, behind)
    try:
        plain, complete = stream.decode(entered, window, WINDOW_BYTES)
        if not complete:
            return window
        high, low = (stream.decode(entered, probe, WINDOW_BYTES)[0] for probe in deflate.probes())
        sparse = deflate.sparse_window(window, high, low)
        # Cheap, and the only thing a wrong window could do is make a span undecodable for ever.
        return sparse if stream.decode(entered, sparse, WINDOW_BYTES)[0] == plain else window
    except DeflateError:
        return window


class Thinner:
    """Thins the windows of one layer, in order. Close it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "windows")
        self._closing = False
        # Only the pool's thread touches these.
        self._stream = ZStream(raw=True)
        self._jobs = 0
        self._process: subprocess.Popen[bytes] | None = None

    def submit(self, shift: int, window: bytes, behind: bytes) -> Future[bytes]:
        """As `thin`, some time later."""
        return self._pool.submit(self._thin, shift, window, behind)

    def close(self) -> None:
        """Drops what is not done yet, and ends thread and process, which takes milliseconds. May be called twice.

        Not for finalizers: one may run while its thread holds a lock of concurrent.futures.
        """
        if not self._closing:
            self._closing = True
            self._pool.submit(self._end)
        self._pool.shutdown(wait=True)

    def _thin(self, shift: int, window: bytes, behind: bytes) -> bytes:
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
        return thin(self._stream, shift, window, behind)

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
        python_command("lazyfs.decoding.thinning"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(),
        pipesize=_PIPE_BYTES,
    )


def _ask(process: subprocess.Popen[bytes], shift: int, window: bytes, behind: bytes) -> bytes:
    """Raises OSError: it has died, or does not answer in time."""
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
        windows.write(thin(stream, shift, jobs.read(window_bytes), jobs.read(behind_bytes)))
        windows.flush()


def main() -> None:
    """The process: jobs from standard input, windows to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to both: the parent decides
    os.chdir("/")
    with contextlib.suppress(BrokenPipeError, struct.error):  # the parent has gone
        _serve(sys.stdin.buffer, sys.stdout.buffer)
    os._exit(0)


if __name__ == "__main__":
    main()
