#!/usr/bin/env python3
"""``python mount.py IMAGE TARGET [-o OPTIONS]``: the same as ``lazyfs mount``, from a source tree."""

import sys

from lazyfs.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["mount", *sys.argv[1:]]))
