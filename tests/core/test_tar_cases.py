"""The tar reader, one case each: formats, overrides, limits, and what it refuses."""

from __future__ import annotations

import pytest

from lazyfs.core.tar import fields, reader
from lazyfs.core.tar.kinds import Kind
from lazyfs.errors import ImageError
from tests.tarblocks import END, header, member, only, pax_member, read


def test_plain_empty_and_ended() -> None:
    assert read(b"") == [] == read(END) == read(END + b"anything") == read(bytes(512))
    entry, content = read(member(b"./a//./b", b"hello") + END + header(b"later"))[0]
    assert (entry.path, entry.mode, entry.uid, entry.gid, entry.mtime_s) == (b"a/b", 0o644, 1, 2, 3)
    assert entry.segments == ((0, 512, 5),) and content == b"hello"
    assert only(header() + END).segments == ()


def test_missing_end_marker_and_padding_are_accepted() -> None:
    assert [content for _, content in read(member(b"f", b"x" * 600)[: 512 + 600])] == [b"x" * 600]


@pytest.mark.parametrize("cut", [100, 511, 512, 512 + 599])
def test_end_inside_a_member(cut: int) -> None:
    with pytest.raises(ImageError, match="ends in the middle"):
        read(member(b"f", b"x" * 600)[:cut])


@pytest.mark.parametrize("rest", [b"", END])
def test_end_after_an_extended_header(rest: bytes) -> None:
    with pytest.raises(ImageError, match="ends in the middle"):
        read(pax_member((b"path", b"p")) + rest)


@pytest.mark.parametrize(
    ("written", "path"),
    [
        (b"../x", b"x"),
        (b"/../../x", b"x"),
        (b"./../dir/f", b"dir/f"),
        (b"a/../b", b"b"),
        (b"a/b/../../../c/./d", b"c/d"),
        (b"..a/b../...", b"..a/b../..."),
    ],
)
def test_parents_in_a_path_stay_inside_the_root(written: bytes, path: bytes) -> None:
    """As Go's filepath.Clean, which containerd and umoci call first."""
    assert only(header(written) + END).path == path
    assert only(header(b"h", b"1", linkname=written) + END).target == path
    assert only(header(b"s", b"2", linkname=written) + END).target == written  # a symbolic link is kept as it is


@pytest.mark.parametrize("records", [(b"4294967295", b"7"), (b"7", b"4294967295")])
def test_an_id_that_chown_takes_for_unchanged_stays_root(records: tuple[bytes, bytes]) -> None:
    entry = only(pax_member((b"uid", records[0]), (b"gid", records[1])) + header() + END)
    assert (entry.uid, entry.gid) == tuple(0 if text == b"4294967295" else 7 for text in records)
    assert only(header(uid=b"\xff" * 8) + END).uid == 0  # -1, in base-256


@pytest.mark.parametrize("path", [b".", b"..", b"a/..", b"./", b"/", b"././/", b""])
def test_root(path: bytes) -> None:
    assert only(header(path, b"5") + END).path == b""


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (pax_member((b"path", b"a\0b")) + header(), "NUL"),
        (pax_member((b"path", b"a" * 256)) + header(), "too long"),
        (pax_member((b"path", b"a/" * 2049)) + header(), "too long"),
        (pax_member((b"linkpath", b"a" * 4096)) + header(b"s", b"2"), "symbolic link"),
        (header(b"s", b"2"), "symbolic link"),
        (pax_member((b"uid", b"4294967296")) + header(), "uid or gid"),
        (header(uid=b"\xff" * 7 + b"\xfe"), "uid or gid"),
        (pax_member((b"gid", b"-1")) + header(), "the gid"),
        (header(size_field=b"\xff" * 12), "larger than"),
        (header(size_field=b"\x80" + b"\xff" * 11), "the size"),
        (header(size_field=b"0000000_001\0"), "the size"),
        (header(mode=b"0000008\0"), "the mode"),
        (header(b"c", b"3", major=b"0010000\0"), "device number"),
        (header(b"v", b"V"), "volume label"),
        (header(b"v", b"M"), "multi-volume"),
        (header(b"v", b"N"), "rename list"),
        (header(b"v", b"D"), "dump"),
        (header(b"x", b"x", (1 << 20) + 1), "larger than 1 MiB"),
        (member(b"x", b"5 a=b", b"x"), "LENGTH"),
        (member(b"x", b"99 a=b\n", b"x"), "LENGTH"),
        (member(b"x", b"6 ab=\n\n", b"x"), "no length"),
        (member(b"x", b"+6 a=\n", b"x"), "no length"),
        (member(b"x", b"5 =b\n", b"x"), "LENGTH"),
        (pax_member((b"mtime", b"1e5")) + header(), "time"),
        (pax_member((b"SCHILY.xattr.", b"v")) + header(), "extended attribute"),
        (pax_member((b"SCHILY.xattr.user.n", bytes(65537))) + header(), "64 KiB"),
        (pax_member((b"LIBARCHIVE.xattr.user.n", b"!!")) + header(), "base64"),
        (pax_member((b"LIBARCHIVE.xattr.user.n", b"A")) + header(), "base64"),
        (bytes(512) + header(), "lone zero block"),
    ],
)
def test_refused(data: bytes, text: str) -> None:
    with pytest.raises(ImageError, match=text):
        read(data + END)


