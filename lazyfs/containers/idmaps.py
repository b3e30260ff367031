"""Which ids an ordinary user's container may have: user_namespaces(7), subuid(5)."""

from __future__ import annotations

import os
import pwd

from lazyfs.containers.specmounts import IdRange
from lazyfs.system.process import find_program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_SUBID_BYTES = 1 << 20


def rootless_ranges() -> tuple[tuple[IdRange, ...], tuple[IdRange, ...]]:
    """The uid and gid mappings of an ordinary user's container. Its root is that user; its other ids are the user's
    subordinate ids, if there are any and newuidmap(1) can map them."""
    uid, gid = os.getuid(), os.getgid()
    names = [str(uid)]
    try:  # noqa: SIM105 - contextlib takes 2 ms to import
        names.append(pwd.getpwuid(uid).pw_name)
    except KeyError:
        pass  # a number without a name
    uids, gids = _subordinate("/etc/subuid", names), _subordinate("/etc/subgid", names)
    if not (uids and gids and find_program("newuidmap") and find_program("newgidmap")):
        uids = gids = ()
    return (IdRange(0, uid, 1), *uids), (IdRange(0, gid, 1), *gids)


def _subordinate(path: str, names: Sequence[str]) -> tuple[IdRange, ...]:
    """The first range that subuid(5) gives one of `names`, as container ids from 1 on."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read(_MAX_SUBID_BYTES).splitlines()
    except OSError:
        return ()
    for line in lines:
        fields = line.split(":")
        if len(fields) == 3 and fields[0] in names and fields[1].isdecimal() and fields[2].isdecimal():
            return (IdRange(1, int(fields[1]), int(fields[2])),)
    return ()
