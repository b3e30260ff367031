"""Where a fuse mount is attached, as its clients reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazyfs.control.requests import Attached
from lazyfs.daemon import attachments as module
from lazyfs.daemon.attachments import Attachments


def test_reports_from_elsewhere_stay_listed(tmp_path: Path) -> None:
    attachments = Attachments((0, 1), str(tmp_path))
    attachments.add(Attached((0, 2), "/in/another/namespace"))
    assert attachments.targets() == [Attached((0, 2), "/in/another/namespace")]
    assert attachments.has((0, 1)) and attachments.has((0, 2)) and not attachments.has((0, 3))


def test_the_device_of_a_mount_that_has_gone_is_another_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gives its number to the next mount, which another process may serve."""
    visible = {((0, 2), "/overlay"), ((0, 3), "/other")}
    monkeypatch.setattr(module, "_visible", lambda: visible)
    attachments = Attachments((0, 1), str(tmp_path))
    attachments.add(Attached((0, 2), "/overlay"))
    attachments.add(Attached((0, 3), "/other"))
    assert attachments.has((0, 2))
    visible.remove(((0, 2), "/overlay"))
    assert not attachments.has((0, 2)) and attachments.has((0, 3)) and attachments.has((0, 1))
