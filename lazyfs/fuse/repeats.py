"""One line in the log for a failure that repeats: one broken registry makes thousands of reads fail."""

from __future__ import annotations

import threading
import time

_MAX_TEXTS = 100


class RepeatFilter:
    """Lets the same text through once in `pause_s` seconds. For any thread."""

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._lock = threading.Lock()
        self._logged_s: dict[str, float] = {}  # text: when it was let through last

    def is_new(self, text: str) -> bool:
        """Whether `text` was not let through in the last `pause_s` seconds; if so, it counts as let through now."""
        now_s = time.monotonic()
        with self._lock:
            if now_s - self._logged_s.get(text, -self._pause_s) < self._pause_s:
                return False
            if len(self._logged_s) >= _MAX_TEXTS:
                self._logged_s.clear()
            self._logged_s[text] = now_s
            return True
