"""Load generators: what they print is understood, and a server that answers with errors is no throughput."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hellobench import loads
from benchmarks.hellobench.loads import LoadFailed, Server

PGBENCH = """\
pgbench (15.18 (Debian 15.18-0+deb12u1))
progress: 1.0 s, 1203.9 tps, lat 3.310 ms stddev 1.529, 0 failed
progress: 2.0 s, 0.0 tps, lat 0.000 ms stddev 0.000, 0 failed
progress: 3.0 s, 615.6 tps, lat 6.447 ms stddev 9.153, 0 failed
"""


class _Files(http.server.BaseHTTPRequestHandler):
    """All below /icons/ and / itself exist, except what is called "missing"."""

    protocol_version = "HTTP/1.1"
    asked: set[str]

    def do_GET(self) -> None:
        self.asked.add(self.path)
        self.send_response(404 if "missing" in self.path else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"hi")

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


@contextlib.contextmanager
def serving(tmp_path: Path, *icons: str) -> Iterator[tuple[Server, set[str]]]:
    """A web server and the paths it is asked for; `icons` are the files of its image."""
    root, scratch = tmp_path / "root", tmp_path / "scratch"
    scratch.mkdir()
    for icon in icons:
        file = root / "usr/share/apache2/icons" / icon
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    asked = _Files.asked = set[str]()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Files) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Server(server.server_address[1], root, scratch), asked
        finally:
            server.shutdown()
            thread.join()


def test_mean_weights_points_by_their_time() -> None:
    assert loads.mean([(1.0, 100.0), (4.0, 20.0)]) == pytest.approx(40.0)


def test_progress_of_pgbench() -> None:
    assert loads.pgbench_points(PGBENCH) == [(1.0, 1203.9), (2.0, 0.0), (3.0, 615.6)]


def test_progress_of_redis_benchmark() -> None:
    line = "SET: rps=43808.8 (overall: 43634.9) avg_msec=0.743 (overall: 0.743)"
    assert loads.redis_per_s(line) == 43808.8
    assert loads.redis_per_s("SET: rps=0.0 (overall: -nan) avg_msec=-nan (overall: -nan)") == 0.0
    assert loads.redis_per_s("Could not connect to Redis at 127.0.0.1:1: Connection refused") is None


def test_redis_benchmark_that_ends_early_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "redis-benchmark"
    program.write_text("#!/bin/sh\necho no server\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(LoadFailed, match=r"(?s)exit 1.*no server"):
        loads.redis_benchmark(Server(1, tmp_path, tmp_path), 5.0)


def test_wrk_asks_for_all_files_in_turn(tmp_path: Path) -> None:
    with serving(tmp_path, "a.png", "small/b.gif") as (server, asked):
        points = loads.wrk_static(server, 1.0)
    assert asked == {"/", "/icons/a.png", "/icons/small/b.gif"}
    assert [round(at) for at, _ in points] == [1]
    assert points[0][1] > 0


def test_wrk_with_errors_fails(tmp_path: Path) -> None:
    with serving(tmp_path, "missing.png") as (server, _), pytest.raises(LoadFailed, match="Non-2xx"):
        loads.wrk_static(server, 1.0)
    with pytest.raises(LoadFailed, match="no files"):
        loads.wrk_static(Server(1, tmp_path / "scratch", tmp_path), 1.0)
