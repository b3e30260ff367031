"""Values that sources and their users share; light to import."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

# Is given the bytes of an answer as they come, in order and each once, whatever is asked for again.
Take = Callable[[bytes], Awaitable[None]]

PATIENCE_S = 30.0  # of silence, not for the whole answer: the caller bounds that


@dataclass
class TransferCounters:
    """What a source has done so far. `bytes_fetched`: of answers' bodies, wasted ones included."""

    requests: int = 0
    bytes_fetched: int = 0
    retries: int = 0
