"""An image of layers as they are found in the wild: every odd thing that a tar can hold and that is allowed.

`image` is what umoci reads, too. `stranger` has what it cannot read: old sparse formats and files so long
that an unpacker would write gigabytes; what the mount must show is written down here.
"""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

from tests.layertar import EXAMPLE_ACL, LayerTar, capability
from tests.layout import GZIP, PLAIN, ZSTD, ZSTD_FRAMES, Layout
from tests.tarblocks import END, header, member, pax_member

LAYER_TAGS = (GZIP, ZSTD, ZSTD_FRAMES, PLAIN)
GIB = 1 << 30
HUGE_BYTES = 5 * GIB + 17
# The year 2286, beyond what umoci sets.
FAR_NS = 10_000_000_000 * 10**9 + 5
# (offset, content): the pieces of the huge file, around the limits of 32 bits.
HUGE_PIECES = ((0, b"start"), (4 * GIB - 4096, b"b" * 8192), (HUGE_BYTES - 4, b"end\n"))


def image(path: Path) -> Layout:
    """A layout with the same tree under each of LAYER_TAGS."""
    layout = Layout(path)
    for tag in LAYER_TAGS:
        layers = [layout.add_layer(tar, tag) for tar in (_base(), _raw(), _above(), _again())]
        layout.tag(tag, layout.add_image(layers))
    return layout


def _base() -> bytes:
    """PAX: names, times and numbers that need it; what later layers change."""
    tar = LayerTar().dir(".", 0o711, uid=3, gid=4, xattrs={"user.root": b"of the root"})
    tar.dir("names").file("names/" + "p" * 255, b"pax long").file("names/\udcff\udcfe", b"not utf-8")
    tar.file("names/line\nfeed", b"n").file("names/ space ", b"s").file("names/\u00e9", b"utf-8")
    tar.symlink("names/long target", "t/" * 2000).symlink("names/\udce9", "\udce8")
    tar.file("deep/" * 300 + "file", b"deep")
    tar.file("times/ns", mtime_ns=1_700_000_000_000_000_001).file("times/negative", mtime_ns=-1_500_000_001)
    tar.file("owners/large", b"o", uid=4_294_967_294, gid=3_000_000_000)
    tar.device("devices/null", tarfile.CHRTYPE, 1, 3, 0o666).device("devices/zero", tarfile.CHRTYPE, 0, 0)
    tar.device("devices/disk", tarfile.BLKTYPE, 259, 70_000).fifo("devices/pipe", 0o622)
    tar.file("attributes/many", xattrs={f"user.{n:03}": b"%d" % n for n in range(20)})
    tar.file("attributes/binary", xattrs={"user.binary": b"\x01\xff\xfe=\n\x02"})
    tar.file("attributes/capability", b"c", 0o755, xattrs={"security.capability": capability(1 << 10)})
    tar.file("attributes/acl", b"a", 0o640, xattrs={"system.posix_acl_access": EXAMPLE_ACL})
    tar.dir("attributes/default", xattrs={"system.posix_acl_default": EXAMPLE_ACL})
    tar.file("modes/all", b"m", 0o7777).file("modes/none", b"m", 0)
    tar.file("links/a/file", b"linked" * 1000, 0o604).hardlink("links/b/file", "links/a/file")
    tar.symlink("links/symbolic", "a/file").hardlink("links/to symbolic", "links/symbolic")
    tar.file("gone/file", b"g").file("opaque/below/file", b"o").file("opaque/file", b"o")
    tar.file("directory then file/inside", b"i").file("file then directory", b"f")
    tar.file("back/and/forth", b"1").dir("usr/lib").file("usr/lib/library", b"l").symlink("lib", "usr/lib")
    tar.file("replaced", b"old" * 5000).file("kept link", b"kept").hardlink("kept link 2", "kept link")
    return tar.data()


