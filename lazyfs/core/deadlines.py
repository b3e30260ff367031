"""What `timeout=` promises: a read(2) ends within it, with its bytes or an error."""

from __future__ import annotations

# When a readahead fails, the kernel asks once more, for the page that read(2) waits for.
KERNEL_ASKS = 2


def answer_s(timeout_s: float) -> float:
    """The longest that one answer to the kernel may take, in seconds.

    Also the longest that a server may be silent before it is asked again on a new connection: so a connection that
    fell silent costs a read some time, but does not fail it.
    """
    return timeout_s / KERNEL_ASKS
