"""Directories that only their owner may use."""

from __future__ import annotations

import os
import stat

from lazyfs.errors import HostError, UserError


def make_private(path: str, parents: bool = False) -> None:
    """Makes the directory (0700) if it is missing; with `parents` those above it, too (0755). Raises HostError."""
    try:
        if parents:
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise HostError(
            f"cannot make the directory {path}: {error.strerror}", "check the rights of its parent"
        ) from None


def check_private(path: str, what: str, hint: str, writable_only: bool = False) -> None:
    """Raises UserError unless `path` is a real directory of this user that others cannot use (with `writable_only`:
    cannot write to). HostError if that cannot be found out."""
    try:
        status = os.lstat(path)
    except OSError as error:
        raise HostError(f"cannot use the {what} {path}: {error.strerror}", hint) from None
    if not stat.S_ISDIR(status.st_mode):
        raise UserError(f"the {what} {path} is not a directory", hint)
    if status.st_uid != os.geteuid():
        raise UserError(f"the {what} {path} belongs to user {status.st_uid}, not to you", hint)
    forbidden = 0o022 if writable_only else 0o077
    if status.st_mode & forbidden:
        raise UserError(
            f"other users may {'write' if writable_only else 'enter'} the {what} {path}", f"chmod 700 {path}"
        )
