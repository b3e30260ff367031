"""A results file of HelloBench as a test needs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.hellobench import summary
from benchmarks.hellobench.summary import DEPLOYMENT


class File:
    """A results file in the making."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("")

    def add(self, record: str, **fields: Any) -> None:
        line = {"record": record, "version": 1, "run": "a", "time": "2026-01-02T03:04:05Z"} | fields
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def image(self, workload: str, kind: str = "E", **fields: Any) -> None:
        sizes = {"compressed_bytes": 50_000_000, "tar_bytes": 120_000_000, "files": 900, "packages": {}}
        needed = {"needed_bytes": 25_000_000, "needed_compressed_bytes": 10_000_000}
        layers = [
            {"compressed_bytes": 50_000_000, "tar_bytes": 120_000_000, "read_bytes": 25_000_000},
            {"compressed_bytes": 100, "tar_bytes": 0, "read_bytes": 0},
        ]
        image = {"workload": workload, "category": "language", "kind": kind, "fat": False, "layers": layers}
        self.add("image", **(image | sizes | needed | fields))

    def sample(self, mode: str, total_s: float | None, round_number: int = 0, **fields: Any) -> None:
        times = {"push_s": None, "pull_s": 0.25, "create_s": 0.05, "run_s": 1.0, "total_s": total_s}
        names = {"workload": "python", "link": "wan", "operation": DEPLOYMENT, "state": "cold"}
        outcome = {"ok": total_s is not None, "error": None, "round": round_number, "mode": mode}
        self.add("sample", **(names | times | outcome | fields))

    def load(self) -> summary.Results:
        return summary.load(self.path)
