"""Failed HTTP requests: whose fault it is, and whether and when to try again."""

from __future__ import annotations

import random
from dataclasses import dataclass

from lazyfs.core.retries import REQUEST_ATTEMPTS


class Failed(Exception):
    """One attempt failed."""

    def __init__(self, problem: str, hint: str, *, temporary: bool, wait_s: float | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint
        self.temporary = temporary
        self.wait_s = wait_s


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with full jitter: attempt n waits a random time up to min(cap, base * 2^n)."""

    attempts: int = REQUEST_ATTEMPTS
    base_s: float = 0.2
    cap_s: float = 5.0

    def delay_s(self, attempt: int) -> float:
        """How long to wait after failed attempt number `attempt` (from 1), in seconds."""
        return random.uniform(0, min(self.cap_s, self.base_s * 2**attempt))
