"""What keeper and worker agree on (keeperlink.py has the whole conversation).

A module of its own, because it is cheap to import: a command waits for the keeper's first worker, so the keeper starts
that before it loads json (4 ms).
"""

from __future__ import annotations

ENVIRONMENT = "LAZYFS_FDS"
MAX_NAME_BYTES = 1024
MAX_MESSAGE_BYTES = 8192  # a name, each byte of which may become six in JSON

# Exit codes by which the worker tells the keeper what next; any other means: failed, start another.
EXIT_ENDED = 0  # the FUSE connection is gone: the keeper ends too
EXIT_SUCCESSOR = 75  # drained, as SIGTERM or an upgrade asked: start the successor at once (EX_TEMPFAIL)


def handover(numbers: dict[str, int | None], held: dict[str, int]) -> bytes:
    """The JSON in a worker's memory file: numbers of descriptors by purpose, and those held by name."""
    text = "{}"
    if held:
        import json

        text = json.dumps(held)
    pairs = [f'"{name}": {"null" if number is None else number}' for name, number in numbers.items()]
    return f'{{{", ".join(pairs)}, "held": {text}}}'.encode()
