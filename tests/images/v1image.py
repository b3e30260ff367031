"""An image with an index of version 1, and the cache of a host that has it, as lazyfs left them before version 2.

v1.tar.xz was written once, by `lazyfs index oci:image --push` of that time: a layer of 1.5 MB in gzip of which a span
needs a window, and one of two small files, a whiteout among them.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

LAYERS = 2


def unpack(directory: Path) -> tuple[str, Path]:
    """Reference of the image, in a layout, and the cache directory."""
    with tarfile.open(Path(__file__).with_name("v1.tar.xz")) as archive:
        archive.extractall(directory)
    (directory / "cache").chmod(0o700)
    return f"oci:{directory}/image:latest", directory / "cache"


def contents(directory: Path) -> dict[str, bytes]:
    """Content of all files of the root, by path."""
    blobs = directory / "image" / "blobs" / "sha256"
    files: dict[str, bytes] = {}
    for name in ("48a4566ec7aa", "07f32c67652a"):
        (blob,) = blobs.glob(f"{name}*")
        with tarfile.open(blob, "r:gz") as layer:
            for member in layer:
                if member.isreg() or member.islnk():
                    file = layer.extractfile(member)
                    assert file is not None
                    files["/" + member.name] = file.read()
    del files["/etc/one"], files["/etc/.wh.one"]
    return files
