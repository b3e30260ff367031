"""How Python's collector and its switching of threads are set, called by entry points: both are of the whole process.

Importing makes objects that all stay, and the collector looks at them again and again: a tenth of the time in which the
daemon is ready (279 ms with it, 244 ms without).
"""

from __future__ import annotations

import gc
import sys

# Not after each 700 objects, Python's default: the tree of an image has ten for each file, none of them garbage.
_NEW_OBJECTS = 20_000
# Decoding hands the GIL between threads thousands of times a second: 5 ms of waiting for it, Python's default, is too
# long (an index is made at 97 MB/s with that, at 104 with this).
_SWITCH_S = 0.0005


def begin() -> None:
    """Of a process that stays: no collection until `finish`. To be called before anything large is imported."""
    gc.disable()


def finish() -> None:
    """The collector works from now on; what there is by now it never looks at."""
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS)
    gc.enable()


def command() -> None:
    """Of a command: most end before the first collection; one that makes an index has threads that decode."""
    gc.set_threshold(_NEW_OBJECTS)
    sys.setswitchinterval(_SWITCH_S)
