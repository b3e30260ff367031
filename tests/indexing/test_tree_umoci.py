"""The flattened tree is what `umoci unpack` makes on a disk: kinds, metadata, links, contents, errors."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.reader import TarEntry, TarReader
from lazyfs.core.tar.tree import LayerEntry, Node, flatten
from lazyfs.errors import ImageError
from tests.core.layerentries import KINDS
from tests.layertar import EXAMPLE_ACL, LayerTar, capability
from tests.layout import PLAIN, Layout

IMAGES = 80
Seen = dict[bytes, dict[str, Any]]


def unpack(directory: Path, tars: list[bytes]) -> Path | None:
    """The rootfs as umoci makes it, or None if it refuses."""
    layout = Layout(directory / "layout")
    layout.tag("t", layout.add_image([layout.add_layer(tar, PLAIN) for tar in tars]))
    command = ["umoci", "unpack", "--image", f"{layout.path}:t", str(directory / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return None if done.returncode else directory / "bundle" / "rootfs"


def read_layer(tar: bytes) -> list[LayerEntry]:
    """Entries; the address of a file's data is its place in the tar."""
    reader = TarReader()
    entries = [item for item in reader.feed(tar) if isinstance(item, TarEntry)]
    reader.finish()
    return [LayerEntry(entry, entry.segments[0][1] if entry.segments else 0) for entry in entries]


def on_disk(root: Path) -> Seen:
    seen: Seen = {}
    least_names: dict[int, bytes] = {}
    top = bytes(root)
    for folder, directories, files in os.walk(top):
        for name in ([b"."] if folder == top else []) + directories + files:
            path = os.path.normpath(os.path.join(folder, name))
            stat = os.lstat(path)
            kind = KINDS[stat.st_mode & 0o170000]
            relative = os.path.relpath(path, top)
            facts: dict[str, Any] = {
                "kind": kind,
                "mode": oct(stat.st_mode & 0o7777),
                "owner": (stat.st_uid, stat.st_gid),
                "mtime_ns": stat.st_mtime_ns,
                "xattrs": {
                    os.fsencode(key): os.getxattr(path, key, follow_symlinks=False)
                    for key in os.listxattr(path, follow_symlinks=False)
                },
            }
            if kind is Kind.SYMLINK:
                facts["target"] = os.readlink(path)
            if kind in (Kind.CHR, Kind.BLK):
                facts["rdev"] = stat.st_rdev
            if kind is Kind.FILE:
                facts["content"] = Path(os.fsdecode(path)).read_bytes()
            if kind is not Kind.DIR:
                facts["nlink"] = stat.st_nlink
                facts["first name"] = stat.st_ino
                least_names[stat.st_ino] = min(relative, least_names.get(stat.st_ino, relative))
            seen[b"" if relative == b"." else relative] = facts
    for facts in seen.values():
        if "first name" in facts:
            facts["first name"] = least_names[facts["first name"]]
    return seen


def walk(root: Node) -> Iterator[tuple[bytes, Node]]:
    pending = [(b"", root)]
    while pending:
        path, node = pending.pop()
        yield path, node
        for name, child in (node.children or {}).items():
            pending.append((path + b"/" + name if path else name, child))


def in_tree(root: Node, tars: list[bytes]) -> Seen:
    seen: Seen = {}
    names: dict[Node, bytes] = {}
    for path, node in sorted(walk(root), key=lambda item: item[0]):
        facts: dict[str, Any] = {
            "kind": node.kind,
            "mode": oct(node.mode),
            "owner": (node.uid, node.gid),
            "mtime_ns": node.mtime_s * 10**9 + node.mtime_ns,
            "xattrs": node.xattrs,
        }
        if node.kind is Kind.SYMLINK:
            facts["target"] = node.target
        if node.kind in (Kind.CHR, Kind.BLK):
            facts["rdev"] = os.makedev(node.rdev_major, node.rdev_minor)
        if node.kind is Kind.FILE:
            data = tars[node.layer] if node.size else b""
            facts["content"] = data[node.address : node.address + node.size]
        if node.kind is not Kind.DIR:
            facts["nlink"] = node.nlink
            facts["first name"] = names.setdefault(node, path)
        seen[path] = facts
    return seen


def compare(directory: Path, tars: list[bytes]) -> bool:
    """Both agree; returns whether the image could be unpacked at all."""
    directory.mkdir()
    started_ns = directory.stat().st_mtime_ns
    rootfs = unpack(directory, tars)
    try:
        tree = in_tree(flatten([read_layer(tar) for tar in tars]), tars)
    except ImageError as error:
        assert rootfs is None, f"umoci unpacks what we refuse: {error}"
        return False
    assert rootfs is not None, "umoci refuses what we take"
    disk = on_disk(rootfs)
    assert set(tree) == set(disk)
    for path, facts in tree.items():
        # A directory without an entry of its own, or in which umoci makes one, has the current time on disk.
        if facts["kind"] is Kind.DIR and disk[path]["mtime_ns"] >= started_ns:
            disk[path]["mtime_ns"] = facts["mtime_ns"]
        assert facts == disk[path], path
    shutil.rmtree(directory)
    return True


