"""Kinds of entries, as tars, trees and namespaces have them."""

from __future__ import annotations

import enum


class Kind(enum.IntEnum):
    """What an entry is. Numbers below 8 are those of EROFS and ext4 directory entries."""

    FILE = 1
    DIR = 2
    CHR = 3
    BLK = 4
    FIFO = 5
    SYMLINK = 7
    HARDLINK = 8
