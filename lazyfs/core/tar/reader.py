"""Tar streams to entries: sans-io, incremental, without copying file data.

`TarReader` takes chunks of any size and yields a `TarEntry` for each member, then its data as memoryview slices of
the chunks. It knows v7, ustar, star, pax (POSIX.1-2017) and the GNU format with its long names, base-256 numbers and
sparse files. Where readers disagree on an odd archive, we follow Go's archive/tar, because containerd, Docker, Podman
and umoci unpack with it; we refuse what has no single meaning.

Limits: a layer comes from outside and may be made to exhaust a reader. Every limit is a constant below.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lazyfs.core.tar import fields
from lazyfs.core.tar.fields import FormatError, Segments
from lazyfs.core.tar.kinds import Kind
from lazyfs.errors import ImageError

MAX_PATH = 4096  # linux/limits.h PATH_MAX
MAX_NAME = 255  # linux/limits.h NAME_MAX
MAX_TARGET = 4095  # PATH_MAX without its NUL: symlink(2), ENAMETOOLONG
MAX_ENTRIES = 4_000_000  # a large image has 300,000; this bounds the memory of callers
MAX_ID = 2**32 - 2
_UNCHANGED_IDS = (-1, MAX_ID + 1)  # to chown(2): what an unpacker that runs as root makes stays owned by root
MAX_MAJOR, MAX_MINOR = 2**12 - 1, 2**20 - 1  # dev_t of the kernel: 12 and 20 bits

_BLOCK = 512
_ZERO_BLOCK = bytes(_BLOCK)
_DAMAGED_HINT = "the image itself is at fault: pull or build it again, or report it to its publisher"
# name mode uid gid size mtime checksum type linkname magic (uname gname) major minor prefix star-trailer
_HEADER = struct.Struct("100s 8s 8s 8s 12s 12s 8s c 100s 8s 64x 8s 8s 155s 8x 4s")
_UNSUPPORTED = {
    b"M": "multi-volume part",
    b"N": "GNU rename list",
    b"D": "GNU directory dump",
    b"V": "volume label",
}


# All other types are files, as POSIX demands for unknown ones. S: GNU sparse file, 7: contiguous file.
_KINDS = {
    b"1": Kind.HARDLINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHR,
    b"4": Kind.BLK,
    b"5": Kind.DIR,
    b"6": Kind.FIFO,
}


@dataclass(slots=True)
class TarEntry:
    """One member; sizes and offsets in bytes. `path` and a hard link's `target` are normalised."""

    path: bytes
    kind: Kind
    mode: int
    uid: int
    gid: int
    size: int  # logical size of a FILE, else 0
    mtime_s: int
    mtime_ns: int
    target: bytes = b""  # SYMLINK: as written; HARDLINK: normalised path
    rdev_major: int = 0
    rdev_minor: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    segments: Segments = ()  # (file offset, offset in the tar, length), ascending, holes left out


@dataclass(slots=True)
class TarData:
    """The next bytes of the last entry's data. `view` is part of the fed chunk and valid until the next step."""

    view: memoryview


def normalise(raw: bytes) -> bytes:
    """`raw` without a leading "/" and without empty, "." and ".." parts; b"" is the root itself.

    ".." takes away the part before it, whatever that is, and stays inside the root, as in containerd and umoci
    (Go's filepath.Clean). Raises FormatError for NUL bytes, parts over 255 and paths over 4096 bytes.
    """
    parts = [part for part in raw.split(b"/") if part and part != b"."]
    if b".." in parts:
        parts = _without_parents(parts)
    path = b"/".join(parts)
    if len(path) > MAX_NAME and (len(path) > MAX_PATH or max(map(len, parts)) > MAX_NAME):
        raise FormatError("a path is too long")
    if b"\0" in path:
        raise FormatError("a path holds a NUL byte")
    return path


