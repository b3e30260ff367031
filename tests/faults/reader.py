"""A process that reads random pieces of random files below TARGET and compares them with those below TRUTH.

    python -S reader.py TARGET TRUTH SEED PATH...

It goes on until SIGTERM and then prints {"reads", "bytes", "wrong": [...], "errors": [...]} as JSON. Pages
are dropped from the page cache once read, so that reading them again asks the daemon again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys

_KEPT = 20  # of each kind of failure


def main() -> None:
    target, truth, seed, *paths = sys.argv[1:]
    going = [True]
    signal.signal(signal.SIGTERM, lambda *_: going.clear())
    rng = random.Random(int(seed))
    reads = size_bytes = 0
    wrong: list[str] = []
    errors: list[str] = []
    print("started", flush=True)
    while going:
        path = rng.choice(paths)
        with open(os.path.join(truth, path), "rb") as file:
            expected = file.read()
        start = rng.choice((0, 0, rng.randrange(len(expected) or 1)))
        end = rng.choice((len(expected), rng.randint(start, len(expected))))
        try:
            descriptor = os.open(os.path.join(target, path), os.O_RDONLY)
            try:
                pieces = []
                at = start
                while at < end and (piece := os.pread(descriptor, end - at, at)):
                    pieces.append(piece)
                    at += len(piece)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        except OSError as error:
            errors.append(f"{path} {start}-{end}: {error}")
            continue
        reads += 1
        size_bytes += end - start
        if b"".join(pieces) != expected[start:end]:
            wrong.append(f"{path} {start}-{end}")
    report = {"reads": reads, "bytes": size_bytes, "wrong": wrong[:_KEPT], "errors": errors[:_KEPT]}
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
