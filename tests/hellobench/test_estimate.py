"""How long a run will take: from samples of the same, or of what is nearest to it; less what is done already."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.hellobench import estimate
from benchmarks.hellobench.catalogue import WORKLOADS
from benchmarks.hellobench.estimate import OPERATION_S, ROUND_S, Estimate, Remaining, missing_rounds
from benchmarks.hellobench.journal import Journal
from benchmarks.hellobench.links import LINKS
from benchmarks.hellobench.modes import DEPLOYMENT, OPERATIONS, SECOND
from tests.hellobench.resultsfile import File


@pytest.fixture
def known(tmp_path: Path) -> Estimate:
    """Over the LAN python 2 s and nginx 4 s by ctr, half of that by lazyfs; over the WAN python alone, thrice that."""
    file = File(tmp_path / "known.jsonl")
    for name in ("python", "nginx"):
        file.image(name)
    for name, link, ctr_s in (("python", "lan", 2.0), ("nginx", "lan", 4.0), ("python", "wan", 6.0)):
        file.sample("ctr", ctr_s, workload=name, link=link)
        file.sample("lazyfs", ctr_s / 2, workload=name, link=link)
    file.sample("lazyfs", 0.25, workload="python", link="lan", operation=SECOND)
    return Estimate(file.load())


def test_a_round_is_what_its_samples_took_and_what_lies_between_them(known: Estimate) -> None:
    assert known.round_s("python", "lan", ["ctr", "lazyfs"], [DEPLOYMENT]) == pytest.approx(
        ROUND_S + 2 * OPERATION_S + 3.0
    )
    # The deployment that comes before it is part of it.
    assert known.round_s("python", "lan", ["lazyfs"], [SECOND]) == pytest.approx(ROUND_S + 2 * OPERATION_S + 1.25)


@pytest.mark.parametrize(
    ("workload", "link", "mode", "seconds"),
    [
        ("python", "lan", "lazyfs-pack", 1.0),  # as lazyfs
        ("nginx", "wan", "ctr", 12.0),  # as over the LAN, and python's ratio of both
        ("science", "lan", "ctr", 3.0),  # as the others
    ],
)
def test_what_was_not_measured_is_taken_from_the_nearest(
    known: Estimate, workload: str, link: str, mode: str, seconds: float
) -> None:
    assert known.round_s(workload, link, [mode], [DEPLOYMENT]) == pytest.approx(ROUND_S + OPERATION_S + seconds)


def test_what_is_there_is_not_waited_for_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results.jsonl", "a")
    workload, link, modes = WORKLOADS["python"], LINKS["lan"], ["ctr", "lazyfs-pack"]
    names = {"record": "sample", "workload": "python", "link": "lan", "ok": True}
    for mode in modes:
        for operation in (DEPLOYMENT, SECOND):
            journal.write([{**names, "mode": mode, "operation": operation, "round": 1}])
    assert missing_rounds(journal, link, workload, modes, [DEPLOYMENT, SECOND], 3) == [0, 2]
    # A pack has no development, but ctr has.
    assert missing_rounds(journal, link, workload, ["lazyfs-pack"], OPERATIONS, 2) == [0]
    assert missing_rounds(journal, link, workload, modes, OPERATIONS, 2) == [0, 1]
    done = Remaining([link], [workload], modes, [DEPLOYMENT], 3, journal)
    assert done.introduction.startswith("1 workloads over lan, 2 modes: 2 rounds are missing and will take about ")
    assert done.after(link, workload).endswith("done; about 0 s left")
    assert Remaining([link], [workload], ["lazyfs-pack"], [DEPLOYMENT], 0, journal).introduction == ""


def test_times_are_said_for_people() -> None:
    assert [estimate.spoken(seconds) for seconds in (0, 89, 100, 3600, 12_000)] == [
        "0 s", "89 s", "2 min", "60 min", "3 h 20 min",
    ]  # fmt: skip
