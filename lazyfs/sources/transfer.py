"""Values that sources of blobs and their users share; light to import."""

from __future__ import annotations

from dataclasses import dataclass

PATIENCE_S = 30.0  # of silence, not for the whole answer: the caller bounds that


@dataclass
class TransferCounters:
    """What a source has done so far. `bytes_fetched` are bytes of answers' bodies, also of wasted ones."""

    requests: int = 0
    bytes_fetched: int = 0
    retries: int = 0