def every_kind() -> LayerTar:
    """The lowest layer: every kind of file and of metadata, and what the next ones replace or hide."""
    return (
        LayerTar()
        .dir(".", mode=0o750, uid=3, gid=4)
        .dir("etc", mode=0o700, xattrs={"user.dir": b"lower"})
        .file("etc/passwd", b"root", uid=1, gid=2, mtime_ns=1_600_000_000_123_456_789)
        .file("etc/caps", b"x", mode=0o4755, xattrs={"security.capability": capability(1 << 10)})
        .file("etc/note", b"x", xattrs={"user.x": b"\0\xff"})
        .file("etc/acl", b"y", mode=0o640, xattrs={"system.posix_acl_access": EXAMPLE_ACL})
        .file("usr/lib/a", b"aaa")
        .file("usr/lib/b", b"bbb")
        .symlink("lib", "usr/lib", uid=7, mtime_ns=-1_500_000_000)
        .symlink("abs", "/usr/../usr/lib")
        .symlink("broken", "not/../there")
        .hardlink("etc/passwd-", "./etc/passwd")
        .fifo("run/fifo")
        .device("dev/null", tarfile.CHRTYPE, 1, 3, mode=0o666)
        .device("dev/blk", tarfile.BLKTYPE, 259, 70_000)
        .device("dev/zero", tarfile.CHRTYPE, 0, 0)
        .file("opaque/lower", b"l")
        .file("opaque/kept/lower", b"l")
        .file("replaced/x", b"x")
        .file("back/x", b"x")
        .file("gone/x", b"x")
        .file("latin-\udce9", b"name")
        .dir("n" * 200)
        .file("n" * 200 + "/" + "m" * 255, b"long")
        .symlink("long", "t/" * 1000)
        .file("empty")
        .file("epoch", b"e", mtime_ns=1)
    )


def every_change() -> LayerTar:
    """What a layer can do to lower ones: paths through symbolic links, replacements, whiteouts, hard links."""
    return (
        LayerTar()
        .dir("etc", mode=0o711, uid=9, xattrs={"user.new": b"upper"})
        .file("lib/c", b"through a symlink")
        .file("abs/.wh.a")
        .file("broken/made", b"m")
        .hardlink("again", "lib/b")
        .hardlink("link-of-link", "lib")
        .file("etc/passwd", b"new")
        .file("opaque/new", b"n")
        .opaque("opaque")
        .file("opaque/kept/new", b"n")
        .file("replaced", b"now a file")
        .file("back", b"file")
        .whiteout("gone")
        .file("gone/y", b"implicit directory")
        .whiteout("n" * 200)
        .whiteout("not-there")
        .file("twice", b"1")
        .file("twice", b"22", mode=0o600)
    )


def changes_of_changes() -> LayerTar:
    """What the second layer wrote is changed again."""
    return (
        LayerTar()
        .dir("back", mode=0o1777)
        .symlink("etc", "usr")
        .file("etc/through", b"t")
        .dir("lib")
        .file("lib/fresh", b"f")
        .file(".wh.again")
        .file(".wh.dev")
    )


def test_every_rule(tmp_path: Path) -> None:
    layers = (every_kind(), every_change(), changes_of_changes())
    assert compare(tmp_path / "image", [layer.data() for layer in layers])


@pytest.mark.parametrize(
    "layer",
    [
        LayerTar().hardlink("a", "missing"),
        LayerTar().dir("d").hardlink("a", "d"),
        LayerTar().file("a").file("a/b"),
        LayerTar().file("a").hardlink("a", "a"),
        LayerTar().symlink("l", "l").file("l/x"),
        LayerTar().file("./"),
    ],
    ids=["missing", "directory", "below-file", "itself", "loop", "root"],
)
def test_both_refuse(tmp_path: Path, layer: LayerTar) -> None:
    assert not compare(tmp_path / "image", [layer.data()])


def random_layer(choose: random.Random, number: int, written: list[str]) -> bytes:
    """A few entries over very few names, so that they meet; mostly such that can be unpacked.

    `written` gathers paths of files, for hard links.
    """
    layer = LayerTar()
    for _ in range(choose.randint(1, 10)):
        parent = "".join(f"{name}/" for name in choose.choices("ab", k=choose.randint(0, 2)))
        directory = parent + choose.choice("ab")
        path = parent + choose.choice("xyzxyzxyzab")
        mtime_s = 1000 * number + choose.randint(1, 999)
        facts = {"uid": choose.randint(0, 9), "mtime_ns": mtime_s * 10**9}
        match choose.choice("ffffdddshhow"):
            case "f":
                layer.file(path, choose.randbytes(choose.randint(0, 9)), **facts)
                written.append(path)
            case "d":
                layer.dir(directory, mode=choose.choice([0o700, 0o755]), **facts)
            case "s":
                target = choose.choice(["", "/", "../"]) + choose.choice(["a", "b", "a/b"])
                layer.symlink(directory, target, **facts)
            case "h":
                layer.hardlink(path, choose.choice(written or ["nothing"]))
            case "o":
                layer.opaque(directory)
            case _:
                layer.whiteout(choose.choice([path, directory]))
    return layer.data()


def test_random_images(tmp_path: Path) -> None:
    unpacked = 0
    for seed in range(IMAGES):
        choose = random.Random(seed)
        written: list[str] = []
        tars = [random_layer(choose, number, written) for number in range(choose.randint(1, 4))]
        try:
            unpacked += compare(tmp_path / str(seed), tars)
        except AssertionError as error:
            for tar in tars:
                entries = [item.entry for item in read_layer(tar)]
                error.add_note(f"seed {seed}: {[(e.kind.name, e.path, e.target) for e in entries]}")
            raise
    assert unpacked > IMAGES / 4
