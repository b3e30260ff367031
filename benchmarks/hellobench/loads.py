"""Load generators for servers in containers: Debian's pgbench, redis-benchmark and wrk, run on the host.

Each gives throughput over time: points [seconds since the load began, operations per second since the point before].
"""

from __future__ import annotations

import os
import re
import select
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.host import run

LOOPBACK = "127.0.0.1"
Points = list[tuple[float, float]]
# A generator may take longer than its load: to connect, and for what is under way at the end.
GRACE_S = 60.0

# PostgreSQL: about 150 MB of tables, which fit into any page cache; the TPC-B-like transactions of pgbench(1).
PGBENCH_SCALE = 10
PGBENCH_CLIENTS = 4
# Redis: the default number of clients, values as of a small session, enough keys that they are not one hot spot.
REDIS_CLIENTS = 50
REDIS_VALUE_BYTES = 100
REDIS_KEYS = 100_000
REDIS_COMMANDS = ("set", "get")
REDIS_WITHOUT_END = 2_000_000_000
# wrk: one thread of it, so that the server has the other core of a small machine.
WRK_CONNECTIONS = 16
WRK_SLICE_S = 1  # it prints totals only, so it is run again for each point


class LoadFailed(RuntimeError):
    """A generator failed, or the server answered with errors."""


@dataclass(frozen=True)
class Server:
    """What is put under load. `root`: its image, unpacked, to know its files; `scratch`: a directory for ours."""

    port: int
    root: Path
    scratch: Path


@dataclass(frozen=True)
class Load:
    """A benchmark of the workload of that name. `drive` puts the server under load for so many seconds."""

    benchmark: str
    workload: str
    drive: Callable[[Server, float], Points]


def mean(points: Points) -> float:
    """Operations per second over the whole time of a load."""
    done, before = 0.0, 0.0
    for at, per_s in points:
        done += (at - before) * per_s
        before = at
    return done / before


def pgbench(server: Server, seconds: float) -> Points:
    """Tables are made first, which is not part of the load."""
    # Not /usr/bin/pgbench: Debian's wrapper asks for the clusters of the host.
    programs = Path("/usr/lib/postgresql").glob("*/bin/pgbench")
    program = max(programs, key=lambda path: int(path.parts[4]), default=Path("pgbench"))
    where = ("-h", LOOPBACK, "-p", str(server.port), "-U", "postgres")
    run(program, "-i", "-q", "-s", str(PGBENCH_SCALE), *where, "postgres")
    words = [str(program), "-n", "-P", "1", "-T", str(max(1, round(seconds))), "-c", str(PGBENCH_CLIENTS)]
    result = subprocess.run(
        [*words, *where, "postgres"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds + GRACE_S,
    )
    points = pgbench_points(result.stderr)
    if result.returncode != 0 or not points:
        raise LoadFailed(f"pgbench: exit {result.returncode}\n{result.stderr[-2000:]}")
    return points


def pgbench_points(text: str) -> Points:
    """The progress lines of `pgbench -P`, which carry the time since the load began."""
    found = re.findall(r"^progress: ([\d.]+) s, ([\d.]+) tps", text, re.MULTILINE)
    return [(float(at), float(per_s)) for at, per_s in found]


def redis_benchmark(server: Server, seconds: float) -> Points:
    """SET for the first half of the time, GET of the same keys for the second."""
    points: Points = []
    began = time.perf_counter()
    for number, command in enumerate(REDIS_COMMANDS, start=1):
        words = ["redis-benchmark", "-h", LOOPBACK, "-p", str(server.port), "-t", command]
        words += ["-c", str(REDIS_CLIENTS), "-d", str(REDIS_VALUE_BYTES), "-r", str(REDIS_KEYS)]
        words += ["-n", str(REDIS_WITHOUT_END)]
        until = began + seconds * number / len(REDIS_COMMANDS)
        with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            try:
                points += [(at - began, per_s) for at, per_s in _redis_progress(process, until)]
            finally:
                process.kill()  # it ends after a number of requests only
    if not points:
        raise LoadFailed("redis-benchmark: no progress")  # it waits in silence for a server that is not there
    return points


def _redis_progress(process: subprocess.Popen[bytes], until: float) -> Iterator[tuple[float, float]]:
    """What redis-benchmark prints every 250 ms, with the time of the clock at which it came; until `until`.

    Not the first line, which it prints before any request."""
    assert process.stdout is not None
    rest, last, first = b"", b"", True
    while (wait_s := until - time.perf_counter()) > 0:
        if not select.select([process.stdout], [], [], wait_s)[0]:
            return
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            raise LoadFailed(f"redis-benchmark: exit {process.wait(GRACE_S)}: {(last + rest).decode(errors='replace')}")
        *lines, rest = re.split(rb"[\r\n]", rest + piece)
        for line in lines:
            last = line
            per_s = redis_per_s(line.decode(errors="replace"))
            if per_s is not None:
                if not first:
                    yield time.perf_counter(), per_s
                first = False


def redis_per_s(line: str) -> float | None:
    """The throughput since the line before. None: not such a line."""
    found = re.search(r"\brps=([\d.]+) ", line)
    return None if found is None else float(found[1])


def wrk_static(server: Server, seconds: float) -> Points:
    """Apache's own icons, which its default configuration serves: many small files of the image, in turn."""
    icons = server.root / "usr/share/apache2/icons"
    paths = [f"/icons/{path.relative_to(icons)}" for path in sorted(icons.rglob("*.*")) if _is_file(path)]
    if not paths:
        raise LoadFailed(f"no files in {icons}")
    script = server.scratch / "paths.lua"
    script.write_text(_ROTATING % ", ".join(f'"{path}"' for path in ["/", *paths]))
    return _wrk(server, seconds, "-s", str(script))


_ROTATING = """\
local requests, count = {}, 0
function init()
    for _, path in ipairs({%s}) do
        requests[#requests + 1] = wrk.format("GET", path)
    end
end
function request()
    count = count + 1
    return requests[count %% #requests + 1]
end
"""


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def wrk_dynamic(server: Server, seconds: float) -> Points:
    """The application makes each answer anew."""
    return _wrk(server, seconds)


def _wrk(server: Server, seconds: float, *options: str) -> Points:
    points: Points = []
    began = time.perf_counter()
    words = ["wrk", "-t", "1", "-c", str(WRK_CONNECTIONS), "-d", f"{WRK_SLICE_S}s", *options]
    while not points or time.perf_counter() - began + WRK_SLICE_S / 2 < seconds:
        per_s = wrk_per_s(run(*words, f"http://{LOOPBACK}:{server.port}/"))
        points.append((time.perf_counter() - began, per_s))
    return points


def wrk_per_s(text: str) -> float:
    """The throughput that wrk reports; LoadFailed if there were errors."""
    found = re.search(r"^Requests/sec: +([\d.]+)", text, re.MULTILINE)
    if found is None or "Non-2xx" in text or "Socket errors" in text:
        raise LoadFailed(f"wrk:\n{text[-2000:]}")
    return float(found[1])


LOADS = (
    Load("pgbench", "postgres", pgbench),
    Load("redis-benchmark", "redis", redis_benchmark),
    Load("wrk-static", "httpd", wrk_static),
    Load("wrk-dynamic", "nodejs", wrk_dynamic),
)
