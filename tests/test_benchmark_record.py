"""The benchmark's bookkeeping: ratios of pairs, missed goals shown, files written."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import record


def test_ratio_is_the_median_of_pairs_and_missed_goals_are_bold(tmp_path: Path) -> None:
    results = [
        record.ratio("a", "title a", "kernel", [1.0, 2.0, 9.0], [2.0, 4.0, 3.0], 1.0, "as fast"),
        record.ratio("a", "title a", "fuse", [3.0], [2.0], 1.0, "as fast"),
        record.ratio("b", "title b", "fuse", [3.0], [2.0], 1.0, "", informative=True),
    ]
    assert [r.value for r in results] == [0.5, 1.5, 1.5]
    assert [r.met for r in results] == [True, False, False]
    assert record.markdown(results).splitlines()[2:] == [
        "| title a | as fast | 0.50x (2.00 s / 3.00 s) | **1.50x (3.00 s / 2.00 s)** |",
        "| title b |  |  | 1.50x (3.00 s / 2.00 s) |",
    ]
    data, table, figure = record.save(tmp_path, results, {"cores": 2})
    assert json.loads(data.read_text())["environment"] == {"cores": 2}
    assert table.read_text().endswith("cores 2\n")
    assert figure.read_bytes().startswith(b"\x89PNG")
