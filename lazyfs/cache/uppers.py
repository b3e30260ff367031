"""Upper directories of ephemeral writable roots."""

from __future__ import annotations

# isort: split

import os
import shutil


def remove_upper(upper: str, cache_path: str) -> None:
    """Removes an ephemeral upper directory; only ever something directly below <cache>/uppers."""
    if os.path.dirname(os.path.normpath(upper)) == os.path.join(cache_path, "uppers"):
        shutil.rmtree(upper, ignore_errors=True)
