"""Values that sources of blobs and their users share; light to import."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class TransferCounters:
    """What a source has done so far. `bytes_fetched` are bytes of answers' bodies, also of wasted ones."""

    requests: int = 0
    bytes_fetched: int = 0
    retries: int = 0


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with full jitter: attempt n waits a random time up to min(cap, base * 2^n)."""

    attempts: int = 5
    base_s: float = 0.2
    cap_s: float = 5.0

    def delay_s(self, attempt: int) -> float:
        """How long to wait after failed attempt number `attempt` (from 1), in seconds."""
        return random.uniform(0, min(self.cap_s, self.base_s * 2**attempt))


@dataclass(frozen=True)
class SourceOptions:
    """How to reach a source.

    `insecure`: plain http is allowed to any host, and certificates are not verified. `ca_files`: more trusted
    CAs (PEM). `auth_files`: credential files in order of preference; None = the usual places of this process.
    `environ`: what credential helpers get; None = this process's environment. `max_connections`: for ranges
    and documents; streams have as many of their own. `patience_s`: a server that is silent for so long is
    asked again on a new connection.
    """

    insecure: bool = False
    ca_files: tuple[str, ...] = ()
    auth_files: tuple[str, ...] | None = None
    max_connections: int = 8
    environ: Mapping[str, str] | None = None
    patience_s: float = 30.0