def test_checksum() -> None:
    block = bytearray(header(b"\xe9t\xe9"))
    assert only(bytes(block) + END).path == b"\xe9t\xe9"
    signed = sum(byte - 256 * (byte > 127) for byte in block[:148] + block[156:]) + 256
    block[148:156] = b"%06o\0 " % signed
    assert only(bytes(block) + END).path == b"\xe9t\xe9"
    block[0] ^= 1
    with pytest.raises(ImageError, match="byte 0: a header's checksum"):
        read(bytes(block))


def test_prefix_belongs_to_ustar_only() -> None:
    assert only(header(prefix=b"dir") + END).path == b"dir/f"
    assert only(header(prefix=b"dir", magic=b"") + END).path == b"f"
    octal = b"14000000000\0"
    assert only(header(prefix=octal + octal, magic=b"ustar  \0") + END).path == b"f"  # two times
    # No time, so a path: Go's writer before 1.8. Its reader wants it to be ASCII.
    assert only(header(prefix=b"dir", magic=b"ustar  \0") + END).path == b"dir/f"
    assert only(header(prefix=octal + b"/long/path", magic=b"ustar  \0") + END).path == b"14000000000/f"
    assert only(header(prefix=b"d\xefr", magic=b"ustar  \0") + END).path == b"f"
    star = header(prefix=b"d" * 131 + b"00000000001 ", trailer=b"tar\0")
    assert only(star + END).path == b"d" * 131 + b"/f"


def test_v7_directory_and_contiguous_and_unknown_types() -> None:
    assert only(header(b"d/", b"\0", magic=b"") + END).kind is Kind.DIR
    assert only(header(b"d/", b"0") + END).kind is Kind.FILE
    for kind in (b"7", b"Q", b"\0"):
        assert read(member(b"f", b"data", kind) + END)[0][1] == b"data"


def test_links_and_directories_have_no_data() -> None:
    for kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
        data = header(b"n", kind, 77, linkname=b"t") + member(b"next") + END
        assert [(entry.path, entry.size) for entry, _ in read(data)] == [(b"n", 0), (b"next", 0)]


def test_numbers() -> None:
    base_256 = b"\x80\0\0\0\0\x10\0\0"
    block = header(mode=b" 644 \0\0", uid=base_256, gid=b"\0" * 8, mtime=b"\xff" * 11 + b"\xfe")
    entry = only(block + END)
    assert (entry.mode, entry.uid, entry.gid, entry.mtime_s) == (0o644, 0x100000, 0, -2)
    assert only(header(mode=b"0100755\0") + END).mode == 0o755


