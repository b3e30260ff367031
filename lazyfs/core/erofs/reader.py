"""A namespace read as a whole: checked, and turned back into the tree that it was written from."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Sequence
from itertools import compress, islice

from lazyfs.core.erofs.format import (
    BLOCK_BYTES,
    DIRENT,
    NSEC_PER_S,
    RDEV_MAJOR_MAX,
    Device,
)
from lazyfs.core.erofs.metadata import Inode, Metadata, damaged
from lazyfs.core.erofs.unread import PlainFiles, Stored, StoredChildren
from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import Node

__all__ = ["Device", "ErofsReader", "Inode"]

_IS_FILE, _IS_DIR = Kind.FILE, Kind.DIR
_FILE_TYPE = int(Kind.FILE)
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

        For what this host wrote itself, and whose digest was compared: most of it is not looked at, so that it can be
        written again as it is. Raises ImageError if it is seen to be damaged, or is not as the writer writes it.
        """
        layers = range(len(self.devices)) if numbers is None else numbers
        files = PlainFiles(self.buffer, self.devices, layers)
        root = self._node(self.root_nid, layers)
        nodes = {self.root_nid: root}
        pending = [(self.root_nid, root)]
        plain = array("I")  # nids of what seem to be plain files, of all directories
        found: list[tuple[int, Stored, StoredChildren]] = []  # of each directory, where its files begin in `plain`
        content = 0
        while pending:
            nid, directory = pending.pop()
            content += self._directory(nid)[0]
            if content > self.length:
                raise damaged("directories overlap")
            stored, others = self._stored(nid)
            directory.children = children = StoredChildren(files, stored)
            for place, kind in others:
                child = stored.nids[place]
                stored.others[place] = node = self._shared(child, nodes, layers, kind)
                if node.kind is _IS_DIR:
                    pending.append((child, node))
            found.append((len(plain), stored, children))
            for run in stored.plain():
                plain += run
        try:
            flags, devices = files.plain(plain)
        except ValueError as error:
            raise damaged(str(error)) from None
        ends = [*(start for start, _, _ in found[1:]), len(plain)]
        for (start, stored, children), end in zip(found, ends, strict=True):
            is_plain = flags[start:end]
            children.keep_devices(compress(devices[start:end], is_plain))
            if not all(is_plain):
                files_there = [place for place in range(len(stored.nids)) if place not in stored.others]
                for place in compress(files_there, map(operator.not_, is_plain)):
                    stored.others[place] = self._shared(stored.nids[place], nodes, layers, _FILE_TYPE)
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

    def _stored(self, nid: int) -> tuple[Stored, list[tuple[int, int]]]:
        """A directory, and the places and types of those of its entries that are no files. In `others` are "." and ".."
        only. Raises ImageError if it is not in the form that the writer gives it."""
        size, blocks, rest = self._directory(nid)
        parts = []
        nids = array("I")
        types = b""
        for number in range((size + BLOCK_BYTES - 1) // BLOCK_BYTES):
            base, end = self._block(number, size, blocks, rest)
            block = bytes(self.buffer[base:end])
            heads_bytes = DIRENT.size * self._dirents(base, end)
            heads = array("I", block[:heads_bytes])
            text = block[heads_bytes:].rstrip(b"\0" if len(block) == BLOCK_BYTES else b"")
            if (
                any(heads[1::3])
                or any(block[DIRENT.size - 1 : heads_bytes : DIRENT.size])
                or b"/" in text
                or b"\0" in text
            ):
                raise damaged(f"bad block in directory {nid}")
            parts.append(block[:heads_bytes] + text)
            nids += heads[0::3]
            types += block[DIRENT.size - 2 : heads_bytes : DIRENT.size]
        stored = Stored(tuple(parts), nids, {})
        others = [(place, kind) for place, kind in enumerate(types) if kind != _FILE_TYPE]
        dots = (place for place, _ in others if stored.name(place) in (b".", b".."))
        stored.others.update(dict.fromkeys(islice(dots, 2)))
        if len(stored.others) != 2:
            raise damaged(f"directory {nid} lacks itself or its parent")
        return stored, [(place, kind) for place, kind in others if place not in stored.others]

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