def _without_parents(parts: list[bytes]) -> list[bytes]:
    kept: list[bytes] = []
    for part in parts:
        if part != b"..":
            kept.append(part)
        elif kept:
            kept.pop()
    return kept


class TarReader:
    """Incremental reader of one uncompressed tar stream.

    Feed chunks in order, exhaust each returned iterator before the next call, and call `finish` in the end. Do not
    use the reader after an ImageError.
    """

    def __init__(self) -> None:
        self._offset = 0  # of the stream, behind the last block taken
        self._data_left = 0  # bytes of member data still to hand out
        self._padding_left = 0
        self._ended = False
        self._partial = bytearray()  # the start of a block that the last chunk ended in
        self._need = _BLOCK  # bytes that `_handler` takes at once
        self._payload_size = 0  # how many of them are not padding
        self._handler: Callable[[bytes], TarEntry | None] = self._take_header
        self._extended: dict[bytes, Callable[[bytes], None]] = {
            b"x": self._take_pax,
            b"X": self._take_pax,  # Solaris
            b"g": self._take_global,
            b"L": self._take_long_name,
            b"K": self._take_long_target,
        }
        self._zero_seen = False
        self._entries = 0
        # What the headers before it say about the next member.
        self._pax: dict[bytes, bytes] | None = None
        self._long_name: bytes | None = None
        self._long_target: bytes | None = None
        # A sparse file whose map is incomplete.
        self._sparse_entry: TarEntry | None = None
        self._sparse_stored = 0
        self._sparse_map: list[tuple[int, int]] = []
        self._sparse_text = bytearray()
        self._sparse_lines = 0  # lines of the text that are still to come

    def feed(self, chunk: bytes | memoryview) -> Iterator[TarEntry | TarData]:
        """Yields what `chunk` completes, each entry before its data. `chunk` must not change in the meantime.

        Raises ImageError if the stream is damaged or hostile, or has what no image may contain.
        """
        view = memoryview(chunk)
        start, position, end = self._offset, 0, len(view)
        while position < end:
            if self._data_left:
                take = min(self._data_left, end - position)
                self._data_left -= take
                position += take
                self._offset = start + position
                yield TarData(view[position - take : position])
            elif self._padding_left:
                take = min(self._padding_left, end - position)
                self._padding_left -= take
                position += take
            elif self._ended:
                position = end
            else:
                take = min(self._need - len(self._partial), end - position)
                piece = view[position : position + take]
                position += take
                if self._partial or take < self._need:
                    self._partial += piece
                    if len(self._partial) < self._need:
                        break
                    block = bytes(self._partial)
                    self._partial.clear()
                else:
                    block = bytes(piece)
                self._offset = start + position
                try:
                    entry = self._handler(block)
                except FormatError as error:
                    raise self._damaged(str(error), self._offset - len(block)) from None
                if entry is not None:
                    yield entry
        self._offset = start + end

    def finish(self) -> None:
        """Ends the stream. Raises ImageError if it ends inside a member; an end marker is not required."""
        if self._data_left or self._partial or self._handler != self._take_header or self._inherits():
            raise self._damaged("it ends in the middle of a member", self._offset)

    def _damaged(self, text: str, offset: int) -> ImageError:
        return ImageError(f"the layer's tar is damaged at byte {offset}: {text}", _DAMAGED_HINT)

    def _inherits(self) -> bool:
        return self._pax is not None or self._long_name is not None or self._long_target is not None

    def _expect(self, size: int, handler: Callable[[bytes], TarEntry | None]) -> None:
        """Makes `feed` call `handler` with the next `size` bytes, rounded up to blocks."""
        self._need, self._payload_size, self._handler = _padded(size), size, handler

    def _take_header(self, block: bytes) -> TarEntry | None:
        if block == _ZERO_BLOCK:
            if self._inherits():
                raise FormatError("it ends in the middle of a member")
            self._ended = self._zero_seen  # two zero blocks: POSIX.1-2017, ustar Interchange Format
            self._zero_seen = True
            return None
        if self._zero_seen:
            raise FormatError("a member follows a lone zero block, which some readers take for the end")
        header = _HEADER.unpack(block)
        fields.check_sum(block, header[6])
        type_flag: bytes = header[7]
        if type_flag in self._extended:
            size = fields.number(header[4], "the size of an extended header")
            if not 0 <= size <= fields.MAX_PAX_BYTES:
                raise FormatError("an extended header is larger than 1 MiB")
            self._expect(size, self._extended[type_flag])
            return None
        if type_flag in _UNSUPPORTED:
            raise FormatError(f"a member is a {_UNSUPPORTED[type_flag]}, which has no place in a layer")
        return self._member(block, header, type_flag)

    def _payload(self, block: bytes) -> bytes:
        payload = block[: self._payload_size]
        self._expect(_BLOCK, self._take_header)
        return payload

    def _take_pax(self, block: bytes) -> None:
        self._pax = fields.parse_pax(self._payload(block))

    def _take_global(self, block: bytes) -> None:
        """Global records say nothing about members: those who unpack with Go's archive/tar leave them out as well."""
        fields.parse_pax(self._payload(block))

    def _take_long_name(self, block: bytes) -> None:
        self._long_name = _text(self._payload(block)) or None

    def _take_long_target(self, block: bytes) -> None:
        self._long_target = _text(self._payload(block)) or None

    def _member(self, block: bytes, header: tuple[bytes, ...], type_flag: bytes) -> TarEntry | None:
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            raise FormatError(f"it has more than {MAX_ENTRIES} members")
        raw, mode, uid, gid, stored, mtime, _, _, target, magic, major, minor, prefix, trailer = header
        name = _text(raw)
        if magic[:6] == b"ustar\0" and prefix[0]:  # in other formats these bytes have another meaning
            name = _text(prefix[:131] if trailer == b"tar\0" else prefix) + b"/" + name
        elif magic == b"ustar  \0" and (wrong := fields.wrong_gnu_prefix(prefix)):
            name = wrong + b"/" + name
        entry = TarEntry(
            path=name,
            kind=_KINDS.get(type_flag, Kind.FILE),
            mode=fields.number(mode, "the mode") & 0o7777,
            uid=fields.number(uid, "the uid"),
            gid=fields.number(gid, "the gid"),
            size=fields.number(stored, "the size"),
            mtime_s=fields.number(mtime, "the time"),
            mtime_ns=0,
            target=_text(target),
        )
        records: dict[bytes, bytes] = {}
        if self._pax is not None:
            records = self._pax
            _override(entry, records)
        if self._long_name is not None:
            entry.path = self._long_name
        if self._long_target is not None:
            entry.target = self._long_target
        self._pax = self._long_name = self._long_target = None
        if type_flag == b"\0" and entry.path.endswith(b"/"):  # v7 has no type for directories
            entry.kind = Kind.DIR
        entry.path = normalise(entry.path)
        entry.uid, entry.gid = _owner(entry.uid), _owner(entry.gid)
        if entry.kind is Kind.FILE:
            entry.target = b""
            return self._file(entry, records, block if type_flag == b"S" else b"")
        entry.size = 0  # other kinds have no data, whatever their size field says
        if entry.kind is Kind.SYMLINK:
            if not 0 < len(entry.target) <= MAX_TARGET or b"\0" in entry.target:
                raise FormatError("a symbolic link is empty, too long or holds a NUL byte")
        elif entry.kind is Kind.HARDLINK:
            entry.target = normalise(entry.target)
        else:
            entry.target = b""
            if entry.kind in (Kind.CHR, Kind.BLK):
                entry.rdev_major = fields.number(major, "a device number")
                entry.rdev_minor = fields.number(minor, "a device number")
                if not (0 <= entry.rdev_major <= MAX_MAJOR and 0 <= entry.rdev_minor <= MAX_MINOR):
                    raise FormatError("a device number is out of range")
        return entry

    def _file(self, entry: TarEntry, records: dict[bytes, bytes], gnu_header: bytes) -> TarEntry | None:
        stored = entry.size
        version = fields.sparse_version(records) if records else 0
        if gnu_header:
            entry.size = fields.number(gnu_header[483:495], "the size of a sparse file")
        elif version:
            entry.size = fields.sparse_size(records)
        if not (0 <= entry.size <= fields.MAX_FILE_BYTES and 0 <= stored <= fields.MAX_FILE_BYTES):
            raise FormatError("a file is larger than 16 TiB")
        self._sparse_entry, self._sparse_stored = entry, stored
        if gnu_header:
            self._sparse_map = fields.gnu_pairs(gnu_header[386:482])
            if gnu_header[482]:
                self._expect(_BLOCK, self._take_gnu_extension)
                return None
            return self._start_data(self._sparse_map)
        if version == 1:
            values = records[b"GNU.sparse.map"]
            return self._start_data(fields.sparse_pairs(values.split(b",") if values else []))
        if version == 2:
            self._sparse_text.clear()
            self._sparse_lines = 0
            self._expect(_BLOCK, self._take_map)
            return None
        return self._start_data([(0, stored)])

    def _take_gnu_extension(self, block: bytes) -> TarEntry | None:
        self._sparse_map += fields.gnu_pairs(block[:504])
        if len(self._sparse_map) > fields.MAX_SEGMENTS:
            raise FormatError("a sparse map is too long")
        if block[504]:
            return None
        return self._start_data(self._sparse_map)

    def _take_map(self, block: bytes) -> TarEntry | None:
        """Sparse format 1.0: the stored data begins with a count and the numbers, one a line, padded to a block."""
        self._sparse_stored -= _BLOCK
        if not self._sparse_text:
            count = fields.decimal(block.partition(b"\n")[0], "the length of a sparse map")
            if count > fields.MAX_SEGMENTS:
                raise FormatError("a sparse map is too long")
            self._sparse_lines = 1 + 2 * count
        self._sparse_text += block
        lines = block.count(b"\n")
        if self._sparse_stored < 0 or not lines:
            raise FormatError("a sparse map is cut off")
        self._sparse_lines -= lines
        if self._sparse_lines > 0:
            return None
        values = bytes(self._sparse_text).split(b"\n")
        return self._start_data(fields.sparse_pairs(values[1 : 1 + 2 * int(values[0])]))

    def _start_data(self, pairs: list[tuple[int, int]]) -> TarEntry:
        entry, stored = self._sparse_entry, self._sparse_stored
        assert entry is not None
        entry.segments = fields.lay_out(pairs, entry.size, stored, self._offset)
        self._data_left, self._padding_left = stored, _padded(stored) - stored
        self._sparse_entry, self._sparse_map = None, []
        self._expect(_BLOCK, self._take_header)
        return entry


def _override(entry: TarEntry, records: dict[bytes, bytes]) -> None:
    """Extended records replace header fields; an empty value counts as not given (POSIX)."""
    entry.path = records.get(b"path") or entry.path
    if fields.sparse_version(records):
        entry.path = records.get(b"GNU.sparse.name") or entry.path
    entry.target = records.get(b"linkpath") or entry.target
    if value := records.get(b"size"):
        entry.size = fields.decimal(value, "the size")
    if value := records.get(b"uid"):
        entry.uid = fields.decimal(value, "the uid")
    if value := records.get(b"gid"):
        entry.gid = fields.decimal(value, "the gid")
    if value := records.get(b"mtime"):
        entry.mtime_s, entry.mtime_ns = fields.timestamp(value)
    entry.xattrs = fields.xattrs(records)


def _owner(number: int) -> int:
    if number in _UNCHANGED_IDS:
        return 0
    if not 0 <= number <= MAX_ID:
        raise FormatError("a uid or gid is out of range")
    return number


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _text(value: bytes) -> bytes:
    return value.partition(b"\0")[0]
