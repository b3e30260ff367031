"""Flattening: each rule by a case."""

from __future__ import annotations

import pytest

from lazyfs.core.tar.kinds import Kind
from lazyfs.core.tar.tree import LayerEntry, flatten
from lazyfs.errors import ImageError
from tests.core.layerentries import directory, entry, file, hardlink, paths, symlink, tree


def test_empty_image() -> None:
    root = flatten([])
    assert (root.kind, root.mode, root.uid, root.children, root.nlink) == (Kind.DIR, 0o755, 0, {}, 2)


def test_files_know_their_layer_and_address() -> None:
    nodes = tree([file("a", 3), file("empty", 0)], [file("b", 2)])
    assert (nodes["a"].layer, nodes["a"].address, nodes["a"].size) == (0, 4096 * 3, 3)
    assert (nodes["b"].layer, nodes["b"].address) == (1, 4096 * 2)
    assert (nodes["empty"].layer, nodes["empty"].address) == (-1, 0)


def test_metadata() -> None:
    xattrs = {b"user.a": b"1", b"security.selinux": b"h", b"com.apple.x": b"", b"security.capability": b"c"}
    nodes = tree(
        [
            file("f", mode=0o6755, xattrs=xattrs),
            symlink("s", "anywhere"),
            entry("c", Kind.CHR, rdev_major=1, rdev_minor=3),
        ]
    )
    node = nodes["f"]
    assert (node.mode, node.uid, node.gid, node.mtime_s, node.mtime_ns) == (0o6755, 5, 6, 7, 8)
    assert node.xattrs == {b"user.a": b"1", b"security.capability": b"c"}
    assert (nodes["s"].mode, nodes["s"].target) == (0o777, b"anywhere")
    assert (nodes["c"].rdev_major, nodes["c"].rdev_minor, nodes["c"].children) == (1, 3, None)


def test_root_entry_sets_the_root() -> None:
    root = flatten([[file("a"), directory("", mode=0o700)], [file("b")]])
    assert (root.mode, root.uid, root.mtime_s) == (0o700, 5, 7)
    assert set(root.children or {}) == {b"a", b"b"}


@pytest.mark.parametrize("kind", [Kind.FILE, Kind.SYMLINK, Kind.HARDLINK])
def test_root_stays_a_directory(kind: Kind) -> None:
    with pytest.raises(ImageError, match="root directory"):
        flatten([[entry("", kind, "x")]])


def test_missing_parents() -> None:
    nodes = tree([file("a/b/c")])
    assert (nodes["a/b"].mode, nodes["a/b"].uid, nodes["a/b"].mtime_s) == (0o755, 0, 0)
    nodes = tree([file("a/b/c"), directory("a", mode=0o711)])
    assert nodes["a"].mode == 0o711 and "a/b/c" in nodes


def test_directory_over_directory_takes_metadata_and_keeps_children() -> None:
    nodes = tree(
        [directory("d", mode=0o700, xattrs={b"user.old": b""}), file("d/a")],
        [directory("d", mode=0o711, uid=9, xattrs={b"user.new": b""}), file("d/b")],
    )
    assert {"d/a", "d/b"} < set(nodes)
    assert (nodes["d"].mode, nodes["d"].uid, nodes["d"].xattrs) == (0o711, 9, {b"user.new": b""})


def test_content_does_not_touch_a_directory() -> None:
    nodes = tree([directory("d", mode=0o700), file("d/a")], [file("d/b"), file("d/.wh.a")])
    assert nodes["d"].mode == 0o700


def test_replaced_directory_and_back() -> None:
    lower = [directory("d"), file("d/a")]
    assert paths(lower, [file("d")]) == {"d"}
    assert paths(lower, [file("d")], [directory("d"), file("d/b")]) == {"d", "d/b"}
    assert paths(lower, [file("d"), directory("d")]) == {"d"}
    assert paths(lower, [symlink("d", "elsewhere")], [directory("d")]) == {"d"}
    assert paths([file("t"), *lower], [hardlink("d", "t")]) == {"d", "t"}


