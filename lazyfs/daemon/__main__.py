"""`python -m lazyfs.daemon`: the worker. The name must not change: at an upgrade, an older keeper starts it."""

from __future__ import annotations

import sys

from lazyfs.system import startup

startup.begin()

from lazyfs.daemon.worker import main  # noqa: E402 - it imports all that is large

sys.exit(main())
