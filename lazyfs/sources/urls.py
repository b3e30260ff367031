"""Judging URLs and times that servers send: where they lead, and how they are shown."""

from __future__ import annotations

import ipaddress
import urllib.parse
from email.utils import parsedate_to_datetime
from time import time

from lazyfs.errors import RemoteError


def redact(url: str) -> str:
    """`url` without user name, query string and fragment, for messages."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "a malformed URL"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:300]


def origin(url: str) -> tuple[str, str, int]:
    """(scheme, host, port) of `url`: credentials for one origin are never sent to another.

    RemoteError if it has none.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        port, parts = 0, urllib.parse.SplitResult("", "", "", "", "")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RemoteError(
            f"{redact(url)} is not a web address", "report this to the server's operator", temporary=False
        )
    return parts.scheme, parts.hostname.lower(), port or (443 if parts.scheme == "https" else 80)


def is_loopback(host: str) -> bool:
    """Whether `host` (no port; brackets allowed) can only be this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def split_host(authority: str) -> str:
    """The host of host[:port]."""
    return urllib.parse.urlsplit(f"//{authority}").hostname or ""


def is_link_local(host: str) -> bool:
    """Whether `host` is an address whose meaning depends on who asks: cloud metadata, multicast, 0.0.0.0."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return address.is_link_local or address.is_unspecified or address.is_multicast


def retry_after_s(header: str | None) -> float | None:
    """Seconds to wait by a Retry-After header (RFC 9110 section 10.2.3): a number or a date."""
    if header is None:
        return None
    if header.isascii() and header.isdigit():
        return float(header[:9])
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time())
    except (ValueError, TypeError, OverflowError):
        return None