def test_pax_records_override_the_header() -> None:
    data = (
        header(b"a", uid=b"0000007\0")
        + pax_member((b"uid", b"8"), (b"path", b"b\xff"), (b"hdrcharset", b"BINARY"), (b"mtime", b"-1.5"))
        + header(b"ignored")
        + pax_member((b"uid", b""))
        + header(b"c")
        + pax_member((b"size", b"3"))
        + header(b"d", size_field=bytes(12))
        + b"abc".ljust(512, b"\0")
    )
    a, b, c, d = (entry for entry, _ in read(data + END))
    assert (a.path, a.uid) == (b"a", 7)
    assert (b.path, b.uid, b.mtime_s, b.mtime_ns) == (b"b\xff", 8, -2, 500_000_000)
    assert (c.path, c.uid) == (b"c", 1)
    assert (d.path, d.size) == (b"d", 3)


def test_global_pax_records_are_read_and_ignored() -> None:
    """As by those who unpack with Go's archive/tar; git archive writes one with a comment."""
    records = pax_member((b"comment", b"c"), (b"path", b"all"), (b"uid", b"7"), (b"mtime", b"5"), kind=b"g")
    plain, after = read(header(b"a") + records + header(b"a") + END)
    assert plain == after
    with pytest.raises(ImageError, match="LENGTH"):
        read(member(b"x", b"5 a=b", b"g") + END)


@pytest.mark.parametrize(
    ("text", "time"),
    [
        (b"0", (0, 0)),
        (b"12.", (12, 0)),
        (b"-3", (-3, 0)),
        (b"-0.1", (-1, 900_000_000)),
        (b"1.9999999999", (1, 999_999_999)),
        (b"-1.000000001", (-2, 999_999_999)),
    ],
)
def test_pax_times(text: bytes, time: tuple[int, int]) -> None:
    assert fields.timestamp(text) == time


def test_libarchive_xattrs() -> None:
    data = pax_member(
        (b"LIBARCHIVE.xattr.user.a%3db", b"AAEC/w"),
        (b"LIBARCHIVE.xattr.user.both", b"AAAA"),
        (b"SCHILY.xattr.user.both", b"raw"),
        (b"LIBARCHIVE.xattr.trusted.overlay.redirect", b"AAAA"),
    )
    assert only(data + header() + END).xattrs == {b"user.a=b": b"\0\1\2\xff", b"user.both": b"raw"}


@pytest.mark.parametrize(
    ("pairs", "stored"),
    [
        (b"0,10,5,10", 20),  # overlap
        (b"10,5,0,5", 10),  # descends
        (b"90,20", 20),  # beyond the end
        (b"0,10", 11),  # more stored than used
        (b"0,11", 10),  # less
        (b"0", 0),
        (b"0,x", 0),
        (b"0,-1", 0),
    ],
)
def test_bad_sparse_maps(pairs: bytes, stored: int) -> None:
    records = (b"GNU.sparse.map", pairs), (b"GNU.sparse.size", b"100")
    with pytest.raises(ImageError, match="sparse"):
        read(pax_member(*records) + member(b"f", bytes(stored)) + END)


@pytest.mark.parametrize("text", [b"", b"5\n0\n", b"9999999999\n", b"x\n", b"1\n0\n", b"1\n0\n9\n"])
def test_bad_leading_sparse_maps(text: bytes) -> None:
    records = (b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"100")
    with pytest.raises(ImageError, match="sparse"):
        read(pax_member(*records) + member(b"f", text) + END)


def test_sparse_pieces_that_touch_are_joined() -> None:
    records = (b"GNU.sparse.map", b"0,2,2,3,5,0"), (b"GNU.sparse.size", b"5"), (b"GNU.sparse.name", b"real")
    start = len(pax_member(*records)) + 512
    entry = only(pax_member(*records) + member(b"GNUSparseFile.0/f", b"hello") + END)
    assert (entry.path, entry.size, entry.segments) == (b"real", 5, ((0, start, 5),))


def test_entry_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_ENTRIES", 3)
    with pytest.raises(ImageError, match="more than 3 members"):
        read(header() * 4 + END)


def test_long_name_and_target() -> None:
    long_name = member(b"././@LongLink", b"n" * 120 + b"\0", b"L")
    long_target = member(b"././@LongLink", b"t" * 120 + b"\0", b"K")
    entry = only(long_name + long_target + header(b"nnn", b"2", linkname=b"ttt") + END)
    assert (entry.path, entry.target) == (b"n" * 120, b"t" * 120)
