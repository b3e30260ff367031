"""Which modes and workloads a run has; and what cannot be made ready is a failed sample, not the end of the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hellobench import __main__ as program
from benchmarks.hellobench import recording, suite
from benchmarks.hellobench.catalogue import EVERY, HELD_BACK, WORKLOADS
from benchmarks.hellobench.hosts import Hosts
from benchmarks.hellobench.links import LINKS, Route
from benchmarks.hellobench.modes import DEPLOYMENT, MODES, OPERATIONS, operations_of
from benchmarks.hellobench.preparation import Preparation
from benchmarks.hellobench.rounds import Round
from benchmarks.hellobench.workloads import Output, Sql, Workload

ROOT = Path(__file__).resolve().parents[2]


def chosen(*words: str) -> tuple[list[str], list[str]]:
    """Names of workloads and modes of a command line."""
    args = program.parser().parse_args(["run", *words])
    return [workload.name for workload in suite.chosen(args)], suite.chosen_modes(args)


def test_names_are_given_one_by_one_or_with_commas() -> None:
    words = ("--workload", "python,nginx", "--workload", "science", "--mode", "ctr,lazyfs-pack")
    assert chosen(*words) == (["python", "nginx", "science"], ["ctr", "lazyfs-pack"])


def test_all_are_the_papers_and_no_other_build_without_one() -> None:
    workloads, modes = chosen()
    assert workloads == list(WORKLOADS)
    assert len(workloads) == 34
    assert modes == [mode for mode in MODES if mode != "lazyfs-before"]
    assert chosen("--before", "/a", "--mode", "lazyfs")[1] == ["lazyfs", "lazyfs-before"]
    assert chosen("--held-back")[0] == list(HELD_BACK)
    assert set(EVERY) == set(WORKLOADS) | set(HELD_BACK)


def test_operations_of_the_modes_of_recorded_starts() -> None:
    assert operations_of("lazyfs") == OPERATIONS
    assert operations_of("lazyfs-pack") == ("deployment", "second")
    assert operations_of("lazyfs-profile") == operations_of("lazyfs-before") == ("deployment",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mode", "lazyfs,lazyfs-magic"), "'lazyfs-magic' is none of ctr, umoci, lazyfs"),
        (("--mode", "lazyfs-before"), "the mode lazyfs-before needs the other checkout: --before DIR"),
    ],
)
def test_what_cannot_be_run_is_said_at_once(words: tuple[str, ...], message: str) -> None:
    command = [sys.executable, "-m", "benchmarks.hellobench", "run", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize("workload", EVERY.values(), ids=lambda workload: workload.name)
def test_every_workload_can_be_recorded(workload: Workload) -> None:
    option, *value = recording.until(workload.ready)
    if isinstance(workload.ready, Output):
        assert (option, value) == ("--until-exit", [])
    else:
        assert option in ("--until-http", "--until-line", "--until-port")
        assert isinstance(workload.ready, Sql) or str(workload.ready.port) in value[0]


class _Broken(Hosts):
    def prepare(self, workload: Workload, mode: str) -> None:
        raise RuntimeError(f"no pack of {workload.name}")


def test_a_mode_that_cannot_be_prepared_is_a_failed_sample() -> None:
    nothing: Any = None
    preparation: Preparation = nothing
    round_ = Round(preparation, _Broken(preparation), WORKLOADS["python"], WORKLOADS["perl"], route(), 2)
    done: list[str] = []
    (record,) = round_.run(["lazyfs-pack"], [DEPLOYMENT], done.append)
    assert done == ["lazyfs-pack"]
    assert (record["mode"], record["operation"], record["round"], record["ok"]) == ("lazyfs-pack", DEPLOYMENT, 2, False)
    assert record["error"] == "no pack of python"


def route() -> Route:
    return Route(LINKS["loopback"], "127.0.0.1:1", "127.0.0.1:1")
