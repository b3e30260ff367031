"""How often anything is tried again. The loops lie inside each other; here stands their product.

From the outside in, for one reader who wants some blocks:

    sources     each place that has the blocks (an image's registry or layout) is tried once
    rounds      at most MAX_ROUNDS + 1 batches come in a row without making one more of the blocks present
    damage      a batch whose data does not decode or verify is fetched DAMAGE_TRIES times
    ranges      a batch is one range request; one for each REQUEST_BYTES of a span that is larger (core/layer/plan.py),
                and one more where the index's milestones lie
    resolves    a range's URL is looked up again when the server refuses (expired signatures, tokens)
    attempts    a request that fails for a while is sent REQUEST_ATTEMPTS times, with pauses
    redirects   an attempt follows at most MAX_REDIRECTS

Beside that, windows are read by one range for eight of them or more, and kept; and what is guessed around a miss is
fetched by batches of its own, DAMAGE_TRIES times each, for which nobody waits. The inner three multiply only if the
server fails in all those ways at once; the deadline of the request ends them before that.
"""

from __future__ import annotations

# A block that lies in several spans may need a batch for each, and each once more when a part of it was damaged.
MAX_ROUNDS = 5
# A bit flipped on the wire is repaired; a wrong index or a lying server ends in an error.
DAMAGE_TRIES = 3
MAX_RESOLVES = 3
REQUEST_ATTEMPTS = 5
MAX_REDIRECTS = 5  # registry -> blob store is one hop; proxies add one or two
# The bytes came, were verified and kept, and are damaged when they are read back: it is this host's disk.
MAX_REREADS = 8


def ranges_for(sources: int, blocks: int, ranges_in_batch: int = 1) -> int:
    """The most range requests that one reader of `blocks` blocks causes, none of which is here."""
    return sources * blocks * (MAX_ROUNDS + 1) * DAMAGE_TRIES * ranges_in_batch


def requests_for_range() -> int:
    """The most HTTP requests for one range, tokens not counted."""
    return MAX_RESOLVES * REQUEST_ATTEMPTS * (MAX_REDIRECTS + 1)
