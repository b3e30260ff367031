"""Settings of Python's garbage collector and thread switching, for the whole process. Entry points call this.

Importing makes objects that all stay, and the collector examines them again and again: that is a tenth of a daemon's
start.
"""

from __future__ import annotations

import gc
import sys

# Python's default of 700 is too small: the tree of an image has ten objects for each file, none of them garbage.
_NEW_OBJECTS = 20_000
# Decoding hands the GIL between threads thousands of times a second, so that Python's default of 5 ms makes an index 7
# % slower.
_SWITCH_S = 0.0005


def begin() -> None:
    """No collection until `finish`. Call it before anything large is imported."""
    gc.disable()


def finish() -> None:
    """Starts the collector, which never examines the objects that exist by now."""
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS)
    gc.enable()


def command() -> None:
    """For a command. Most end before the first collection; those that make an index have threads that decode."""
    gc.set_threshold(_NEW_OBJECTS)
    sys.setswitchinterval(_SWITCH_S)
