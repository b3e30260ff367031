"""How a host reaches the registry: directly, or over a link with a bandwidth and a round trip of its own.

    with connected(LINKS["home"], registry.host) as route:
        ... pull from f"{route.host}/name:tag" over plain HTTP, with "-o insecure" for lazyfs ...
        print(route.counts(), measured(route, registry))

The bandwidth is the kernel's (`wire`: tbf on both ends of a veth pair), the round trip a process' (`relay`), for
kernels without netem. It takes part of a core only while data flow, on the registry's side, and no time of this
process. Needs root.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from tests.servers import RegistryServer

ROOT = Path(__file__).resolve().parents[2]
READY_DEADLINE_S = 20.0
ANSWER_DEADLINE_S = 10.0
STOP_DEADLINE_S = 10.0
REQUEST_DEADLINE_S = 60.0
# A download to check a link takes about so long: several times the slow start of the longest one.
CHECK_S = 1.4
LOOPBACK_CHECK_BYTES = 64 << 20
PIECE_BYTES = 1 << 20
PINGS = 15


@dataclass(frozen=True)
class Link:
    """`bits_s` of either direction (None: nothing between), in Ethernet frames; `rtt_s` of the path.

    With `slow_start` a connection's window begins at ten segments, as over any real path: short transfers over
    new connections pay more round trips, of which parallel connections have more.
    """

    name: str
    bits_s: int | None
    rtt_s: float
    title: str
    slow_start: bool = True


LINKS = {
    link.name: link
    for link in (
        Link("loopback", None, 0.0, "loopback, nothing between"),
        Link("lan", 1_000_000_000, 0.001, "LAN, 1 Gbit/s, 1 ms"),
        Link("wan", 200_000_000, 0.020, "WAN, 200 Mbit/s, 20 ms"),
        Link("home", 50_000_000, 0.040, "home, 50 Mbit/s, 40 ms"),
    )
}


class Counts(NamedTuple):
    """What passed since the link was made: payload of TCP to the host and to the registry, connections, HTTP requests,
    and how much of each blob came down by its digest (and of what is no blob, heads too, by "")."""

    bytes_down: int
    bytes_up: int
    connections: int
    requests: int
    blobs: Mapping[str, int]


class Measured(NamedTuple):
    """What a link really gave: payload bytes per second, seconds of a round trip."""

    bytes_s: float
    rtt_s: float


class Route:
    """The way to a registry: `host` is what references begin with, `direct` what the registry listens on."""

    def __init__(self, link: Link, host: str, direct: str, relay: subprocess.Popen[bytes] | None = None) -> None:
        self.link = link
        self.host = host
        self.direct = direct
        self._relay = relay

    def counts(self) -> Counts | None:
        """None where nothing is between. RuntimeError if the relay is gone."""
        if self._relay is None:
            return None
        assert self._relay.stdin is not None
        try:
            self._relay.stdin.write(b"counts\n")
            self._relay.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError("the link's relay has ended") from None
        return Counts(*_answer(self._relay, ANSWER_DEADLINE_S))


@contextlib.contextmanager
def connected(link: Link, host: str) -> Iterator[Route]:
    """Reach the registry at `host`, "127.0.0.1:PORT", over this link until the block ends."""
    if link.bits_s is None:
        yield Route(link, host, host)
        return
    device = f"lazyfs{os.getpid()}"  # at most 13 of 15 characters
    command = [sys.executable, "-m", "benchmarks.hellobench.relay", "--upstream", host, "--device", device]
    command += ["--bits-s", str(link.bits_s), "--rtt-s", str(link.rtt_s)]
    command += ["--slow-start"] if link.slow_start else []
    with tempfile.TemporaryFile() as messages:
        relay = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages,
            start_new_session=True,  # a terminal's Ctrl-C is for us; it ends when we close its input
        )  # fmt: skip
        try:
            try:
                answer = _answer(relay, READY_DEADLINE_S)
            except RuntimeError as error:
                raise RuntimeError(f"no link {link.name}: {error}\n{_text(messages)}") from None
            yield Route(link, answer["host"], host, relay)
        finally:
            _stop(relay, device)


def measured(route: Route, registry: RegistryServer) -> Measured:
    """What the link gives, by a plain download and small requests.

    The rate is that of the second half of one download, when the connection's window is open. The round trip
    is the median time of `GET /v2/` on a kept connection minus the same without the link; a new connection costs
    one more. Leaves a random blob in the registry's repository "link-check".
    """
    size = LOOPBACK_CHECK_BYTES if route.link.bits_s is None else int(route.link.bits_s / 8 * CHECK_S)
    digest = registry.put_blob("link-check", os.urandom(size))
    bytes_s = _download_rate(route.host, f"/v2/link-check/blobs/{digest}", size)
    rtt_s = 0.0 if route.host == route.direct else _request_s(route.host) - _request_s(route.direct)
    return Measured(bytes_s, rtt_s)


def _download_rate(host: str, path: str, size: int) -> float:
    connection = http.client.HTTPConnection(host, timeout=REQUEST_DEADLINE_S)
    piece = memoryview(bytearray(PIECE_BYTES))
    with contextlib.closing(connection):
        connection.request("GET", path)
        with connection.getresponse() as response:
            if response.status != 200:
                raise RuntimeError(f"{host}{path}: status {response.status}")
            received, started, before = 0, 0.0, 0
            while count := response.readinto(piece):
                received += count
                if not started and received >= size // 2:
                    started, before = time.perf_counter(), received
            seconds = time.perf_counter() - started
    if received != size:
        raise RuntimeError(f"{host}{path}: {received} of {size} bytes")
    return (size - before) / seconds


def _request_s(host: str) -> float:
    samples = []
    with contextlib.closing(http.client.HTTPConnection(host, timeout=REQUEST_DEADLINE_S)) as connection:
        for _ in range(PINGS + 1):
            started = time.perf_counter()
            connection.request("GET", "/v2/")
            connection.getresponse().read()
            samples.append(time.perf_counter() - started)
    return statistics.median(samples[1:])  # the first paid for the connection


def _answer(relay: subprocess.Popen[bytes], deadline_s: float) -> Any:
    """One line of JSON of the relay's; it writes each whole."""
    assert relay.stdout is not None
    if not select.select([relay.stdout], [], [], deadline_s)[0]:
        raise RuntimeError(f"the link's relay did not answer in {deadline_s:g} s")
    line = relay.stdout.readline()
    if not line:
        raise RuntimeError("the link's relay has ended")
    return json.loads(line)


def _text(messages: IO[bytes]) -> str:
    messages.seek(0)
    return messages.read().decode(errors="replace")[-4000:]


def _stop(relay: subprocess.Popen[bytes], device: str) -> None:
    with relay:  # closes its pipes
        assert relay.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            relay.stdin.close()
        try:
            relay.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            relay.kill()
    # The kernel removes the pair with the relay's namespace, but in its own time.
    subprocess.run(["ip", "link", "delete", device], capture_output=True, check=False, timeout=STOP_DEADLINE_S)
