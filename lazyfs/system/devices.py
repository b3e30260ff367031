"""Device numbers of file systems."""

from __future__ import annotations

import os


def dev_of(place: int | str) -> tuple[int, int]:
    """Major and minor number of the file system that a path or a descriptor lies on. Raises OSError."""
    device = os.stat(place).st_dev
    return os.major(device), os.minor(device)
