"""Judging URLs and times that servers send: where they lead, and how they are shown."""

from __future__ import annotations

import ipaddress
import re
import socket
import urllib.parse
from email.utils import parsedate_to_datetime
from enum import IntEnum
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
    """Whether `host` (no port; brackets allowed) is certainly this machine, so that plain http to it is safe."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def split_host(authority: str) -> str:
    """The host of host[:port]."""
    return urllib.parse.urlsplit(f"//{authority}").hostname or ""


# -- where a server may lead us --------------------------------------------------------------------------


class Reach(IntEnum):
    """How far in an address lies, seen from the network."""

    PUBLIC = 0
    PRIVATE = 1  # RFC 1918, RFC 4193, shared and reserved ranges: whoever stands behind the same router
    LINK = 2  # link-local and multicast: cloud metadata, the next machine
    LOOPBACK = 3


_LOOPBACK_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_PLAIN_URL = re.compile(r"[\x21-\x5b\x5d-\x7e]+")  # no spaces, backslashes, control and non-ASCII characters
_PLAIN_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")


def may_lead(from_url: str, to_url: str, peer: str = "") -> str | None:
    """Why a server that answered at `from_url` may not send us on to `to_url` (absolute); None if it may.

    Redirects, upload locations and token servers all obey this rule:

    - `to_url` is http or https, with a host, in plain characters, and without user name, password and fragment.
    - https does not lead to http: what follows could be read and changed on the way.
    - A server leads to its own host, and no further in than it stands itself (`Reach`): one on the internet not
      to private networks, one on a private network neither to link-local addresses (cloud metadata) nor to this
      machine; one on this machine anywhere. Otherwise it could use us to reach what it cannot reach itself.

    `peer` is the address that answered, "" if not known because a proxy was in between. Then a literal address in
    `from_url` counts, and a name counts as a private network. In `to_url` the names of this machine count, and literal
    addresses in every form that resolvers take. Other names are not resolved: a name that leads to 127.0.0.1, at once
    or the second time (DNS rebinding), is not noticed.

    Whether credentials are sent along is decided elsewhere: only to the `origin()` they are meant for.
    """
    try:
        from_scheme, from_host, _ = origin(from_url)
        to_scheme, to_host, _ = origin(to_url)
        authority = urllib.parse.urlsplit(to_url).netloc
    except RemoteError:
        return "it is not a web address"
    if not _PLAIN_URL.fullmatch(to_url) or not _PLAIN_HOST.fullmatch(to_host):
        return "it is malformed"
    if "@" in authority or "#" in to_url:
        return "it holds a user name or a fragment"
    if (from_scheme, to_scheme) == ("https", "http"):
        return "it is not encrypted any more"
    if from_host == to_host:
        return None
    if address := _literal(peer):
        stands = _reach_of(address)
    elif is_loopback(from_host):
        stands = Reach.LOOPBACK
    else:
        stands = _reach_of(address) if (address := _literal(from_host)) else Reach.PRIVATE
    target = _literal(to_host)
    leads = _reach_of(target) if target else Reach.LOOPBACK if _names_this_machine(to_host) else Reach.PUBLIC
    if leads <= stands:
        return None
    return "it leads to this machine" if leads == Reach.LOOPBACK else "it leads into another network"


def led_to(from_url: str, location: str, peer: str = "") -> str:
    """The absolute URL that a Location header means, without fragment. RemoteError if `may_lead` forbids it.

    A server behind a proxy that terminates TLS may name itself by plain http: its own address is asked by https.
    """
    try:
        url = urllib.parse.urldefrag(urllib.parse.urljoin(from_url, location)).url
        secure = _by_tls(urllib.parse.urlsplit(from_url), urllib.parse.urlsplit(url))
    except ValueError:
        url = secure = ""
    if secure != from_url:  # else it would answer the same again
        url = secure
    if problem := may_lead(from_url, url, peer):
        raise RemoteError(
            f"{redact(from_url)} redirected to {redact(url)}, which is not allowed: {problem}",
            "report this to the server's operator",
            temporary=False,
        )
    return url


def _by_tls(base: urllib.parse.SplitResult, parts: urllib.parse.SplitResult) -> str:
    """The URL `parts`, by https if it is plain http to the very server that answered by https as `base`."""
    ports = parts.port or 80, base.port or 443
    known = parts.hostname == base.hostname and (ports == (80, 443) or ports[0] == ports[1])
    if known and (base.scheme, parts.scheme) == ("https", "http") and "@" not in parts.netloc:
        parts = parts._replace(scheme="https", netloc=base.netloc)
    return parts.geturl()


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that `host` spells, as getaddrinfo(3) reads it; None for a name."""
    host = host.strip("[]").partition("%")[0].rstrip(".")
    try:
        if ":" not in host:  # also 127.1, 0x7f000001, 017700000001 and 2130706433
            return ipaddress.IPv4Address(socket.inet_aton(host)) if host and " " not in host else None
        address = ipaddress.IPv6Address(host)
    except (OSError, ValueError):
        return None
    embedded = address.ipv4_mapped or address.sixtofour
    if embedded is None and (address in _NAT64 or 1 < int(address) < (1 << 32)):
        embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return embedded or address


def _reach_of(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Reach:
    if address.is_loopback or address.is_unspecified:  # Linux connects 0.0.0.0 to this machine
        return Reach.LOOPBACK
    if address.is_link_local or address.is_multicast:
        return Reach.LINK
    return Reach.PUBLIC if address.is_global else Reach.PRIVATE


def _names_this_machine(host: str) -> bool:
    host = host.rstrip(".")
    return host in _LOOPBACK_NAMES or host.endswith(".localhost")


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
