"""Entries of layers in few words, and trees flattened from them by path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.reader import TarEntry
from lazyfs.core.tar.tree import LayerEntry, Node, flatten

# By the type in st_mode (inode(7)).
KINDS = {
    0o100000: Kind.FILE,
    0o040000: Kind.DIR,
    0o020000: Kind.CHR,
    0o060000: Kind.BLK,
    0o010000: Kind.FIFO,
    0o120000: Kind.SYMLINK,
}


def entry(path: str, kind: Kind, target: str = "", *, size: int = 0, **changes: Any) -> LayerEntry:
    mode = 0o755 if kind is Kind.DIR else 0o644
    made = TarEntry(path.encode(), kind, mode, 5, 6, size, 7, 8, target.encode())
    for name, value in changes.items():
        setattr(made, name, value)
    return LayerEntry(made, 4096 * size)


def file(path: str, size: int = 1, **changes: Any) -> LayerEntry:
    return entry(path, Kind.FILE, size=size, **changes)


def directory(path: str, **changes: Any) -> LayerEntry:
    return entry(path, Kind.DIR, **changes)


def symlink(path: str, target: str) -> LayerEntry:
    return entry(path, Kind.SYMLINK, target)


def hardlink(path: str, target: str) -> LayerEntry:
    return entry(path, Kind.HARDLINK, target)


def walk(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    pending = [(path, node)]
    while pending:
        path, node = pending.pop()
        yield path, node
        for name, child in (node.children or {}).items():
            pending.append((f"{path}/{name.decode()}" if path else name.decode(), child))


def paths(*layers: list[LayerEntry]) -> set[str]:
    return {path for path, _ in walk(flatten(layers)) if path}


def tree(*layers: list[LayerEntry]) -> dict[str, Node]:
    return dict(walk(flatten(layers)))