def test_later_duplicate_wins() -> None:
    assert tree([file("a", 1), file("a", 2)])["a"].size == 2
    assert tree([file("a"), symlink("a", "t")])["a"].kind is Kind.SYMLINK


def test_whiteout_hides_lower_only() -> None:
    lower = [file("a"), file("b"), directory("d"), file("d/x")]
    assert paths(lower, [file(".wh.a"), file("d/.wh.x")]) == {"b", "d"}
    assert paths(lower, [file(".wh.d")]) == {"a", "b"}
    for upper in ([file(".wh.a"), file("a", 9)], [file("a", 9), file(".wh.a")]):
        assert tree(lower, upper)["a"].size == 9
    for upper in ([file(".wh.d"), directory("d"), file("d/y")], [directory("d"), file("d/y"), file(".wh.d")]):
        assert paths(lower, upper) == {"a", "b", "d", "d/y"}
    assert paths([file("a"), file(".wh.a")]) == {"a"}
    nowhere = [file(".wh.nothing"), file("no/such/.wh.a"), file("a/.wh.x")]
    assert paths(lower, nowhere) == {"a", "b", "d", "d/x"}


def test_whiteout_of_any_kind_and_name() -> None:
    assert paths([file("a")], [directory(".wh.a")]) == set()
    assert paths([file(".wh")], [file(".wh..wh")]) == set()


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh..."])
def test_whiteout_without_a_name(name: str) -> None:
    with pytest.raises(ImageError, match="without a name"):
        flatten([[file("d/a")], [file("d/" + name)]])


def test_opaque() -> None:
    lower = [directory("d", mode=0o700), file("d/a"), directory("d/e"), file("d/e/b"), file("o")]
    for upper in (
        [file("d/.wh..wh..opq"), file("d/new"), file("d/e/new")],
        [file("d/new"), file("d/e/new"), file("d/.wh..wh..opq")],
    ):
        assert paths(lower, upper) == {"d", "d/new", "d/e", "d/e/new", "o"}
    assert tree(lower, [file("d/.wh..wh..opq")])["d"].mode == 0o700
    assert paths(lower, [file(".wh..wh..opq"), file("x")]) == {"x"}
    nowhere = [file("o/.wh..wh..opq"), file("no/.wh..wh..opq")]
    assert paths(lower, nowhere) == {"d", "d/a", "d/e", "d/e/b", "o"}


def test_files_of_aufs_are_ignored() -> None:
    own = [file(".wh..wh.aufs"), directory(".wh..wh.plnk"), file(".wh..wh.plnk/1.2")]
    assert paths([*own, file("a")]) == {"a"}


def test_whiteout_through_a_symlink() -> None:
    lower = [file("usr/lib/a"), file("usr/lib/b"), symlink("lib", "usr/lib")]
    assert paths(lower, [file("lib/.wh.a")]) == {"usr", "usr/lib", "usr/lib/b", "lib"}
    assert paths(lower, [file("lib/c"), file("lib/.wh..wh..opq")]) == {"usr", "usr/lib", "usr/lib/c", "lib"}


def test_hard_links_over_layers() -> None:
    nodes = tree([file("a", 3)], [hardlink("b", "a"), hardlink("d/c", "b")], [file("a", 4)])
    assert nodes["b"] is nodes["d/c"] and nodes["b"].nlink == 2 and nodes["b"].size == 3
    assert nodes["a"].size == 4 and nodes["a"].nlink == 1 and nodes["b"].layer == 0
    nodes = tree([file("a", 3)], [hardlink("b", "a"), file(".wh.a")])
    assert nodes["b"].nlink == 1 and "a" not in nodes


def test_hard_link_to_a_symlink_and_through_one() -> None:
    lower = [file("usr/lib/a"), symlink("lib", "/usr/lib")]
    nodes = tree([*lower, hardlink("l", "lib"), hardlink("b", "lib/a")])
    assert nodes["l"] is nodes["lib"] and nodes["b"] is nodes["usr/lib/a"]


