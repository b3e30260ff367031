"""Layers flattened to one tree, with the result of unpacking them one upon the other.

Rules: OCI image-spec, layer.md ("Applying Changesets", "Whiteouts"), and where it is silent, what `umoci
unpack` and containerd do. Entries apply in tar order. A whiteout hides only what lower layers brought. So the names
that the current layer wrote are remembered (`_upper`): they survive a later whiteout of that layer.

Nothing here touches a file system: a link that points "outside" resolves inside the image. All walks are loops,
because a hostile tree may be deeper than Python's stack.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field

from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.reader import MAX_NAME, MAX_PATH, TarEntry
from lazyfs.errors import ImageError

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_RESERVED = b".wh..wh."  # AUFS' own files, which old builders left in layers
MAX_LINK_HOPS = 40  # path_resolution(7): the kernel follows no more either
_HINT = "the image itself is at fault: build it again, or report it to its publisher"
_HOST_XATTR = b"security.selinux"  # a label of the building host, which umoci leaves out as well
# What Linux file systems store; setxattr(2) refuses other names, and unpackers then go on without them.
_XATTR_PREFIXES = (b"user.", b"trusted.", b"security.", b"system.posix_acl_")


@dataclass(slots=True, eq=False)
class Node:
    """An inode; hard links of each other share one Node. Sizes in bytes, times since the epoch."""

    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime_s: int
    mtime_ns: int
    size: int = 0
    target: bytes = b""  # SYMLINK
    rdev_major: int = 0
    rdev_minor: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    children: MutableMapping[bytes, Node] | None = None  # DIR only
    layer: int = -1  # FILE with data: number of the layer ...
    address: int = 0  # ... and the byte in its data device where the file starts
    nlink: int = 1  # files: number of names; directories: 2 + number of subdirectories


class UnreadChildren(MutableMapping[bytes, Node]):
    """The children of a directory in a tree that was read back, of which a node is made when somebody asks for one."""

    __slots__ = ()

    @abstractmethod
    def nodes(self) -> list[Node]:
        """Those that are nodes already: all but plain files, which have one name each."""

    @abstractmethod
    def layers(self) -> set[int]:
        """Numbers of the layers in which the data of the others lies."""


@dataclass(slots=True)
class LayerEntry:
    """A tar entry and the address of its data in the layer's data device, as the indexer gave it out."""

    entry: TarEntry
    address: int


def flatten(layers: Sequence[Iterable[LayerEntry]]) -> Node:
    """Applies `layers`, the lowest first, and returns the root directory.

    Raises ImageError for what cannot be unpacked: a hard link without a file to link to, a path through
    something that is no directory, a loop of symbolic links, a root that is no directory.
    """
    return extend(_missing_directory(), layers)


def extend(base: Node, layers: Sequence[Iterable[LayerEntry]], first: int = 0) -> Node:
    """Applies further layers to `base`, a tree of lower ones, with the result of flatten() of all. `base` belongs to
    the result; after an ImageError it is of no use.

    `first`: the number of the first of `layers`; nodes of `base` have lower ones.
    """
    tree = _Tree(base)
    for number, layer in enumerate(layers, first):
        tree.start_layer(number)
        for item in layer:
            tree.apply(item.entry, item.address)
    _count_links(tree.root)
    return tree.root


