"""Where a fuse mount is attached, as its clients reported."""

from __future__ import annotations

from pathlib import Path

from lazyfs.control.requests import Attached
from lazyfs.daemon.attachments import Attachments


def test_reports_from_elsewhere_stay_listed(tmp_path: Path) -> None:
    attachments = Attachments((0, 1), str(tmp_path))
    attachments.add(Attached((0, 2), "/in/another/namespace"))
    assert attachments.targets() == [Attached((0, 2), "/in/another/namespace")]
    assert attachments.has((0, 1)) and attachments.has((0, 2)) and not attachments.has((0, 3))
