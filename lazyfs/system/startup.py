"""Importing this module turns the cycle collector off while a process starts. Import it before anything large.

The collector would look again and again at objects that imports make and that all stay: a tenth of a daemon's start.
Commands that end after some milliseconds of work never need it.
"""

from __future__ import annotations

import gc

gc.disable()


def finish() -> None:
    """Turns the collector on; it never looks at objects that exist by now."""
    gc.freeze()
    # More than Python's 700: an image's tree has ten objects for each file, none of them garbage. This saves a sixth of
    # an index made from kept scans.
    gc.set_threshold(20_000)
    gc.enable()
