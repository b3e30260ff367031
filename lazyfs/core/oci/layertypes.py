"""Layers that are none that lazyfs can read, called by their names."""

from __future__ import annotations

import re

from lazyfs.core.layer.spans import Compression, detect_compression
from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.tar.fields import FormatError, check_sum
from lazyfs.errors import ImageError

HEAD_BYTES = 512  # a tar header; shorter if the layer is
_BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")  # its first block; there is no specification
_XZ = b"\xfd7zXZ\0"  # xz-file-format, 2.1.1.1
_CHECKSUM = slice(148, 156)


_REPACK = "push it again packed by gzip or zstd, e.g. skopeo copy --dest-compress-format zstd"


def check_readable(layer: Descriptor, head: bytes) -> None:
    """Raises ImageError if lazyfs reads no layers like this one, whose blob begins with `head` (HEAD_BYTES, or all of
    it).

    Its bytes say more than its media type, which is looked at for what they do not tell.
    """
    if layer.media_type.endswith("+encrypted"):  # as ocicrypt names them
        raise ImageError(f"layer {layer.digest} is encrypted, and lazyfs has no keys")
    if detect_compression(head) is not Compression.PLAIN or _is_tar(head):
        return
    if head.startswith(_XZ):
        raise ImageError(f"layer {layer.digest} is packed by xz, which lazyfs does not read", _REPACK)
    if _BZIP2.match(head):
        raise ImageError(f"layer {layer.digest} is packed by bzip2, which lazyfs does not read", _REPACK)
    if "tar" not in layer.media_type:
        raise ImageError(f"layer {layer.digest} is no tar, but of type {layer.media_type}")


def _is_tar(head: bytes) -> bool:
    if len(head) < HEAD_BYTES or not any(head):
        return not any(head)
    try:
        check_sum(head, head[_CHECKSUM])
    except FormatError:
        return False
    return True
