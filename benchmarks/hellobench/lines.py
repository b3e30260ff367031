"""The lines of a results file as typed records: one JSON object a line, version 1.

Appended as they are measured, so that a run that dies loses one line at most: a last line without its newline that
is no JSON is ignored. Everything else that is wrong is an error that names the line, because a report that
leaves out what it cannot read would claim more than was measured.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

VERSION = 1


class ResultsError(ValueError):
    """A results file that cannot be read; the message says which line, and why."""


@dataclass(frozen=True)
class Host:
    """Who measured: `machine` is name -> version or size, as written."""

    machine: Mapping[str, Any]
    run: str = ""
    time: str = ""


@dataclass(frozen=True)
class Link:
    """A link as set (`nominal_…`, None: not limited) and as a plain download found it."""

    link: str
    bytes_s: float
    rtt_s: float
    nominal_bits_s: float | None = None
    nominal_rtt_s: float | None = None


@dataclass(frozen=True)
class Layer:
    """`read_bytes`: of its file data, those a start touches."""

    compressed_bytes: float
    tar_bytes: float
    read_bytes: float = 0


@dataclass(frozen=True)
class Image:
    """`layers`: the bottom one first. `needed_bytes`: file pages that a start touches; `needed_compressed_bytes`:
    the same, as gzip makes them."""

    workload: str
    category: str
    kind: str
    compressed_bytes: float
    needed_compressed_bytes: float
    needed_bytes: float
    tar_bytes: float
    layers: tuple[Layer, ...] = ()
    fat: bool = False
    files: float | None = None


@dataclass(frozen=True)
class Sample:
    """One operation of one mode on one workload over one link. `total_s`: the sum of the phases that belong to
    the operation; None where it failed. `link_…`: what the link had counted when the container was ready, of all
    blobs and documents; `link_index_bytes` of the index alone. The others are the daemon's counts afterwards."""

    workload: str
    link: str
    mode: str
    operation: str
    round: int
    ok: bool
    run: str = ""
    state: str | None = None
    error: str | None = None
    push_s: float | None = None
    pull_s: float | None = None
    create_s: float | None = None
    run_s: float | None = None
    total_s: float | None = None
    bytes_fetched: float | None = None
    requests: float | None = None
    bytes_read: float | None = None
    daemon_cpu_s: float | None = None
    daemon_memory_bytes: float | None = None
    link_bytes: float | None = None
    link_requests: float | None = None
    link_index_bytes: float | None = None

    @property
    def data_bytes(self) -> float | None:
        """What came over the link without the index."""
        if self.link_bytes is None or self.link_index_bytes is None:
            return None
        return self.link_bytes - self.link_index_bytes

    @property
    def cpu_s_per_request(self) -> float | None:
        return self.daemon_cpu_s / self.requests if self.daemon_cpu_s is not None and self.requests else None


@dataclass(frozen=True)
class Pack:
    """A startup pack in the registry. `record_s`: of `lazyfs record`, its start and its push included."""

    workload: str
    pack_bytes: float
    record_s: float | None = None


@dataclass(frozen=True)
class Warm:
    """A container with everything in memory: `lazyfs run`, and mount, runc and umount by hand."""

    workload: str
    round: int
    run_s: float
    by_hand_s: float


@dataclass(frozen=True)
class Pages:
    """Memory of the host for `containers` of one image; `memory_bytes`: the daemon's proportional share."""

    workload: str
    mode: str
    containers: int
    page_cache_bytes: float
    memory_bytes: float | None = None


@dataclass(frozen=True)
class Whole:
    """All files of an image read from cold: mount and read, or pull, unpack and read."""

    workload: str
    mode: str
    round: int
    seconds: float
    bytes: float | None = None
    run: str = ""


@dataclass(frozen=True)
class Throughput:
    """`points`: (seconds since the load began, operations/s). `first_s`: from the start of the container to the
    first answer."""

    benchmark: str
    mode: str
    round: int
    mean_per_s: float
    first_s: float | None = None
    points: tuple[tuple[float, float], ...] = ()
    run: str = ""


Record = Host | Link | Image | Sample | Pack | Warm | Pages | Whole | Throughput
KINDS: dict[str, type[Record]] = {
    "host": Host,
    "link": Link,
    "image": Image,
    "sample": Sample,
    "pack": Pack,
    "warm": Warm,
    "pages": Pages,
    "whole": Whole,
    "throughput": Throughput,
}


def read(path: Path) -> tuple[list[Record], Counter[str]]:
    """All records in the file's order, and how many lines of each kind this version does not know. Raises
    ResultsError, and OSError if the file cannot be read."""
    records: list[Record] = []
    unknown: Counter[str] = Counter()
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except ValueError:  # also half a character
            if not line.endswith(b"\n"):  # splitlines: only the last
                break
            raise ResultsError(f"{path}, line {number}: not JSON: {line[:60]!r}") from None
        try:
            kind = _kind(data)
            if kind in KINDS:
                records.append(record(KINDS[kind], data))
            else:
                unknown[kind] += 1
        except ResultsError as error:
            raise ResultsError(f"{path}, line {number}: {error}") from None
    return records, unknown


def _kind(data: object) -> str:
    if not isinstance(data, dict):
        raise ResultsError("not an object")
    if data.get("version") != VERSION:
        raise ResultsError(f"version {data.get('version')!r}; this report understands version {VERSION} only")
    return str(data.get("record"))


def _number(value: object) -> float:
    # bool is an int to Python, and JSON's NaN a float.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError("not a number")
    return float(value)


def _integer(value: object) -> int:
    if _number(value) != int(_number(value)):
        raise TypeError("not an integer")
    return int(_number(value))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a string")
    return value


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("neither true nor false")
    return value


def _layers(value: Any) -> tuple[Layer, ...]:
    return tuple(record(Layer, layer) for layer in value)


def _points(value: Any) -> tuple[tuple[float, float], ...]:
    return tuple((_number(second), _number(rate)) for second, rate in value)


# By the annotation of the field, which `from __future__ import annotations` leaves a string.
_READERS: dict[str, Callable[[Any], object]] = {
    "float": _number,
    "int": _integer,
    "str": _text,
    "bool": _truth,
    "Mapping[str, Any]": dict,
    "tuple[Layer, ...]": _layers,
    "tuple[tuple[float, float], ...]": _points,
}

_R = TypeVar("_R")


def record(kind: type[_R], data: Mapping[str, Any]) -> _R:
    """One record of parsed JSON; what it does not know is left out. Raises ResultsError: a field is missing or of
    another type."""
    values: dict[str, object] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        annotation = str(field.type)
        value = data.get(field.name)
        if value is None:
            if annotation.endswith(" | None"):
                values[field.name] = None
            elif field.default is MISSING:
                raise ResultsError(f"{kind.__name__.lower()} without {field.name}")
            continue
        try:
            values[field.name] = _READERS[annotation.removesuffix(" | None")](value)
        except (TypeError, ValueError) as error:
            raise ResultsError(f"{kind.__name__.lower()}: {field.name} is {str(value)[:60]!r}: {error}") from None
    return kind(**values)
