"""The report of HelloBench's results: from JSON lines to medians, ratios, limits, Markdown and figures.

All numbers that are expected here were computed by hand.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hellobench import behind, cells, figures, lines, report, summary
from benchmarks.hellobench.summary import DEPLOYMENT, DEVELOPMENT, FRESH, SECOND
from tests.hellobench.resultsfile import File


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path / "results.jsonl")


@pytest.fixture
def measured(file: File) -> File:
    """One workload over one link: rounds of 8 / 2, 9 / 20 and 10 / 3 s of ctr / lazyfs, and a limit of 2.56 s."""
    file.add("host", machine={"Linux": "6.12", "memory_bytes": 8 << 30})
    file.add("link", link="wan", nominal_bits_s=50_000_000, nominal_rtt_s=0.02, bytes_s=5_000_000, rtt_s=0.02)
    file.image("python")
    for number, (ctr, ours) in enumerate([(8.0, 2.0), (9.0, 20.0), (10.0, 3.0)]):
        file.sample("ctr", ctr, number)
        counts = {"bytes_fetched": 20_000_000, "requests": 12, "bytes_read": 50_000_000}
        arrived = {"link_bytes": 16_000_000, "link_index_bytes": 1_000_000, "link_requests": 15}
        file.sample("lazyfs", ours, number, **counts, **arrived)
        file.sample("local", 0.4 + number / 10, number, link="loopback", operation="local", pull_s=None)
    return file


def row(markdown: str, heading: str, first: str) -> list[str]:
    """The cells of the row that begins with `first`, in the first table after a heading."""
    below = markdown[markdown.index(heading) :]
    line = next(line for line in below.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_a_speedup_is_the_median_of_the_ratios_of_rounds_not_the_ratio_of_medians(measured: File) -> None:
    results = measured.load()
    speedup = results.speedup("python", "wan", DEPLOYMENT, "ctr")
    assert speedup.pairs == ((2.0, 8.0), (20.0, 9.0), (3.0, 10.0))
    assert speedup.ratio == pytest.approx(10 / 3)  # of 4, 0.45 and 3.33; the medians, 9 and 3, would give 3
    assert (speedup.slower, speedup.behind_s) == (1, -6.0)


def test_rounds_without_both_sides_make_no_pair(file: File) -> None:
    file.sample("ctr", 8.0, 0)
    file.sample("ctr", None, 1, error="timed out")
    file.sample("lazyfs", 1.0, 1)
    file.sample("lazyfs", 2.0, 2)
    results = file.load()
    assert results.speedup("python", "wan", DEPLOYMENT, "ctr").pairs == ()
    assert results.speedup("python", "wan", DEPLOYMENT, "ctr").ratio is None


def test_pairs_are_of_one_run(file: File) -> None:
    file.sample("ctr", 8.0, 0, run="a")
    file.sample("lazyfs", 4.0, 0, run="a")
    file.sample("lazyfs", 1.0, 0, run="b")  # alone
    file.sample("ctr", 6.0, 1, run="a")  # measured on one day,
    file.sample("lazyfs", 2.0, 1, run="b")  # and on another
    assert file.load().speedup("python", "wan", DEPLOYMENT, "ctr").pairs == ((4.0, 8.0),)


def test_the_limit_is_transfer_round_trips_and_the_local_start(measured: File) -> None:
    results = measured.load()
    assert results.limit("python", "wan") == pytest.approx(2.56)  # 10 MB / 5 MB/s + 3 * 0.02 + 0.5
    assert results.over_limit("python", "wan", "lazyfs") == pytest.approx(3.0 / 2.56)
    assert results.limit("python", "lan") is None and results.limit("perl", "wan") is None


def test_p95_is_a_sample_by_nearest_rank() -> None:
    assert summary.p95([5, 1, 3, 2, 4]) == 5
    assert summary.p95([float(n) for n in range(1, 101)]) == 95
    assert summary.p95([]) is None


def test_a_fresh_hosts_development_is_computed_of_two_medians(measured: File) -> None:
    for number, (ctr, ours) in enumerate([(1.0, 0.5), (3.0, 1.5), (2.0, 1.0)]):
        measured.sample("ctr", 4.0, number, operation=DEVELOPMENT, push_s=ctr)
        measured.sample("lazyfs", 2.0, number, operation=DEVELOPMENT, push_s=ours)
    results = measured.load()
    assert results.fresh("python", "wan", "ctr") == 11.0  # 2 + 9
    assert results.fresh("python", "wan", "lazyfs") == 4.0  # 1 + 3
    assert results.gain("python", "wan", FRESH, "ctr") == 2.75
    development = row(report.markdown(results), "**Development**", "python")
    assert development[1:] == ["4.00 (4.00) n=3", "2.00 (2.00) n=3", "2.00x n=3", "11.0", "4.00", "2.75x"]


def test_averages_over_workloads_are_of_the_same_workloads(file: File) -> None:
    names = [f"w{number}" for number in range(5)]
    for name in names:
        file.sample("lazyfs", 1.0, workload=name)
    for name in names[1:]:
        file.sample("ctr", 1.0, workload=name)
    file.sample("umoci", 1.0, workload="w2")  # too few to count
    assert file.load().comparable("wan", DEPLOYMENT, names) == (["ctr", "lazyfs"], names[1:])


def test_a_half_written_last_line_is_ignored(measured: File) -> None:
    count = len(measured.load().samples)
    with measured.path.open("ab") as file:
        file.write('{"record": "sample", "error": "\N{EN DASH}'.encode()[:-1])
    assert len(measured.load().samples) == count


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"record": "sample", "ver', "line 2: not JSON"),
        ('{"record": "host", "version": 2, "machine": {}}', "line 2: version 2; .* version 1 only"),
        ('{"record": "host", "machine": {}}', "line 2: version None"),
        ("[]", "line 2: not an object"),
        ('{"record": "link", "version": 1, "link": "wan", "rtt_s": 1}', "line 2: link without bytes_s"),
        (
            '{"record": "link", "version": 1, "link": "wan", "rtt_s": 1, "bytes_s": "9"}',
            "line 2: link: bytes_s is '9': not a number",
        ),
        (
            '{"record": "link", "version": 1, "link": "wan", "rtt_s": NaN, "bytes_s": 9}',
            "line 2: link: rtt_s is 'nan': not a number",
        ),
        (
            '{"record": "throughput", "version": 1, "benchmark": "x", "mode": "lazyfs", "round": 0,'
            ' "mean_per_s": 1, "points": [[1]]}',
            "line 2: throughput: points is",
        ),
    ],
)
def test_anything_else_that_is_wrong_names_its_line(file: File, line: str, message: str) -> None:
    file.add("host", machine={})
    with file.path.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(lines.ResultsError, match=message):
        file.load()


def test_unknown_kinds_and_fields_are_passed_over_and_reported(measured: File) -> None:
    measured.add("weather", rain=True)
    measured.sample("lazyfs", 2.0, 3, colour="green")
    assert "does not read: 1 of kind weather." in report.markdown(measured.load())


def test_numbers_are_rounded_for_people() -> None:
    shown = [cells.digits(value) for value in (None, 0, 0.0001, 0.0423, 0.4239, 9.994, 9.996, 99.94, 12345.6)]
    assert shown == ["\N{EN DASH}", "0.000", "<0.001", "0.042", "0.42", "9.99", "10.0", "99.9", "12,346"]
    assert [cells.megabytes(count) for count in (None, 0, 100, 8000, 1.25e6, 250e6)] == [
        "\N{EN DASH}", "0", "<0.01", "0.01", "1.2", "250",
    ]  # fmt: skip
    assert [cells.percent(part) for part in (0, 0.001, 0.5, 0.999, 1)] == ["0 %", "<1 %", "50 %", ">99 %", "100 %"]
    assert cells.time(summary.Cell((2.0,))) == "2.00 n=1"
    assert cells.time(summary.Cell((1.0, 2.0, 3.0, 4.0, 9.0))) == "3.00 (9.00)"


def test_the_tables_of_a_link(measured: File) -> None:
    for number in range(2):
        measured.sample("ctr", 1.0, number, operation=SECOND, pull_s=None)
        measured.sample("lazyfs", 2.0, number, operation=SECOND, pull_s=None, bytes_fetched=1_000_000)
    text = report.markdown(measured.load())
    assert row(text, "## Links", "wan")[1:] == ["50", "40.0", "80 %", "20", "20", "1"]
    assert row(text, "## The limit", "python")[1:] == ["10.0", "0.50", "2.56"]
    assert "## Link wan (40.0 Mbit/s, 20 ms measured)" in text
    assert row(text, "**Deployment", "python")[1:] == [
        "50.0", "10.0", "2.56", "9.00 (10.0) n=3, 3.52x", "3.00 (20.0) n=3, 1.17x", "3.33x n=3",
    ]  # fmt: skip
    assert row(text, "**Second run**", "python")[1:] == [
        "1.00 (1.00) n=2", "2.00 (2.00) n=2", "0.50x n=2", "1.0", "95 %",
    ]  # fmt: skip
    assert row(text, "**Summary", "second")[1:4] == ["ctr", "0.50x (0.50 to 0.50)", "0 of 1, 0 %"]
    dash = cells.DASH
    counts = row(text, "**Counts of a deployment by lazyfs**", "python")
    assert counts[1:] == ["20.0", "12", "50.0", "2.00x", "2.00x", dash, dash, "16.0", "15", "1.50x"]


def test_the_classes_have_tables_of_their_own_and_only_what_ran_is_claimed(measured: File) -> None:
    measured.image("mysql", "N", category="database")
    measured.image("python-fat", fat=True)
    measured.image("perl")  # never measured
    measured.sample("ctr", 5.0, workload="mysql")
    measured.sample("ctr", 5.0, workload="python-fat")
    for name in ("mysql", "python", "python-fat"):
        measured.sample("umoci", 6.0, workload=name)
    measured.sample("lazyfs", None, workload="mysql", error="exit 1 | <no such file>\nmore")
    text = report.markdown(measured.load())
    assert "rebuilt: at least one sample of 1 of the paper's 57 workloads, and of 1 fat flavour.\n" in text
    assert "not the same software: at least one sample of 1.\n" in text
    same, relatives = text[text.index("### Class E") :].split("### Class N")
    assert "mysql" not in same and "| python-fat (fat) |" in same and "| mysql |" in relatives
    assert row(text, "## What ran", "wan")[:3] == ["wan", "ctr", "3 x 1 to 3"]
    assert "1 of 15 samples failed." in text
    assert r"| exit 1 \| &lt;no such file> more | 1 |" in text
    assert "- wan (deployment by lazyfs): perl, python-fat, mysql\n" in text
    assert "- wan (deployment by ctr, umoci): perl\n" in text
    assert "- no workload at all: second, development" in text


def test_where_lazyfs_falls_behind_is_found(measured: File) -> None:
    for number in range(3):
        measured.sample("umoci", 2.5, number)
        measured.sample("ctr", 1.0, number, operation=SECOND)
        measured.sample("lazyfs", 4.0, number, operation=SECOND)
        measured.add("whole", workload="python", mode="ctr", round=number, seconds=2.0, bytes=1)
        measured.add("whole", workload="python", mode="lazyfs", round=number, seconds=3.0, bytes=1)
    results = measured.load()
    found = [(one.operation, one.theirs, round(one.factor, 3), one.speedup.slower) for one in behind.slower(results)]
    assert found == [(SECOND, "ctr", 4.0, 3), ("whole image read", "ctr", 1.5, 3), (DEPLOYMENT, "umoci", 1.2, 2)]
    assert behind.over_limit(results) == []
    assert [(w, link) for _, w, link in behind.over_limit(results, factor=1.1)] == [("python", "wan")]
    text = behind.markdown(results)
    assert "in 3 cases, in 2 of them in every pair:" in text
    assert "Of 1 deployments with a known limit, 0 take lazyfs more than 3x the limit." in text


def test_memory_and_long_runs(measured: File) -> None:
    for mode, page_cache in (("lazyfs", 30e6), ("overlayfs", 40e6)):
        measured.add("pages", workload="python", mode=mode, containers=10, page_cache_bytes=page_cache)
    for number, (ours, theirs) in enumerate([(90.0, 100.0), (120.0, 100.0), (95.0, 100.0)]):
        names = {"benchmark": "pgbench", "round": number, "points": [[0, 1], [1, 2]]}
        measured.add("throughput", mode="lazyfs", mean_per_s=ours, first_s=1.0, **names)
        measured.add("throughput", mode="overlayfs", mean_per_s=theirs, first_s=4.0, **names)
    text = report.markdown(measured.load())
    assert row(text, "## Memory", "python")[1:] == ["30.0", "40.0", cells.DASH]
    assert row(text, "## Long-running", "pgbench")[1:] == [
        "95.0", "100", "0.95x n=3", "1.00", "4.00", "4.00x n=3",
    ]  # fmt: skip


def test_no_results_are_a_report_too(file: File) -> None:
    assert report.markdown(file.load()) == "# HelloBench: what was measured\n\nNothing was measured.\n"


def test_figures_are_drawn_of_what_there_is_and_shown(measured: File, tmp_path: Path) -> None:
    measured.add(
        "throughput", benchmark="pgbench", mode="lazyfs", round=0, mean_per_s=2.0, first_s=None, points=[[0, 1], [1, 3]]
    )
    measured.sample("lazyfs", 2.0, operation=SECOND)
    written = report.write(measured.path, tmp_path / "out")
    names = ["start-wan", "speedups", "limit", "bytes", "second-wan", "depth", "throughput"]
    assert [path.name for path in written] == ["report.md", *(f"{name}.png" for name in names)]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    text = written[0].read_text()
    assert all(f"({path.name})" in text for path in written[1:])
    assert "over the link wan" in text


def test_there_may_be_nothing_to_draw(file: File, tmp_path: Path) -> None:
    assert figures.draw(file.load(), tmp_path) == []


def test_a_report_without_figures_does_not_import_matplotlib() -> None:
    code = "import sys; from benchmarks.hellobench import report, figures; sys.exit('matplotlib' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=root)
