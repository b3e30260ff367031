"""Values that sources and their users share; light to import."""

from __future__ import annotations

from dataclasses import dataclass

PATIENCE_S = 30.0  # of silence, not for the whole answer: the caller bounds that


@dataclass
class TransferCounters:
    """What a source has done so far. `bytes_fetched`: of answers' bodies, wasted ones included."""

    requests: int = 0
    bytes_fetched: int = 0
    retries: int = 0
