"""Flattening: all rules together, against a model that works on paths."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import LayerEntry, flatten
from lazyfs.errors import ImageError
from tests.core.layerentries import directory, entry, file, hardlink, walk


@dataclass
class Inode:
    kind: Kind
    mark: int  # the entry that made it, or set a directory's metadata last; -1: nobody


@dataclass
class Model:
    """A file system as a dict of paths, changed the way an unpacker changes a disk. No symbolic links."""

    inodes: dict[str, Inode] = field(default_factory=dict)

    def below(self, path: str) -> list[str]:
        return [name for name in self.inodes if name == path or name.startswith(path + "/") or not path]

    def parents(self, path: str) -> list[str]:
        parts = path.split("/")
        return ["/".join(parts[:end]) for end in range(1, len(parts))]

    def apply(self, layer: list[LayerEntry]) -> None:
        upper: set[str] = set()
        for item in layer:
            path, kind = item.entry.path.decode(), item.entry.kind
            parent, _, name = path.rpartition("/")
            if name.startswith(".wh."):
                hidden = parent if name == ".wh..wh..opq" else (parent + "/" + name[4:]).strip("/")
                for victim in self.below(hidden):
                    if victim not in upper and victim != (parent if name == ".wh..wh..opq" else None):
                        del self.inodes[victim]
                continue
            for above in self.parents(path):
                if self.inodes.setdefault(above, Inode(Kind.DIR, -1)).kind is not Kind.DIR:
                    raise ImageError("not a directory")
            if path in self.inodes and (kind is not Kind.DIR or self.inodes[path].kind is not Kind.DIR):
                for victim in self.below(path):
                    del self.inodes[victim]
            if kind is Kind.HARDLINK:
                found = self.inodes.get(item.entry.target.decode())
                if found is None or found.kind is Kind.DIR:
                    raise ImageError("no target")
                self.inodes[path] = found
            elif path in self.inodes:
                self.inodes[path].mark = item.entry.uid
            else:
                self.inodes[path] = Inode(kind, item.entry.uid)
            upper |= {path, *self.parents(path)}


places = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join)


@st.composite
def layer_entries(draw: st.DrawFn) -> LayerEntry:
    path = draw(places)
    match draw(st.sampled_from(["file", "file", "dir", "dir", "fifo", "link", "whiteout", "opaque"])):
        case "file":
            return file(path)
        case "dir":
            return directory(path)
        case "fifo":
            return entry(path, Kind.FIFO)
        case "link":
            return hardlink(path, draw(places))
        case "whiteout":
            parent, _, name = path.rpartition("/")
            return file(f"{parent}/.wh.{name}".lstrip("/"))
        case _:
            return file(path + "/.wh..wh..opq")


@settings(deadline=None, max_examples=400)
@given(st.lists(st.lists(layer_entries(), max_size=12), max_size=4))
def test_equals_the_model(layers: list[list[LayerEntry]]) -> None:
    for number, item in enumerate(item for layer in layers for item in layer):
        item.entry.uid = number
    model = Model()
    try:
        for layer in layers:
            model.apply(layer)
    except ImageError:
        with pytest.raises(ImageError):
            flatten(layers)
        return
    nodes = {path: node for path, node in walk(flatten(layers)) if path}
    assert {path: (inode.kind, inode.mark) for path, inode in model.inodes.items()} == {
        path: (node.kind, node.uid if node.mtime_s else -1) for path, node in nodes.items()
    }
    for path, node in nodes.items():
        if node.kind is not Kind.DIR:
            names = sum(inode is model.inodes[path] for inode in model.inodes.values())
            assert node.nlink == names == sum(other is node for other in nodes.values())


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.tuples(places, st.sampled_from(list(Kind)), places), max_size=10), max_size=3))
def test_any_links_give_a_tree_or_an_image_error(layers: list[list[tuple[str, Kind, str]]]) -> None:
    try:
        root = flatten([[entry(path, kind, target) for path, kind, target in layer] for layer in layers])
    except ImageError as error:
        assert error.message and error.hint
        return
    directories = [node for _, node in walk(root) if node.kind is Kind.DIR]
    assert len({id(node) for node in directories}) == len(directories)  # no directory has two names