def _raw() -> bytes:
    """GNU and older headers, by hand: long names, base-256 numbers, odd prefixes, files without a type."""
    long_name = member(b"././@LongLink", b"gnu/" + b"l" * 250 + b"\0", b"L")
    long_target = member(b"././@LongLink", b"t" * 300 + b"\0", b"K")
    return b"".join(
        (
            long_name + member(b"gnu/" + b"l" * 90, b"long", magic=b"ustar  \0"),
            long_target + header(b"gnu/target", b"2", linkname=b"t" * 99, magic=b"ustar  \0"),
            member(b"gnu/number", b"n", uid=b"\x80\0\0\0\0\x10\0\0", magic=b"ustar  \0"),
            member(b"gnu/before", b"n", mtime=b"\xff" * 11 + b"\xfe", magic=b"ustar  \0"),
            member(b"v7", b"old", b"\0", magic=bytes(8)),
            header(b"v7directory/", b"\0", magic=bytes(8)),
            member(b"./dot", b"d") + member(b"/slash", b"s") + member(b"././/dots//and///slashes", b"d"),
            member(b"tail", b"t", prefix=b"prefix"),
            member(b"no/such/parent", b"p") + header(b"no/such/", b"5", mode=b"0000700\0"),
            member(b"twice", b"first, longer") + member(b"twice", b"second"),
            member(b"thrice", b"1") + header(b"thrice", b"2", linkname=b"twice") + member(b"thrice", b"3"),
            END,
            b"rubbish behind the end" * 100,
        )
    )


def _above() -> bytes:
    """What one layer does to those below."""
    tar = LayerTar().whiteout("gone").whiteout("never there")
    tar.file("opaque/new", b"n").opaque("opaque").file("opaque/below/new", b"n")
    tar.file("directory then file", b"now a file").dir("file then directory", 0o700)
    tar.file("file then directory/inside", b"i").file("back", b"a file for a while")
    tar.file("lib/through", b"written through a link").whiteout("lib/library")
    tar.hardlink("links/above", "links/a/file").file("replaced", b"new")
    tar.whiteout("kept link").file("gone/again", b"anew", 0o600)
    return tar.data()


def _again() -> bytes:
    tar = LayerTar().dir("back", 0o1777).file("back/again", b"b")
    tar.dir("links", 0o711, uid=5).hardlink("links/third layer", "links/above")
    tar.file("opaque/below/new", b"changed").symlink("twice", "thrice")
    return tar.data()


def stranger(path: Path, scratch: Path) -> Layout:
    """A layout with the tag "stranger": sparse files in all four formats, HUGE_PIECES in one of 5 GiB, types
    of files that POSIX has or says to take for files, and a time far away."""
    layout = Layout(path)
    types = member(b"contiguous", b"c", b"7") + member(b"unknown", b"u", b"Q") + END
    far = LayerTar().file("far", mtime_ns=FAR_NS).data()
    layers = [layout.add_layer(tar) for tar in (*sparse_layers(scratch), _huge(), types, far)]
    layout.tag("stranger", layout.add_image(layers))
    return layout


def sparse_layers(scratch: Path) -> list[bytes]:
    """By GNU tar: the file "sparse-FORMAT" in each, like `sparse_content`."""
    layers = []
    for name, options in (
        ("old", ["--format=gnu"]),
        *((version, ["--format=pax", f"--sparse-version={version}"]) for version in ("0.0", "0.1", "1.0")),
    ):
        source = scratch / name
        source.mkdir(parents=True)
        content = sparse_content()
        with (source / f"sparse-{name}").open("wb") as file:
            for start in range(0, len(content), 4096):
                if any(page := content[start : start + 4096]):
                    file.seek(start)
                    file.write(page)
            file.truncate(len(content))
        command = ["tar", "--sparse", "--hole-detection=raw", *options, "-C", str(source), "-cf", "-", "."]
        layers.append(subprocess.run(command, check=True, capture_output=True).stdout)
    return layers


def sparse_content() -> bytes:
    """More pieces than the old format's header and one extension hold, and a hole at the end."""
    content = bytearray(1_234_567)
    for piece in range(1, 60):
        content[piece * 16384 : piece * 16384 + 4096] = bytes([piece]) * 4096
    content[1_000_000:1_000_003] = b"end"
    return bytes(content)


def _huge() -> bytes:
    pairs = ",".join(f"{offset},{len(piece)}" for offset, piece in HUGE_PIECES).encode()
    records = ((b"GNU.sparse.map", pairs), (b"GNU.sparse.size", b"%d" % HUGE_BYTES))
    data = b"".join(piece for _, piece in HUGE_PIECES)
    return pax_member(*records) + member(b"huge", data) + END
