"""`python -m lazyfs.daemon`: the worker. Its name stays: at an upgrade, a keeper of an older version starts it."""

from __future__ import annotations

import sys

from lazyfs.system import startup

startup.begin()

from lazyfs.daemon.worker import main  # noqa: E402 - it imports all that is large

sys.exit(main())
