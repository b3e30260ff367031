"""SHA-256 of little data for commands that do nothing else: without hashlib, whose OpenSSL takes 8 ms to load when the
page cache is cold, 2 ms else. Pure C, 200 MB/s; whoever hashes much uses hashlib."""

from __future__ import annotations

try:
    from _sha256 import sha256  # type: ignore[import-not-found]
except ImportError:  # Python 3.12 and later
    from hashlib import sha256


def light_sha256(data: bytes | memoryview) -> str:
    """The hash in hexadecimal digits."""
    digits: str = sha256(data).hexdigest()
    return digits
