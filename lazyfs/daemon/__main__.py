"""`python -m lazyfs.daemon`: the worker. Its name stays: at an upgrade, a keeper of an older version starts it."""

from __future__ import annotations

import sys

from lazyfs.daemon.worker import main

sys.exit(main())
