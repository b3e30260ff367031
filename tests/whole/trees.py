"""What a tree of files is, so that the mount can be compared with what `umoci unpack` makes of the image."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

CHUNK_BYTES = 1 << 20
Facts = dict[str, Any]


class Tree(NamedTuple):
    """`facts` by path; directories in `undated` have the time of their making, so none to compare."""

    facts: dict[bytes, Facts]
    undated: frozenset[bytes]


def unpacked(root: Path, started_ns: int) -> Tree:
    """The tree that an unpacker has made since `started_ns`. It gives a directory that no layer names, or in
    which a later layer makes something, the present time; images say nothing of it."""
    facts = read(root)
    undated = {
        path for path, one in facts.items() if stat.S_ISDIR(one["mode"]) and one["mtime_ns"] >= started_ns
    }
    return Tree(facts, frozenset(undated))


def differences(root: Path, expected: Tree) -> list[str]:
    """One line for everything below `root` that is not as expected."""
    found = read(root)
    lines = [f"{path!r} is missing" for path in sorted(expected.facts.keys() - found.keys())]
    lines += [f"{path!r} should not be there" for path in sorted(found.keys() - expected.facts.keys())]
    for path in sorted(found.keys() & expected.facts.keys()):
        have, want = found[path], expected.facts[path]
        for name in sorted(want.keys() | have.keys()):
            if name == "mtime_ns" and path in expected.undated:
                continue
            if have.get(name) != want.get(name):
                lines.append(f"{path!r}: {name} is {have.get(name)!r:.120}, not {want.get(name)!r:.120}")
    return lines


def read(root: Path) -> dict[bytes, Facts]:
    """Type, mode, owner, time, attributes, content or target, and links, of everything below `root`."""
    facts: dict[bytes, Facts] = {}
    names: dict[int, bytes] = {}
    for path, place in _walk(bytes(root)):
        status = os.lstat(place)
        facts[path] = one = {
            "mode": status.st_mode,
            "owner": (status.st_uid, status.st_gid),
            "mtime_ns": status.st_mtime_ns,
            "nlink": status.st_nlink,
            "attributes": attributes(place),
        }
        if stat.S_ISDIR(status.st_mode):
            continue
        # Of hard links the first in the order of the walk stands for all.
        one["linked to"] = names.setdefault(status.st_ino, path)
        if stat.S_ISLNK(status.st_mode):
            one["target"] = os.readlink(place)
        elif stat.S_ISREG(status.st_mode):
            one["size"] = status.st_size
            if one["linked to"] == path:
                one["content"] = digest(place)
        else:
            one["device"] = status.st_rdev
    return facts


def attributes(place: bytes) -> dict[str, bytes]:
    names = os.listxattr(place, follow_symlinks=False)
    return {name: os.getxattr(place, name, follow_symlinks=False) for name in names}


def digest(place: bytes) -> str:
    content = hashlib.sha256()
    with open(place, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            content.update(chunk)
    return content.hexdigest()


def _walk(root: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(path below the root, path) in sorted order, the root first; nothing is followed."""
    pending = [b""]
    while pending:
        path = pending.pop()
        place = os.path.join(root, path)
        yield path, place
        if stat.S_ISDIR(os.lstat(place).st_mode):
            pending += sorted((os.path.join(path, name) for name in os.listdir(place)), reverse=True)