class _Tree:
    def __init__(self, root: Node) -> None:
        self.root = root
        self._layer = -1
        # Directory -> names in it that the current layer wrote, or that lead to such names.
        self._upper: defaultdict[Node, set[bytes]] = defaultdict(set)
        self._known: tuple[bytes, Node] | None = None  # last parent path resolved, and to what

    def start_layer(self, number: int) -> None:
        self._layer = number
        self._upper.clear()
        self._known = None

    def apply(self, entry: TarEntry, address: int) -> None:
        if not entry.path:
            if entry.kind is not Kind.DIR:
                raise ImageError("a layer replaces the root directory by something else", _HINT)
            _set_metadata(self.root, entry)
            return
        parent_path, _, name = entry.path.rpartition(b"/")
        if _RESERVED in entry.path and _is_reserved(parent_path, name):
            return
        if name.startswith(WHITEOUT):
            self._white_out(parent_path, name)
            return
        parent = self._make_parent(parent_path)
        children = _children(parent)
        self._upper[parent].add(name)
        old = children.get(name)
        if entry.kind is Kind.DIR and old is not None and old.kind is Kind.DIR:
            _set_metadata(old, entry)
            return
        if old is not None:
            del children[name]
        # Only now, because a hard link to what it replaces, or to something below, has lost its target.
        node = self._link_target(entry) if entry.kind is Kind.HARDLINK else self._node(entry, address)
        children[name] = node
        if old is not None or node.kind is Kind.SYMLINK:
            self._known = None  # its path may lead through what has changed

    def _node(self, entry: TarEntry, address: int) -> Node:
        node = Node(
            kind=entry.kind,
            mode=0,
            uid=0,
            gid=0,
            mtime_s=0,
            mtime_ns=0,
            size=entry.size,
            target=entry.target,
            rdev_major=entry.rdev_major,
            rdev_minor=entry.rdev_minor,
            children={} if entry.kind is Kind.DIR else None,
        )
        if entry.size:
            node.layer, node.address = self._layer, address
        _set_metadata(node, entry)
        return node

    def _resolve(self, path: bytes) -> list[tuple[bytes, Node | None]]:
        """The names that lead to `path`, all symbolic links followed inside the root, each with its node.

        A name that is missing, or below a non-directory, has None, and ".." in a link takes it back (as
        filepath-securejoin does for umoci and containerd).
        """
        trail: list[tuple[bytes, Node | None]] = []
        node: Node | None = self.root
        pending = path.split(b"/")
        pending.reverse()
        hops = 0
        while pending:
            name = pending.pop()
            if not name or name == b".":
                continue
            if name == b"..":
                if trail:
                    trail.pop()
                node = trail[-1][1] if trail else self.root
                continue
            child = node.children.get(name) if node is not None and node.children is not None else None
            if child is not None and child.kind is Kind.SYMLINK:
                hops += 1
                if hops > MAX_LINK_HOPS:
                    raise ImageError(f"a layer's path {_show(path)} is a loop of symbolic links", _HINT)
                if child.target.startswith(b"/"):
                    trail.clear()
                    node = self.root
                pending.extend(reversed(child.target.split(b"/")))
                continue
            trail.append((name, child))
            node = child
        return trail

    def _make_parent(self, path: bytes) -> Node:
        """The directory at `path`, made with all its parents where missing."""
        if self._known is not None and self._known[0] == path:
            return self._known[1]
        node = self.root
        length = 0
        for name, child in self._resolve(path):
            length += len(name) + 1
            if child is None:
                # Links can add up to any depth; names in them were not checked when the tar was read.
                if len(name) > MAX_NAME or length > MAX_PATH:
                    raise ImageError(f"a layer's path {_show(path)} is too long, links resolved", _HINT)
                child = _missing_directory()
                _children(node)[name] = child
            elif child.kind is not Kind.DIR:
                raise ImageError(f"a layer puts a file below {_show(path)}, which is no directory", _HINT)
            self._upper[node].add(name)
            node = child
        self._known = (path, node)
        return node

    def _lookup(self, path: bytes) -> Node | None:
        """The directory at `path`, if it is there and is one."""
        trail = self._resolve(path)
        node = trail[-1][1] if trail else self.root
        return node if node is not None and node.kind is Kind.DIR else None

    def _link_target(self, entry: TarEntry) -> Node:
        # The last name is not followed: a hard link to a symbolic link is one more name for the link.
        parent_path, _, name = entry.target.rpartition(b"/")
        parent = self._lookup(parent_path)
        node = _children(parent).get(name) if parent is not None else None
        if node is None or node.kind is Kind.DIR:
            problem = "is not there" if node is None else "is a directory"
            link = f"{_show(entry.path)} to {_show(entry.target)}"
            raise ImageError(f"a layer's hard link {link} cannot be made: the latter {problem}", _HINT)
        return node

    def _white_out(self, parent_path: bytes, name: bytes) -> None:
        hidden = name[len(WHITEOUT) :]
        if hidden in (b"", b".", b".."):  # unpackers remove the directory itself, or the one above it
            raise ImageError(f"a layer has a whiteout without a name in {_show(parent_path)}", _HINT)
        parent = self._lookup(parent_path)
        if parent is None:
            return
        self._known = None
        if name == OPAQUE:
            self._prune(parent)
            return
        children = _children(parent)
        child = children.get(hidden)
        if child is None:
            return
        if hidden not in self._upper.get(parent, ()):
            del children[hidden]
        elif child.kind is Kind.DIR:
            self._prune(child)

    def _prune(self, directory: Node) -> None:
        """Removes all that lower layers brought below `directory`."""
        pending = [directory]
        while pending:
            node = pending.pop()
            children = _children(node)
            upper = self._upper.get(node, ())
            for name in [name for name in children if name not in upper]:
                del children[name]
            pending += [child for child in read_nodes(children) if child.kind is Kind.DIR]


def read_nodes(children: MutableMapping[bytes, Node]) -> list[Node]:
    """The children that are nodes. The others are plain files with one name (UnreadChildren)."""
    return children.nodes() if isinstance(children, UnreadChildren) else list(children.values())


def _missing_directory() -> Node:
    return Node(Kind.DIR, 0o755, 0, 0, 0, 0, children={})


def _children(directory: Node) -> MutableMapping[bytes, Node]:
    assert directory.children is not None
    return directory.children


def _set_metadata(node: Node, entry: TarEntry) -> None:
    node.mode = 0o777 if entry.kind is Kind.SYMLINK else entry.mode  # symlink(7): Linux knows no other
    node.uid, node.gid = entry.uid, entry.gid
    node.mtime_s, node.mtime_ns = entry.mtime_s, entry.mtime_ns
    node.xattrs = {
        name: value
        for name, value in entry.xattrs.items()
        if name.startswith(_XATTR_PREFIXES) and name != _HOST_XATTR
    }


def _is_reserved(parent_path: bytes, name: bytes) -> bool:
    """Whether an entry is one of AUFS' own files, or lies in a directory of them."""
    if name.startswith(_RESERVED) and name != OPAQUE:
        return True
    return any(part.startswith(_RESERVED) for part in parent_path.split(b"/"))


def _count_links(root: Node) -> None:
    pending = [root]
    files: dict[Node, int] = defaultdict(int)
    while pending:
        directory = pending.pop()
        directory.nlink = 2
        for child in read_nodes(_children(directory)):
            if child.kind is Kind.DIR:
                directory.nlink += 1
                pending.append(child)
            else:
                files[child] += 1
    for node, names in files.items():
        node.nlink = names


def _show(path: bytes) -> str:
    text = path.decode("utf-8", "backslashreplace")
    return ascii(text if len(text) <= 200 else text[:200] + "…")
