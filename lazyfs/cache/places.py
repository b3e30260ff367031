"""Where the cache directory lies."""

from __future__ import annotations

import os

from lazyfs.system.private import check_private, make_private

# Names in <cache>/tmp that nobody needs any more begin so.
REMOVED = "removed-"


def default_cache() -> str:
    if os.geteuid() == 0:
        return "/var/cache/lazyfs"
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "lazyfs")


def cache_directory(chosen: str | None = None) -> str:
    """The real path of the cache directory; made (0700) if it is missing. Raises HostError, UserError."""
    path = os.path.realpath(chosen or default_cache())
    make_private(path, parents=True)
    check_private(path, "cache directory", "choose another with -o cache=DIR", writable_only=True)
    return path
