"""The benchmark itself: two workloads, containerd, and lazyfs with a pack, a profile or neither, one sample each,
killed half-way and run again.

The images are real and built here if they are not yet (about a minute on a new machine).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKLOADS = ("busybox", "redis")
# Each with its operations.
MODES = {
    "ctr": ("deployment", "second", "development"),
    "lazyfs": ("deployment", "second", "development"),
    "lazyfs-pack": ("deployment", "second"),
    "lazyfs-profile": ("deployment",),
}
DEADLINE_S = 400.0


def command(results: Path) -> list[str]:
    words = [sys.executable, "-m", "benchmarks.hellobench", "run", "--samples", "1", "--results", str(results)]
    for workload in WORKLOADS:
        words += ["--workload", workload]
    for mode in MODES:
        words += ["--mode", mode]
    return words


def lines(results: Path) -> list[dict[str, Any]]:
    """The whole lines so far."""
    text = results.read_text() if results.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def samples(results: Path) -> list[tuple[str, str, str]]:
    found = [record for record in lines(results) if record["record"] == "sample"]
    assert [record["error"] for record in found if not record["ok"]] == []
    return sorted((r["workload"], r["mode"], r["operation"]) for r in found)


def traces(place: Path) -> set[str]:
    """What a run could leave on the host: mounts and files below its place, and processes that name it."""
    mounts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    left = {point for point in mounts if point.startswith(f"{place}/")}
    left |= {str(path) for path in place.iterdir()}
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = process.read_bytes()
            if os.fsencode(place) in words:
                left.add(words.decode(errors="replace"))
    return left


@pytest.fixture
def place() -> Iterator[Path]:
    """Where runs make their work directories. A short path: containerd's sockets lie below."""
    with tempfile.TemporaryDirectory(prefix="lazyfs-hb-", dir="/var/tmp") as directory:
        yield Path(directory)


@pytest.mark.timeout(2 * DEADLINE_S)
def test_a_run_that_is_killed_half_way_goes_on_where_it_was(tmp_path: Path, place: Path) -> None:
    results = tmp_path / "results.jsonl"
    environment = os.environ | {"LAZYFS_BENCH_DIRECTORY": str(place)}
    killed = subprocess.Popen(
        command(results), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + DEADLINE_S
        # The first workload is done, and the second one has begun.
        while not any(record["record"] == "image" and record["workload"] == WORKLOADS[1] for record in lines(results)):
            assert killed.poll() is None, "it ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    first = lines(results)
    # As if it had been killed within a line.
    with results.open("a") as file:
        file.write('{"record": "sam')

    done = subprocess.run(
        command(results), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    local = [(workload, "local", "local") for workload in WORKLOADS]
    pairs = [(w, mode, operation) for w in WORKLOADS for mode in MODES for operation in MODES[mode]]
    assert samples(results) == sorted(local + pairs)
    assert lines(results)[: len(first)] == first
    assert [record["workload"] for record in lines(results) if record["record"] == "image"] == list(WORKLOADS)
    # kill -9 leaves nothing but the files, which the second run has removed, too.
    assert traces(place) == set()

    check(lines(results))
    report(results, tmp_path / "report")


def check(records: list[dict[str, Any]]) -> None:
    """What was measured makes sense."""
    images = {record["workload"]: record for record in records if record["record"] == "image"}
    for image in images.values():
        assert 0 < image["needed_compressed_bytes"] <= image["needed_bytes"] <= image["tar_bytes"]
        assert sum(layer["compressed_bytes"] for layer in image["layers"]) == image["compressed_bytes"]
    assert images["redis"]["packages"]["redis-server"]
    packs = {record["workload"]: record for record in records if record["record"] == "pack"}
    assert packs["busybox"]["pack_bytes"] > 0  # of an image of one file, which a start reads
    assert 0 < packs["redis"]["pack_bytes"] < images["redis"]["compressed_bytes"] / 2
    for sample in (record for record in records if record["record"] == "sample"):
        steps = [sample[step] for step in ("push_s", "pull_s", "create_s", "run_s") if sample[step] is not None]
        assert sample["total_s"] == pytest.approx(sum(steps))
        assert (sample["push_s"] is not None) == (sample["operation"] == "development")
        if (sample["mode"], sample["operation"]) == ("lazyfs", "deployment"):
            image = images[sample["workload"]]
            documents_bytes = 20_000
            assert 0 < sample["bytes_fetched"] <= image["compressed_bytes"] + image["index_bytes"] + documents_bytes
        if (sample["mode"], sample["operation"]) == ("lazyfs", "second"):
            assert sample["bytes_fetched"] == 0


def report(results: Path, directory: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.hellobench", "report", "--results", str(results)]
    subprocess.run([*words, "--output", str(directory)], cwd=ROOT, check=True, timeout=DEADLINE_S)
    text = (directory / "report.md").read_text()
    assert "busybox" in text
    assert "redis" in text
    assert list(directory.glob("*.png"))


def test_it_says_that_it_needs_root(tmp_path: Path) -> None:
    words = ["setpriv", "--reuid=65534", "--clear-groups", *command(tmp_path / "none")]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "root" in done.stderr
    assert "Traceback" not in done.stderr
