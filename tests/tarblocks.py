"""Read tars with lazyfs' reader, and write single header blocks with any content, right checksum included."""

from __future__ import annotations

from collections.abc import Iterable

from lazyfs.core.tar.reader import TarData, TarEntry, TarReader

Member = tuple[TarEntry, bytes]
END = bytes(1024)


def read(data: bytes, sizes: Iterable[int] = ()) -> list[Member]:
    """Entries with their data; `sizes` cuts the stream, what is left comes as one chunk."""
    reader = TarReader()
    members: list[Member] = []
    position = 0
    for size in [*sizes, len(data)]:
        chunk = memoryview(data)[position : position + size]
        position += len(chunk)
        for item in reader.feed(chunk):
            if isinstance(item, TarData):
                assert item.view.obj is data  # handed through, not copied
                members[-1] = (members[-1][0], members[-1][1] + bytes(item.view))
            else:
                members.append((item, b""))
    reader.finish()
    return members


def contents(member: Member, data: bytes) -> bytes:
    """The logical content, put together from the segments; checks them against the delivered data."""
    entry, delivered = member
    image = bytearray(entry.size)
    stored = b""
    for offset, tar_offset, length in entry.segments:
        piece = data[tar_offset : tar_offset + length]
        assert len(piece) == length
        image[offset : offset + length] = piece
        stored += piece
    assert stored == delivered
    return bytes(image)


_SPOTS = {
    "size_field": 124,
    "linkname": 157,
    "major": 329,
    "minor": 337,
    "prefix": 345,
    "sparse": 386,
    "rest": 482,
    "trailer": 508,
}


def header(name: bytes = b"f", kind: bytes = b"0", size: int = 0, **fields: bytes) -> bytes:
    """A header block; keyword arguments overwrite single fields."""
    block = bytearray(512)
    place = {
        "name": (0, name),
        "mode": (100, b"0000644\0"),
        "uid": (108, b"0000001\0"),
        "gid": (116, b"0000002\0"),
        "size": (124, b"%011o\0" % size),
        "mtime": (136, b"00000000003\0"),
        "type": (156, kind),
        "magic": (257, b"ustar\0" + b"00"),
    }
    for key, value in fields.items():
        place[key] = (place[key][0] if key in place else _SPOTS[key], value)
    for at, value in place.values():
        block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes = b"f", data: bytes = b"", kind: bytes = b"0", **fields: bytes) -> bytes:
    return header(name, kind, len(data), **fields) + data + bytes(-len(data) % 512)


def pax_member(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    return member(b"PaxHeaders/f", b"".join(record(*pair) for pair in records), kind)


def record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return str(length).encode() + body


def only(data: bytes) -> TarEntry:
    ((entry, _),) = read(data)
    return entry