@pytest.mark.parametrize(
    "entries",
    [
        [hardlink("b", "a")],
        [hardlink("b", "b")],
        [file("b"), hardlink("b", "b")],
        [file("d/a"), hardlink("d", "d/a")],
        [directory("a"), hardlink("b", "a")],
        [hardlink("b", "")],
        [file("a"), hardlink("b", "a/x")],
        [hardlink("b", "a"), file("a")],
    ],
)
def test_hard_links_without_a_file(entries: list[LayerEntry]) -> None:
    with pytest.raises(ImageError, match=r"hard link .* cannot be made"):
        flatten([entries])


def test_hard_link_to_what_the_layer_removed() -> None:
    with pytest.raises(ImageError, match="hard link"):
        flatten([[file("a")], [file(".wh.a"), hardlink("b", "a")]])


@pytest.mark.parametrize(
    ("link", "made"),
    [
        ("usr/lib", "usr/lib/x"),
        ("/usr/lib", "usr/lib/x"),
        ("./usr//lib/", "usr/lib/x"),
        ("../../usr/lib", "usr/lib/x"),  # never above the root
        ("hop", "usr/lib/x"),
        ("not/there", "not/there/x"),
        ("gone/../usr/lib", "usr/lib/x"),
        ("/", "x"),
        (".", "x"),
    ],
)
def test_parent_through_a_symlink(link: str, made: str) -> None:
    lower = [directory("usr/lib", mode=0o700), symlink("hop", "/usr/lib"), symlink("lib", link)]
    nodes = tree(lower, [file("lib/x")])
    assert nodes[made].layer == 1 and nodes["lib"].kind is Kind.SYMLINK
    assert "gone" not in nodes and nodes["usr/lib"].mode == 0o700


def test_symlink_replaced_between_two_files_of_a_directory() -> None:
    first = [file("a/1"), file("b/1"), symlink("l", "a"), file("l/2")]
    assert paths([*first, symlink("l", "b"), file("l/2"), file("l/3")]) == {
        "a",
        "a/1",
        "a/2",
        "b",
        "b/1",
        "b/2",
        "b/3",
        "l",
    }
    entries = [symlink("l", "m/../x"), file("l/1"), symlink("m", "o/p"), file("l/2")]
    assert paths(entries) == {"l", "m", "x", "x/1", "o", "o/x", "o/x/2"}


@pytest.mark.parametrize("path", ["l/x", "m/x"])
def test_symlink_loops(path: str) -> None:
    with pytest.raises(ImageError, match="loop"):
        flatten([[symlink("l", "l"), symlink("m", "n"), symlink("n", "m/deep"), file(path)]])


def test_parent_that_is_a_file() -> None:
    with pytest.raises(ImageError, match="no directory"):
        flatten([[file("a")], [file("a/b")]])
    with pytest.raises(ImageError, match="no directory"):
        flatten([[file("a"), symlink("l", "a"), file("l/b")]])


def test_depth() -> None:
    deep = "/".join(["d"] * 1900)
    assert len(paths([file(deep + "/f")])) == 1901
    assert paths([file(deep + "/f")], [file(".wh.d")]) == set()
    upper = [directory("d"), directory(deep[:-2]), file(".wh..wh..opq")]
    assert len(paths([file(deep + "/f")], upper)) == 1899
    with pytest.raises(ImageError, match="too long"):
        flatten([[file(deep + "/f"), symlink("l", deep), file("l/" + deep)]])
    with pytest.raises(ImageError, match="too long"):
        flatten([[symlink("l", "n" * 256), file("l/f")]])


def test_link_counts() -> None:
    lower = [file("a"), hardlink("d/b", "a"), hardlink("d/e/c", "a"), directory("d/f")]
    nodes = tree(lower, [file("d/.wh.b")])
    assert [nodes[path].nlink for path in ("", "d", "d/e", "d/f", "a")] == [3, 4, 2, 2, 2]


def test_messages_show_odd_names_safely() -> None:
    bad = hardlink("b", "x")
    bad.entry.target = b"\x1b[31m\xff" + b"y" * 300
    with pytest.raises(ImageError) as caught:
        flatten([[bad]])
    assert caught.value.message.isascii() and caught.value.message.isprintable()
    assert len(caught.value.message) < 400
