"""Tree -> the place of each inode in EROFS metadata: a nid is a place, so places come first.

The children of a directory lie together, so listing it touches few pages. The kernel demands that an inline tail does
not cross the end of a block, so a record (inode, attributes, tail) never does; later records fill the gaps.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping

from lazyfs.core.erofs.format import (
    ACL_ACCESS,
    ACL_DEFAULT,
    BLOCK_BYTES,
    CHUNK_INDEX,
    DIRENT,
    FILE,
    INODE_BYTES,
    NAME_MAX,
    SLOT_BYTES,
    SYMLINK_MAX,
    acl_is_valid,
    xattr_body,
)
from lazyfs.core.erofs.unread import FILE_BYTES, FILE_SLOTS, PlainFiles, Run, Stored, StoredChildren
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import Node
from lazyfs.errors import ImageError

_HINT = "the image itself is at fault: build it again, or report it to its publisher"
_NO_NAMES = (b"", b".", b"..", b"/", b"\0")
_ACL_EMPTY = b"\2\0\0\0"
# Looking up members of an Enum is slow, and happens for each name.
_IS_FILE, _IS_DIR = Kind.FILE, Kind.DIR
# Inode, byte position, attribute area, size of a directory's or link's content, bytes of it behind the inode.
Record = tuple[Node, int, bytes, int, int]


class Layout:
    """Places of all inodes, and of content outside their records."""

    def __init__(self, start: int) -> None:
        self.files: dict[Node, int] = {}  # regular files with data and without attributes -> byte position
        self.records: list[Record] = []  # all others
        self.unread: PlainFiles | None = None  # where the files in `runs` come from
        self.runs: list[Run] = []  # unread files
        self.rooms: dict[int, int] = {}  # of the layers in which their data lies, the sizes of the devices
        self.nids: dict[Node | int, int] = {}  # of unread files, by the nid they had, only in directories that changed
        self.parents: dict[Node, Node] = {}
        self.names: dict[Node, list[bytes]] = {}  # of each directory that changed, sorted, with "." and ".."
        self.stored_nids: dict[Node, array[int]] = {}  # of the others: of all entries
        self.outside: dict[Node, int] = {}  # where content outside the records begins
        self.count = 0  # of inodes
        self.end = 0  # bytes, a multiple of the block size; valid after walk()
        self._position = start
        self._gap = self._gap_end = start

    def walk(self, root: Node) -> None:
        self.parents[root] = root
        self._place(root)
        pending = [root]
        while pending:
            directory = pending.pop()
            subdirectories: list[Node] = []
            children = directory.children or {}
            if isinstance(children, StoredChildren):
                assert self.unread in (None, children.files)
                self.unread = children.files
                self.rooms |= children.rooms()
            if (stored := stored_form(directory)) is not None:
                self._walk_stored(directory, stored, subdirectories)
            else:
                known = raw_children(directory)
                for name in self.names[directory]:
                    if (child := known.get(name)) is not None:
                        self._walk_child(directory, name, child, subdirectories)
            pending.extend(reversed(subdirectories))
        self._place_outside()

    def _walk_stored(self, directory: Node, stored: Stored, subdirectories: list[Node]) -> None:
        found = array("I")
        dots = iter((directory, self.parents[directory]))
        at = 0
        for place in (*sorted(stored.others), len(stored.nids)):
            self._copy(stored.nids[at:place], found)
            at = place + 1
            if place < len(stored.nids):
                node = stored.others[place]
                if node is None:
                    node = next(dots)
                else:
                    self._walk_child(directory, place, node, subdirectories)
                found.append(self.nids[node])
        self.stored_nids[directory] = found

    def _walk_child(
        self, directory: Node, name: bytes | int, child: Node | int, subdirectories: list[Node]
    ) -> None:
        """`name`: or the place in a stored directory. `child`: or the nid of an unread file."""
        if isinstance(child, int):
            moved = array("I")
            self._copy(array("I", (child,)), moved)
            self.nids[child] = moved[0]
            return
        kind = child.kind
        if kind is _IS_DIR:
            if child in self.parents:
                raise ImageError(f"directory {_name(directory, name)!r} has two parents", _HINT)
            self.parents[child] = directory
            subdirectories.append(child)
        elif child in self.nids:
            return
        if kind is _IS_FILE and child.size and not child.xattrs:
            self.files[child] = position = self._allocate(FILE.size)
            self.nids[child] = position // SLOT_BYTES
            self.count += 1
            return
        try:
            self._place(child)
        except ImageError as error:
            raise ImageError(f"{_name(directory, name)!r}: {error.message}", error.hint) from None

    def _copy(self, nids: array[int], moved: array[int]) -> None:
        """Places unread files, each as _allocate would, and appends the nids that they get."""
        at = 0
        while at < len(nids):
            if self._gap_end - self._gap >= FILE_BYTES:
                position, end = self._gap, self._gap_end
            else:
                position = self._allocate(FILE_BYTES)
                end = position + BLOCK_BYTES - position % BLOCK_BYTES
            run = nids[at : at + (end - position) // FILE_BYTES]
            behind = position + FILE_BYTES * len(run)
            if position == self._gap and end == self._gap_end:
                self._gap = behind
            else:
                self._position = behind
            self.runs.append(Run(run, position))
            moved.extend(range(position // SLOT_BYTES, behind // SLOT_BYTES, FILE_SLOTS))
            self.count += len(run)
            at += len(run)

    def _place(self, node: Node) -> None:
        body = xattr_body(_kept_xattrs(node)) if node.xattrs else b""
        fixed = INODE_BYTES + len(body)
        size = tail = 0
        if node.kind == Kind.FILE:
            if node.size:
                fixed += -fixed % CHUNK_INDEX.size + CHUNK_INDEX.size
        elif node.kind == Kind.DIR:
            if (stored := stored_form(node)) is not None:
                tail = len(stored.blocks[-1])
                size = (len(stored.blocks) - 1) * BLOCK_BYTES + tail
            else:
                self.names[node] = names = _sorted_names(raw_children(node))
                size = tail = sum(map(len, names)) + DIRENT.size * len(names)
                if size > BLOCK_BYTES:
                    blocks, tail = directory_blocks(names)
                    size = (len(blocks) - 1) * BLOCK_BYTES + tail
        elif node.kind == Kind.SYMLINK:
            size = tail = len(node.target)
            if not 0 < size <= SYMLINK_MAX or b"\0" in node.target:
                raise ImageError(
                    f"symbolic link target of {size} bytes is not valid",
                    "Linux allows 1 to 4095 bytes, none of them NUL",
                )
        if fixed + tail > BLOCK_BYTES:
            tail = 0
        position = self._allocate(fixed + tail)
        self.nids[node] = position // SLOT_BYTES
        self.count += 1
        self.records.append((node, position, body, size, tail))

    def _allocate(self, length: int) -> int:
        length += -length % SLOT_BYTES
        if length <= self._gap_end - self._gap:
            position = self._gap
            self._gap += length
            return position
        position = self._position
        left = -position % BLOCK_BYTES or BLOCK_BYTES
        # Attributes may cross blocks, the inode itself and inline tails may not.
        if (length if length <= BLOCK_BYTES else INODE_BYTES) > left:
            if left > self._gap_end - self._gap:
                self._gap, self._gap_end = position, position + left
            position += left
        self._position = position + length
        return position

    def _place_outside(self) -> None:
        end = self._position + -self._position % BLOCK_BYTES
        for node, _, _, size, tail in self.records:
            if size > tail:
                self.outside[node] = end
                end += size - tail
                end += -end % BLOCK_BYTES
        self.end = end


def stored_form(directory: Node) -> Stored | None:
    """A directory that is as it was read."""
    children = directory.children
    return children.stored if isinstance(children, StoredChildren) else None


def raw_children(directory: Node) -> Mapping[bytes, Node | int]:
    """The children of a directory by name; an unread file is the nid it had."""
    children = directory.children or {}
    return children.raw() if isinstance(children, StoredChildren) else children


def _name(directory: Node, name: bytes | int) -> bytes:
    stored = stored_form(directory)
    return stored.name(name) if stored is not None and isinstance(name, int) else bytes(name)


def _sorted_names(children: Mapping[bytes, Node | int]) -> list[bytes]:
    """The names of a directory in byte order, "." and ".." among them. ImageError if one is not valid."""
    joined = b"/".join(children)
    if (
        b"\0" in joined
        or (children and joined.count(b"/") != len(children) - 1)
        or max(map(len, children), default=0) > NAME_MAX
        or any(name in children for name in _NO_NAMES)
    ):
        name = next(
            name for name in children if name in _NO_NAMES or len(name) > NAME_MAX or b"/" in name or b"\0" in name
        )
        raise ImageError(f"file name {name[:300]!r} is not valid", _HINT)
    return sorted((b".", b"..", *children))


def directory_blocks(names: list[bytes]) -> tuple[list[list[bytes]], int]:
    """The names of each block of a directory, and the number of bytes used in the last block."""
    blocks: list[list[bytes]] = []
    current: list[bytes] = []
    used = 0
    for name in names:
        length = DIRENT.size + len(name)
        if used + length > BLOCK_BYTES:
            blocks.append(current)
            current = []
            used = 0
        current.append(name)
        used += length
    blocks.append(current)
    return blocks, used


def _kept_xattrs(node: Node) -> dict[bytes, bytes]:
    """The attributes that setxattr(2) takes for this kind of file. No unpacked image can have others, and the kernel
    would list them but not return them. Left out: user.* unless on files and directories, ACLs on links, default ACLs
    unless on directories, ACLs without entries (setting one removes the ACL). Raises ImageError: a malformed ACL."""
    kind = node.kind
    kept = {}
    for name, value in node.xattrs.items():
        if name in (ACL_ACCESS, ACL_DEFAULT):
            if kind == Kind.SYMLINK or (name == ACL_DEFAULT and kind != Kind.DIR) or value == _ACL_EMPTY:
                continue
            if not acl_is_valid(value):
                raise ImageError(f"its ACL of {len(value)} bytes is malformed", _HINT)
        elif name.startswith(b"user.") and kind not in (Kind.FILE, Kind.DIR):
            continue
        kept[name] = value
    return kept
