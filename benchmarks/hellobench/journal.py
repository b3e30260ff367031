"""The file of results: JSON lines, appended as they are measured, so that a run that died goes on where it was."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.hellobench.lines import VERSION

_SAMPLE = ("workload", "link", "mode", "operation", "round")


class Journal:
    """A results file being written by one process. Every line carries the run that wrote it."""

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self._run = run
        self._samples: set[tuple[object, ...]] = set()
        self._images: set[object] = set()
        self._others: set[object] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._forget_half_a_line()
        with path.open() as lines:
            for line in lines:
                self._remember(json.loads(line))

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records, all or none of them."""
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        complete = [{**r, "version": VERSION, "run": self._run, "time": time} for r in records]
        text = "".join(json.dumps(record) + "\n" for record in complete)
        with self.path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        for record in complete:
            self._remember(record)

    def has_sample(self, workload: str, link: str, mode: str, operation: str, number: int) -> bool:
        """Whether a sample succeeded already."""
        return (workload, link, mode, operation, number) in self._samples

    def has_local(self, workload: str, number: int) -> bool:
        """Whether a sample of the start without fetching succeeded already, over whichever link."""
        return (workload, "local", number) in self._samples

    def has_image(self, workload: str) -> bool:
        """Whether an image's facts are known already."""
        return workload in self._images

    def has(self, record: str, *key: object) -> bool:
        """Whether there is a record of a kind other than these, by the fields that `_key` names."""
        return (record, *key) in self._others

    def _remember(self, record: Mapping[str, Any]) -> None:
        kind = record["record"]
        if kind == "sample":
            if record["ok"]:
                local = record["operation"] == "local"
                names = ("workload", "operation", "round") if local else _SAMPLE
                self._samples.add(tuple(record[name] for name in names))
        elif kind == "image":
            self._images.add(record["workload"])
        else:
            names = ("workload", "benchmark", "mode", "containers", "round")
            self._others.add((kind, *(record[name] for name in names if name in record)))

    def _forget_half_a_line(self) -> None:
        """What a killed run had begun to write when it died."""
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(self.path, data.rfind(b"\n") + 1)
