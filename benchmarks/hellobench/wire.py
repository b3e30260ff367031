"""A veth pair between this network namespace and a new one, with a token bucket filter (tbf) at either end.

The new namespace has no name: it lasts as long as the socket that listens in it, so nothing of it outlives the
process, however that ends; the pair goes with it.

tbf's numbers. Rates count Ethernet frames of 1514 bytes with 1448 bytes of TCP payload, as a link's nominal rate
does, so TCP gets 95.6 % of them at best. `burst` is what passes at once after a pause: 2 ms of the rate. Less, and
a timer that fires late on a busy host costs throughput; more, and small downloads would be for nothing. tbf cuts
segments that are larger (GSO, up to 64 KiB) into packets itself, so no offload has to be switched off. `limit`, its
queue, is never full: the kernel lets each socket of the host have only about 1 ms of data in a queue below it (TCP
small queues), so that nothing is dropped and parallel connections share the rate.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import os
import socket
from dataclasses import dataclass
from typing import IO

from benchmarks import host

BURST_S = 0.002
LIMIT_BYTES = 16 << 20
CLONE_NEWNET = 0x40000000  # sched.h
# Addresses that no real network has: RFC 5737.
DOCUMENTATION = ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24")
INNER = "server"

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Wire:
    """The pair's two addresses, its outer device's name, and its rate in each direction."""

    inner: str
    outer: str
    device: str
    bits_s: int


def prctl(option: int, value: int) -> None:
    """Set a property of this process (prctl(2))."""
    _succeed(_libc.prctl(option, value, 0, 0, 0))


def free_wire(device: str, bits_s: int) -> Wire:
    """A wire with the first four documentation addresses that no route of this namespace leads to."""
    routes = json.loads(host.run("ip", "-json", "-4", "route", "show", "table", "all"))
    taken = [ipaddress.IPv4Network(route["dst"]) for route in routes if route["dst"] != "default"]
    for block in DOCUMENTATION:
        for network in ipaddress.IPv4Network(block).subnets(new_prefix=30):
            if not any(network.overlaps(other) for other in taken):
                inner, outer = network.hosts()
                return Wire(str(inner), str(outer), device, bits_s)
    raise RuntimeError("all documentation addresses are in use on this host")


def listen_behind(wire: Wire, port: int) -> socket.socket:
    """Lay the wire; a socket that listens at its inner end. Closing it removes the wire. Needs root, one thread."""
    with contextlib.ExitStack() as opened:
        home = opened.enter_context(open("/proc/self/ns/net", "rb"))
        try:
            _succeed(_libc.unshare(CLONE_NEWNET))
            parent = str(os.getppid())
            host.run("ip", "link", "add", INNER, "type", "veth", "peer", "name", wire.device, "netns", parent)
            _set_up(INNER, wire.inner)
            inner = opened.enter_context(open("/proc/self/ns/net", "rb"))
            _enter(home)
            _set_up(wire.device, wire.outer)
            # Only now, when the first end has its carrier, too: a queue put on a device with a carrier works at
            # once, while the kernel takes up to a second to notice a carrier, and drops packets until then.
            _shape(wire.device, wire.bits_s)
            _enter(inner)
            _shape(INNER, wire.bits_s)
            return socket.create_server((wire.inner, port), backlog=128)
        finally:
            _enter(home)


def _set_up(device: str, address: str) -> None:
    # No IPv6: its neighbour discovery would be traffic that nobody asked for.
    host.run("ip", "link", "set", device, "addrgenmode", "none")
    host.run("ip", "address", "add", f"{address}/30", "dev", device)
    host.run("ip", "link", "set", device, "up")


def _shape(device: str, bits_s: int) -> None:
    shape = ("rate", f"{bits_s}bit", "burst", str(int(bits_s / 8 * BURST_S)), "limit", str(LIMIT_BYTES))
    host.run("tc", "qdisc", "add", "dev", device, "root", "tbf", *shape)


def _enter(namespace: IO[bytes]) -> None:
    _succeed(_libc.setns(namespace.fileno(), CLONE_NEWNET))


def _succeed(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
