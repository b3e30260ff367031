"""A namespace read as a whole: checked, and turned back into the tree that it was written from."""

from __future__ import annotations

import operator
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import compress
from operator import itemgetter
from typing import Any

from lazyfs.core.erofs.format import (
    BLOCK_BYTES,
    DIRENT,
    NAME_MAX,
    NSEC_PER_S,
    RDEV_MAJOR_MAX,
    Device,
)
from lazyfs.core.erofs.metadata import Inode, Metadata, damaged
from lazyfs.core.erofs.unread import PlainFiles
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import Node, UnreadChildren

__all__ = ["Device", "ErofsReader", "Inode"]

_IS_FILE, _IS_DIR = Kind.FILE, Kind.DIR
_FILE_TYPE = int(Kind.FILE)
_IS_FILE_TYPE = bytes(file_type == _FILE_TYPE for file_type in range(256))
_IS_OTHER_TYPE = bytes(file_type != _FILE_TYPE for file_type in range(256))
_PERMISSIONS = 0o7777


class ErofsReader(Metadata):
    """As Metadata, with walks over all of it. After `check` the kernel may be given the same bytes."""

    def check(self) -> None:
        """Walks all of it. Raises ImageError for anything that a kernel or a user could stumble over.

        Directories form a tree with right "." and ".."; names are valid, sorted and unique; types, link
        counts and the number of inodes agree; file data lies inside its device; attributes parse.
        """
        links: dict[int, int] = {}  # names of each non-directory
        nlinks: dict[int, int] = {}
        kinds: dict[int, int] = {self.root_nid: Kind.DIR}
        content = 0
        pending = [(self.root_nid, self.root_nid)]
        while pending:
            nid, parent = pending.pop()
            node = self._checked_inode(nid)
            # Directories that share blocks could make this walk arbitrarily long. Honest ones share none.
            content += node.size
            if content > self.length:
                raise damaged("directories overlap")
            previous = b""
            subdirectories = dots = 0
            for name, child, file_type in self.entries(nid):
                if name <= previous:
                    raise damaged(f"names of directory {nid} are not in order")
                previous = name
                if name in (b".", b".."):
                    dots += 1
                    if child != (nid if name == b"." else parent) or file_type != Kind.DIR:
                        raise damaged(f"bad {name.decode()} in directory {nid}")
                    continue
                known = kinds.get(child)
                if file_type == Kind.DIR:
                    if known is not None:
                        raise damaged(f"directory {child} has two parents")
                    subdirectories += 1
                    pending.append((child, nid))
                else:
                    if known is None:
                        inode = self._checked_inode(child)
                        known = inode.kind
                        nlinks[child] = inode.nlink
                    if known != file_type:
                        raise damaged(f"wrong file type in directory {nid}")
                    links[child] = links.get(child, 0) + 1
                kinds[child] = file_type
            if dots != 2 or node.nlink != 2 + subdirectories:
                raise damaged(f"wrong links of directory {nid}")
        if links != nlinks:
            raise damaged("wrong link counts")
        if len(kinds) != self.inode_count:
            raise damaged(f"it has {len(kinds)} inodes, not {self.inode_count}")

    def _checked_inode(self, nid: int) -> Inode:
        inode = self.inode(nid)
        self.xattrs(nid)
        if inode.kind is Kind.SYMLINK:
            self.readlink(nid)
        return inode

    def tree(self, numbers: Sequence[int] | None = None) -> Node:
        """The tree that was written, less the attributes that the writer leaves out. A file's `Node.layer` is
        numbers[device], without `numbers` the device's number.

        Raises ImageError if what is read is damaged, a directory has two parents, or directories overlap. It does not
        check the rest of what `check` does.
        """
        layers = range(len(self.devices)) if numbers is None else numbers
        files = PlainFiles(self.buffer, self.devices, layers)
        root = self._node(self.root_nid, layers)
        nodes = {self.root_nid: root}
        pending = [(self.root_nid, root)]
        plain: list[int] = []  # nids of what seem to be plain files, of all directories
        # Of each directory: where its files begin in `plain`, its children, the names of these files.
        places: list[tuple[int, dict[bytes, Any], list[bytes]]] = []
        content = 0
        while pending:
            nid, directory = pending.pop()
            content += self._directory(nid)[0]
            if content > self.length:
                raise damaged("directories overlap")
            names, nids, types, block = self._listing(nid)
            children: dict[bytes, Any] = dict(zip(names, nids, strict=True))
            if len(children) != len(names) or not {b".", b".."} <= children.keys():
                raise damaged(f"bad names in directory {nid}")
            is_file = types.translate(_IS_FILE_TYPE)
            places.append((len(plain), children, list(compress(names, is_file))))
            plain += compress(nids, is_file)
            for name, child, kind in compress(zip(names, nids, types, strict=True), types.translate(_IS_OTHER_TYPE)):
                if name not in (b".", b".."):
                    children[name] = node = self._shared(child, nodes, layers, kind)
                    if node.kind is _IS_DIR:
                        pending.append((child, node))
            del children[b"."], children[b".."]
            dots = (names.index(b"."), names.index(b".."))
            directory.children = UnreadChildren(children, files, block, dots)
            places[-1] = (places[-1][0], directory.children, places[-1][2])
        flags = files.plain(plain)
        if flags is None:
            raise damaged("a file is outside its device, has two names, or is of another form")
        for number in compress(range(len(plain)), map(operator.not_, flags)):
            start, children, names = places[bisect_right(places, number, key=itemgetter(0)) - 1]
            dict.__setitem__(children, names[number - start], self._shared(plain[number], nodes, layers, _FILE_TYPE))
        return root

    def _shared(self, nid: int, nodes: dict[int, Node], layers: Sequence[int], file_type: int) -> Node:
        """The one node of an inode. Raises ImageError if it is of another type, or a directory that has a parent."""
        node = nodes.get(nid)
        if node is None:
            nodes[nid] = node = self._node(nid, layers)
        elif node.kind is _IS_DIR:
            raise damaged(f"directory {nid} has two parents")
        if node.kind != file_type:
            raise damaged(f"wrong file type of inode {nid}")
        return node

    def _listing(self, nid: int) -> tuple[list[bytes], Sequence[int], bytes, bytes]:
        """Names, nids and types of a directory's entries. Last its block, if it has one only, in the form that the
        writer gives it, else b""."""
        size, blocks, rest = self._directory(nid)
        if size <= BLOCK_BYTES:
            base, end = self._block(0, size, blocks, rest)
            block = bytes(self.buffer[base:end])
            heads_bytes = DIRENT.size * self._dirents(base, end)
            heads = array("I", block[:heads_bytes])
            starts = array("H", block[:heads_bytes])[4::6]
            names = [block[start:stop] for start, stop in zip(starts, [*starts[1:], len(block)], strict=True)]
            text = block[heads_bytes:]
            if (
                starts[0] == heads_bytes
                and max(map(len, names)) <= NAME_MAX
                and not any(heads[1::3])
                and not any(block[DIRENT.size - 1 : heads_bytes : DIRENT.size])
                and b"/" not in text
                and b"\0" not in text
                and all(map(operator.lt, names, names[1:]))  # so none but the first can be empty
                and names[0]
            ):
                return names, heads[0::3], block[DIRENT.size - 2 : heads_bytes : DIRENT.size], block
        entries = list(self.entries(nid))
        types = bytes(file_type for _, _, file_type in entries)
        return [name for name, _, _ in entries], [child for _, child, _ in entries], types, b""

    def _node(self, nid: int, layers: Sequence[int]) -> Node:
        """The node of any inode. A directory has no children yet."""
        inode = self.inode(nid)
        mtime_s, mtime_ns = divmod(inode.mtime_ns, NSEC_PER_S)
        return Node(
            inode.kind,
            inode.mode & _PERMISSIONS,
            inode.uid,
            inode.gid,
            mtime_s,
            mtime_ns,
            size=inode.size if inode.kind is _IS_FILE else 0,
            target=self.readlink(nid) if inode.kind is Kind.SYMLINK else b"",
            rdev_major=inode.rdev >> 8 & RDEV_MAJOR_MAX,
            rdev_minor=inode.rdev & 0xFF | inode.rdev >> 12 & ~0xFF,
            xattrs=self.xattrs(nid),
            children={} if inode.kind is _IS_DIR else None,
            layer=layers[inode.device] if inode.device >= 0 else -1,
            address=inode.address,
            nlink=inode.nlink,
        )
