"""How `lazyfs record` learns when a workload is ready: as its users would tell it, by the nearest of its ways."""

from __future__ import annotations

from benchmarks.hellobench.workloads import Amqp, Http, Output, Readiness, Redis, Sql

# What the servers write when they take connections; their ports are open before.
_LINES = {"postgres": "ready to accept connections", "mariadb": "ready for connections"}


def until(ready: Readiness) -> list[str]:
    """The options for one workload."""
    match ready:
        case Output():
            return ["--until-exit"]
        case Http():
            return ["--until-http", f"http://127.0.0.1:{ready.port}{ready.path}"]
        case Sql():
            return ["--until-line", _LINES[ready.dialect]]
        case Redis() | Amqp():
            return ["--until-port", str(ready.port)]
