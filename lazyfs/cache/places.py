"""Where the cache directory lies, and the names in it (docs/FORMATS.md, "Cache directory"). Light to import."""

from __future__ import annotations

import os

from lazyfs.system.private import check_private, make_private

# Directly in the cache directory. layer.py, scans.py and uppers.py say what lies in the directories of each kind.
VERSION = "version"
LAYERS, INDEXES, SCANS, REFS, UPPERS, TMP = "layers", "indexes", "scans", "refs", "uppers", "tmp"
PROFILES = "profiles"
# In an image's directory: the file that the kernel mounts, by which mountinfo shows that a mount is ours.
NAMESPACE = "namespace.erofs"
# In every directory that somebody may use while somebody else removes it, see locks.py.
LOCK = "lock"
# Prefix of names in TMP: entries that were removed and only have to be deleted.
REMOVED = "removed-"


def default_cache() -> str:
    """The cache directory of this user, if no other is chosen."""
    if os.geteuid() == 0:
        return "/var/cache/lazyfs"
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "lazyfs")


def cache_directory(chosen: str | None = None) -> str:
    """The real path of the cache directory; made (0700) if it is missing. Raises HostError, UserError."""
    path = os.path.realpath(chosen or default_cache())
    make_private(path, parents=True)
    check_private(path, "cache directory", "choose another with -o cache=DIR", writable_only=True)
    return path


def image_path(cache: str, manifest_digest: str) -> str:
    """The directory of one image's documents, whether it exists or not. `manifest_digest` was checked before."""
    return os.path.join(cache, INDEXES, manifest_digest.removeprefix("sha256:"))
