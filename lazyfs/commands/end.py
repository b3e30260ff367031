"""How a command ends."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def end(code: int) -> NoReturn:
    """Ends this process without taking the interpreter apart, which takes 3 ms: it flushes output, and the kernel
    closes the rest. Nothing may be left to exit handlers or threads."""
    for stream in (sys.stdout, sys.stderr):
        try:  # noqa: SIM105 - contextlib takes 2 ms to import
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # whoever read it has gone, or it was closed before the start
    os._exit(code)
