"""Digests, a type for each kind of thing that is hashed. Parsers make them; nothing else converts one into another.

hashlib is imported only where much is hashed (sha256.py).
"""

from __future__ import annotations

from lazyfs.core.oci.sha256 import light_sha256
from lazyfs.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NewType

    Digest = NewType("Digest", str)  # "sha256:<hex>" (or sha512) of a blob or manifest, as stored: a layer compressed
    DiffId = NewType("DiffId", str)  # "sha256:<hex>" of a layer's plain tar
    ContentRoot = NewType("ContentRoot", str)  # hexadecimal digits only, of a layer's block table
else:
    Digest = DiffId = ContentRoot = str  # typing takes 10 ms to import

_LITTLE_BYTES = 64 << 10  # a third of a millisecond with either implementation
_HEX_DIGITS = {"sha256": 64, "sha512": 128}
_HEX = frozenset("0123456789abcdef")


def is_digest(text: str) -> bool:
    """Whether `text` is a digest that lazyfs verifies: "sha256:<64 hex>" or "sha512:<128 hex>"."""
    algorithm, _, value = text.partition(":")
    return len(value) == _HEX_DIGITS.get(algorithm) and _HEX.issuperset(value)


def checked_digest(text: object) -> Digest:
    """`text`, if it is a digest that lazyfs verifies. ImageError for anything else."""
    parse_digest(text)
    return Digest(str(text))


def parse_digest(text: object) -> tuple[str, str]:
    """Split "sha256:<64 hex>" (or sha512) into (algorithm, hex). ImageError for anything else."""
    if not isinstance(text, str) or not is_digest(text):
        raise ImageError(f"bad digest {str(text)[:80]!r}", "only sha256 and sha512 digests are supported")
    algorithm, _, value = text.partition(":")
    return algorithm, value


def sha256_digest(data: bytes | memoryview) -> Digest:
    """The digest "sha256:<hex>" of `data`."""
    import hashlib

    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


class DigestCheck:
    """Hashes a blob piece by piece and compares it with the digest it must have."""

    def __init__(self, digest: str) -> None:
        import hashlib

        algorithm, self._hex = parse_digest(digest)
        self._hash = hashlib.new(algorithm)

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        self._hash.update(data)

    def matches(self) -> bool:
        """Whether all bytes so far are the blob."""
        return self._hash.hexdigest() == self._hex


def digest_matches(data: bytes | memoryview, digest: str) -> bool:
    """Whether `data` has this digest."""
    if len(data) <= _LITTLE_BYTES and digest.startswith("sha256:"):
        return light_sha256(data) == parse_digest(digest)[1]
    check = DigestCheck(digest)
    check.update(data)
    return check.matches()
