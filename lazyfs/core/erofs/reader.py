"""A namespace read as a whole: checked, and turned back into the tree that it was written from."""

from __future__ import annotations

from collections.abc import Sequence

from lazyfs.core.erofs.format import (
    BLOCK_BITS,
    BLOCK_BYTES,
    CHUNK_BYTES,
    CHUNK_FORMAT,
    FILE,
    FORMAT_CHUNKS,
    ID_MAX,
    INODE_BYTES,
    NSEC_PER_S,
    RDEV_MAJOR_MAX,
    SLOT_BYTES,
    Device,
)
from lazyfs.core.erofs.metadata import Inode, Metadata, damaged
from lazyfs.core.tar.reader import Kind
from lazyfs.core.tar.tree import Node

__all__ = ["Device", "ErofsReader", "Inode"]

_IS_FILE, _IS_DIR = Kind.FILE, Kind.DIR
_REGULAR = 0o100000
_PERMISSIONS = 0o7777


class ErofsReader(Metadata):
    """As Metadata, with walks over all of it. After `check` the kernel may be given the same bytes."""

    def check(self) -> None:
        """Walk everything and raise ImageError for whatever a kernel or a user could stumble over.

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
            # Directories that share blocks could make this walk as long as they like; honest ones do not.
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
        """The tree that was written; a file's `Node.layer` is numbers[device], without `numbers` the device's number.

        Attributes that the writer leaves out are not there. ImageError if what is read is damaged, a directory has two
        parents, or directories overlap; of the rest of `check` nothing is looked at.
        """
        layers = range(len(self.devices)) if numbers is None else numbers
        root = self._node(self.root_nid, layers)
        nodes = {self.root_nid: root}
        pending = [(self.root_nid, root)]
        content = 0
        while pending:
            nid, directory = pending.pop()
            content += self._directory(nid)[0]
            if content > self.length:
                raise damaged("directories overlap")
            children = directory.children
            assert children is not None
            for name, child, _ in self.entries(nid):
                node = nodes.get(child)
                if name in (b".", b".."):
                    continue
                if node is None:
                    nodes[child] = node = self._file(child, layers) or self._node(child, layers)
                    if node.kind is _IS_DIR:
                        pending.append((child, node))
                elif node.kind is _IS_DIR:
                    raise damaged(f"directory {child} has two parents")
                children[name] = node
        return root

    def _file(self, nid: int, layers: Sequence[int]) -> Node | None:
        """The node of a sound regular file with data and without attributes, as most inodes are; else None."""
        position = nid * SLOT_BYTES
        if not 0 <= position <= self.length - FILE.size or position % BLOCK_BYTES > BLOCK_BYTES - INODE_BYTES:
            return None
        (
            layout, xattr_count, mode, reserved, size, chunk_format, _, uid, gid, mtime_s, mtime_ns, nlink, advise,
            device_id, block,
        ) = FILE.unpack_from(self.buffer, position)  # fmt: skip
        address = block << BLOCK_BITS
        if (
            layout != FORMAT_CHUNKS
            or mode & ~_PERMISSIONS != _REGULAR
            or chunk_format != CHUNK_FORMAT
            or xattr_count
            or reserved
            or advise
            or uid > ID_MAX
            or gid > ID_MAX
            or mtime_ns >= NSEC_PER_S
            or not nlink
            or not 0 < device_id <= len(self.devices)
            or not 0 < size <= CHUNK_BYTES
            or address + size > self.devices[device_id - 1].size_bytes
        ):
            return None
        return Node(
            _IS_FILE, mode & _PERMISSIONS, uid, gid, mtime_s, mtime_ns, size, b"", 0, 0, {}, None,
            layers[device_id - 1], address, nlink,
        )  # fmt: skip

    def _node(self, nid: int, layers: Sequence[int]) -> Node:
        """The node of any inode; a directory's children are missing yet."""
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
