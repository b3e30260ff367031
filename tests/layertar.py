"""Write layer tars by hand: every kind of entry, with the metadata that layers in the wild carry.

Over the standard library's tarfile in PAX form (writing only). Paths are bytes-safe: pass str with
surrogateescape for names that are not UTF-8.
"""

from __future__ import annotations

import io
import struct
import tarfile
from typing import Any

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
MTIME_S = 1_700_000_000  # every build of a test layer has the same bytes


class LayerTar:
    """A layer being written, in the order of the calls. `data` ends it and gives its bytes."""

    def __init__(self, format: int = tarfile.PAX_FORMAT) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(  # noqa: SIM115 -- closed by data()
            fileobj=self._buffer, mode="w", format=format, encoding="utf-8", errors="surrogateescape"
        )

    def file(self, path: str, data: bytes = b"", mode: int = 0o644, **metadata: Any) -> LayerTar:
        return self._add(path, tarfile.REGTYPE, mode, metadata, data=data)

    def dir(self, path: str, mode: int = 0o755, **metadata: Any) -> LayerTar:
        return self._add(path + "/", tarfile.DIRTYPE, mode, metadata)

    def symlink(self, path: str, to: str, **metadata: Any) -> LayerTar:
        return self._add(path, tarfile.SYMTYPE, 0o777, metadata, linkname=to)

    def hardlink(self, path: str, to: str, **metadata: Any) -> LayerTar:
        """`to` is the path in the image of a file of this or a lower layer."""
        return self._add(path, tarfile.LNKTYPE, 0o644, metadata, linkname=to)

    def fifo(self, path: str, mode: int = 0o600, **metadata: Any) -> LayerTar:
        return self._add(path, tarfile.FIFOTYPE, mode, metadata)

    def device(self, path: str, kind: bytes, major: int, minor: int, mode: int = 0o600) -> LayerTar:
        """`kind` is tarfile.CHRTYPE or tarfile.BLKTYPE."""
        return self._add(path, kind, mode, {}, devmajor=major, devminor=minor)

    def whiteout(self, path: str) -> LayerTar:
        """Delete the lower layers' `path` (OCI image-spec, layer.md, "Whiteouts")."""
        parent, _, name = path.rpartition("/")
        return self.file(f"{parent}/{WHITEOUT}{name}" if parent else WHITEOUT + name, mode=0)

    def opaque(self, path: str) -> LayerTar:
        """Hide everything that lower layers have in directory `path`."""
        return self.file(f"{path}/{OPAQUE}", mode=0)

    def data(self) -> bytes:
        self._tar.close()
        return self._buffer.getvalue()

    def _add(
        self, path: str, kind: bytes, mode: int, metadata: dict[str, Any], data: bytes = b"", **fields: Any
    ) -> LayerTar:
        """`metadata`: uid, gid, mtime_ns (whole time in ns), xattrs (str -> bytes), pax (raw PAX records)."""
        info = tarfile.TarInfo(path)
        info.type, info.mode, info.size = kind, mode, len(data)
        info.uid, info.gid = metadata.get("uid", 0), metadata.get("gid", 0)
        info.mtime = MTIME_S
        pax = dict(metadata.get("pax", {}))
        if (mtime_ns := metadata.get("mtime_ns")) is not None:
            sign, rest = ("-" if mtime_ns < 0 else ""), abs(mtime_ns)
            pax["mtime"] = f"{sign}{rest // 10**9}.{rest % 10**9:09d}"
        for name, value in metadata.get("xattrs", {}).items():
            # tarfile takes text; surrogateescape carries any byte through.
            pax[f"SCHILY.xattr.{name}"] = value.decode("utf-8", "surrogateescape")
        info.pax_headers = pax
        for name, value in fields.items():
            setattr(info, name, value)
        self._tar.addfile(info, io.BytesIO(data))
        return self


def capability(permitted: int, effective: bool = True) -> bytes:
    """Value of security.capability: vfs_cap_data, revision 2 (linux/capability.h)."""
    return struct.pack("<IIIII", 0x02000000 | effective, permitted & 0xFFFFFFFF, 0, permitted >> 32, 0)


def acl(*entries: tuple[int, int, int]) -> bytes:
    """Value of system.posix_acl_access or _default: (tag, permissions, id) (linux/posix_acl_xattr.h)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


ACL_USER_OBJ, ACL_USER, ACL_GROUP_OBJ, ACL_MASK, ACL_OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
NO_ID = 0xFFFFFFFF
EXAMPLE_ACL = acl(
    (ACL_USER_OBJ, 6, NO_ID), (ACL_USER, 4, 1234), (ACL_GROUP_OBJ, 4, NO_ID), (ACL_MASK, 4, NO_ID),
    (ACL_OTHER, 0, NO_ID),
)  # fmt: skip
