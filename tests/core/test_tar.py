"""The tar reader against archives of GNU tar and Python's tarfile, in any cut of the stream, and damaged."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.core.tar import reader
from lazyfs.core.tar.kinds import Kind
from lazyfs.errors import ImageError
from tests.core.layerentries import KINDS
from tests.tarblocks import END, Member, contents, header, member, read

# --- against GNU tar ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everything a tar can hold."""
    root = tmp_path_factory.mktemp("source")
    long = root / ("d" * 90) / ("e" * 90) / ("f" * 90)
    long.mkdir(parents=True)
    (long / ("n" * 200)).write_bytes(b"long name")
    (root / "empty").touch()
    (root / "plain").write_bytes(os.urandom(70_001))
    os.link(root / "plain", root / "zz-hardlink")
    (root / "link").symlink_to("plain")
    (root / "long-link").symlink_to("t/" * 400 + "x")
    Path(os.fsdecode(bytes(root) + b"/\xff\xfe latin \xe9")).write_bytes(b"not utf-8")
    os.mkfifo(root / "fifo")
    os.mknod(root / "chr", 0o20666, os.makedev(1, 3))
    os.mknod(root / "blk", 0o60660, os.makedev(259, 70_000))
    os.chmod(root / "empty", 0o6711)
    os.chown(root / "empty", 1234, 4321)
    os.utime(root / "empty", ns=(0, 1_234_567_890_123_456_789))
    return root


def gnu_tar(root: Path, *options: str) -> bytes:
    return subprocess.run(
        ["tar", "--sort=name", *options, "-C", str(root), "-cf", "-", "."], check=True, capture_output=True
    ).stdout


