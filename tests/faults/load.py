"""Several reader processes at once, and a cache that keeps losing blocks."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.faults.world import World

READER = Path(__file__).with_name("reader.py")
_END_DEADLINE_S = 60


def write_truth(world: World, directory: Path) -> Path:
    for path, content in world.truth.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    return directory


@contextmanager
def readers(
    world: World, target: Path, truth: Path, seed: int, *, number: int = 3, prefix: Sequence[str] = ()
) -> Iterator[list[subprocess.Popen[str]]]:
    """`number` readers while the block lasts; afterwards each must have read something, and all of it right.
    `prefix`: a command to start them by."""
    processes = []
    try:
        for one in range(number):
            command = [*prefix, sys.executable, "-S", str(READER), str(target), str(truth), str(seed + one)]
            process = subprocess.Popen([*command, *world.truth], stdout=subprocess.PIPE, text=True)
            processes.append(process)
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
        yield processes
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            report = json.loads(process.communicate(timeout=_END_DEADLINE_S)[0])
            assert report["reads"] > 0, "a reader read nothing"
            assert (report["wrong"], report["errors"]) == ([], []), f"seed {seed}: {report}"
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def lose_blocks(cache: Path, rng: random.Random, share: float) -> None:
    """Marks a share of all blocks absent, as a torn write would."""
    for present in (cache / "layers").glob("*/present"):
        with present.open("r+b", buffering=0) as file:
            for position in range(0, os.fstat(file.fileno()).st_size, 8):
                if rng.random() < share:
                    os.pwrite(file.fileno(), bytes(8), position)