def check_against_disk(root: Path, data: bytes, *, nanoseconds: bool = False) -> list[Member]:
    """Every entry says what lstat(2) and the content say."""
    members = read(data)
    seen = set()
    for item in members:
        entry = item[0]
        path = os.path.join(bytes(root), entry.path)
        stat = os.lstat(path)
        seen.add(entry.path)
        if entry.kind is Kind.HARDLINK:
            assert os.lstat(os.path.join(bytes(root), entry.target)).st_ino == stat.st_ino
            continue
        assert entry.kind is KINDS[stat.st_mode & 0o170000]
        assert entry.mode == stat.st_mode & 0o7777
        assert (entry.uid, entry.gid) == (stat.st_uid, stat.st_gid)
        time_ns = entry.mtime_s * 1_000_000_000 + entry.mtime_ns
        assert time_ns == (stat.st_mtime_ns if nanoseconds else stat.st_mtime_ns // 10**9 * 10**9)
        if entry.kind is Kind.FILE:
            with open(path, "rb") as file:
                assert contents(item, data) == file.read()
        if entry.kind is Kind.SYMLINK:
            assert entry.target == os.readlink(path)
        if entry.kind in (Kind.CHR, Kind.BLK):
            assert os.makedev(entry.rdev_major, entry.rdev_minor) == stat.st_rdev
    on_disk = {b""}
    for folder, directories, files in os.walk(bytes(root)):
        on_disk |= {os.path.relpath(os.path.join(folder, name), bytes(root)) for name in directories + files}
    assert seen == on_disk
    return members


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_gnu_tar_holds_what_the_disk_holds(source: Path, form: str) -> None:
    members = check_against_disk(source, gnu_tar(source, f"--format={form}"), nanoseconds=form == "pax")
    assert Kind.HARDLINK in {entry.kind for entry, _ in members}


@pytest.mark.parametrize("form", ["v7", "ustar"])
def test_small_formats(tmp_path: Path, form: str) -> None:
    deep = tmp_path / ("a" * 50) / ("b" * 50 if form == "ustar" else "b")
    deep.mkdir(parents=True)
    (deep / ("c" * 60 if form == "ustar" else "c")).write_bytes(b"x" * 513)
    (tmp_path / "link").symlink_to("a" * 99)
    (tmp_path / "y").write_bytes(b"y")
    os.link(tmp_path / "y", tmp_path / "zz")
    check_against_disk(tmp_path, gnu_tar(tmp_path, f"--format={form}"))


@pytest.mark.parametrize(
    "options",
    [
        ["--format=gnu"],
        ["--format=pax", "--sparse-version=0.0"],
        ["--format=pax", "--sparse-version=0.1"],
        ["--format=pax", "--sparse-version=1.0"],
    ],
    ids=["old", "0.0", "0.1", "1.0"],
)
def test_sparse_files(tmp_path: Path, options: list[str]) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        for piece in range(1, 60):  # more than the header and one extension of the old format hold
            file.seek(piece * 16384)
            file.write(bytes([piece]) * 4096)
        file.seek(1_000_000)
        file.write(b"end")
        file.truncate(1_234_567)
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(100_000)
    data = gnu_tar(tmp_path, "--sparse", *options)
    members = check_against_disk(tmp_path, data, nanoseconds="--format=pax" in options)
    by_name = {entry.path: entry for entry, _ in members}
    assert len(by_name[b"sparse"].segments) == 60
    assert by_name[b"hole"].segments == () and by_name[b"hole"].size == 100_000
    assert read(data, [1] * len(data) if len(data) < 50_000 else [511] * (len(data) // 511)) == members


def test_xattrs_of_gnu_tar(tmp_path: Path) -> None:
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    file = tmp_path / "file"
    file.touch()
    os.setxattr(file, "user.note", b"a\0b\n=")
    os.setxattr(file, "user.empty", b"")
    os.setxattr(file, "security.capability", capability)
    os.setxattr(file, "trusted.overlay.opaque", b"y")
    data = gnu_tar(tmp_path, "--format=pax", "--xattrs", "--xattrs-include=*")
    assert b"trusted.overlay.opaque" in data
    by_name = {entry.path: entry for entry, _ in read(data)}
    assert by_name[b"file"].xattrs == {
        b"user.note": b"a\0b\n=",
        b"user.empty": b"",
        b"security.capability": capability,
    }


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_times_before_1970_and_large_ids(tmp_path: Path, form: str) -> None:
    (tmp_path / "old").touch()
    os.utime(tmp_path / "old", ns=(0, -1_500_000_000))
    os.chown(tmp_path / "old", 2**32 - 2, 3_000_000)
    check_against_disk(tmp_path, gnu_tar(tmp_path, f"--format={form}"), nanoseconds=form == "pax")


# --- against Python's tarfile ------------------------------------------------------------------------------

names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=60).filter(
    lambda name: name not in (".", "..") and len(name.encode()) <= 255
)


_TYPES = {"0": Kind.FILE, "5": Kind.DIR, "2": Kind.SYMLINK, "1": Kind.HARDLINK, "3": Kind.CHR}


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    form = draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for _ in range(draw(st.integers(0, 5))):
            info = tarfile.TarInfo("/".join(draw(st.lists(names, min_size=1, max_size=4))))
            info.mode = draw(st.integers(0, 0o7777))
            info.uid, info.gid = draw(st.integers(0, reader.MAX_ID)), draw(st.integers(0, reader.MAX_ID))
            info.mtime = draw(st.integers(-(2**40), 2**40))
            info.type = draw(st.sampled_from(list(_TYPES))).encode()
            content = b""
            if info.type == tarfile.REGTYPE:
                content = draw(st.binary(max_size=1500))
                info.size = len(content)
            if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = "/".join(draw(st.lists(names, min_size=1, max_size=4)))
            if info.type == tarfile.CHRTYPE:
                info.devmajor, info.devminor = draw(st.integers(0, 4095)), draw(st.integers(0, 2**20 - 1))
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@settings(deadline=None)
@given(archives(), st.lists(st.integers(1, 1100), max_size=30))
def test_reads_what_tarfile_reads_in_any_cut(data: bytes, cuts: list[int]) -> None:
    members = read(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as oracle:
        for (entry, content), info in zip(members, oracle.getmembers(), strict=True):
            assert entry.path == info.name.strip("/").encode("utf-8", "surrogateescape")
            assert entry.kind is _TYPES[info.type.decode()]
            assert (entry.mode, entry.uid, entry.gid) == (info.mode, info.uid, info.gid)
            assert entry.mtime_s == info.mtime
            if entry.kind is Kind.FILE:
                file = oracle.extractfile(info)
                assert file is not None
                assert content == file.read() == contents((entry, content), data)
                assert entry.size == info.size
                assert not entry.size or entry.segments[0][1] == info.offset_data
            if entry.kind in (Kind.SYMLINK, Kind.HARDLINK):
                assert entry.target == info.linkname.encode("utf-8", "surrogateescape")
            if entry.kind is Kind.CHR:
                assert (entry.rdev_major, entry.rdev_minor) == (info.devmajor, info.devminor)
    assert read(data, cuts) == members


def test_byte_by_byte(source: Path) -> None:
    data = gnu_tar(source, "--format=pax", "--exclude=./plain", "--exclude=./zz-hardlink")
    assert read(data, [1] * len(data)) == read(data)


@settings(deadline=None, max_examples=300)
@given(archives(), st.data())
def test_damage_gives_an_image_error_and_nothing_else(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        damaged[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    cut = draw.draw(st.integers(0, len(data)))
    try:
        read(bytes(damaged[:cut]))
    except ImageError as error:
        assert "tar is damaged at byte" in error.message and error.hint


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=600), st.sampled_from("xgLKS07\000123"))
def test_any_header_content_gives_an_image_error_or_entries(noise: bytes, letter: str) -> None:
    """With a right checksum, so that the noise reaches the parsers."""
    kind = letter.encode()
    data = member(b"a", noise, kind) + header(b"f", kind, 0, rest=noise[:30], sparse=noise[:96]) + END
    try:
        read(data)
    except ImageError as error:
        assert "tar is damaged" in error.message
