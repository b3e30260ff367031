"""The process at the far end of a link: passes TCP connections on to the registry, half a round trip late each way.

    python -m benchmarks.hellobench.relay --upstream 127.0.0.1:5000 --bits-s 50000000 --rtt-s 0.04 --device NAME

It lays a wire (`wire`), listens at its inner end and prints one line of JSON, {"host": ADDRESS:PORT}. Then it
answers each line on standard input with the counts so far, and ends when standard input does, also because
whoever held the other end died.

What it does as a path of that length would:
- each byte is delivered RTT/2 after it was read, in order; ends and resets of connections, too;
- a client's connection is made at once by the kernel next to it, so the handshake's round trip is charged later:
  nothing is read from a new connection for one RTT, so nothing is delivered before RTT + RTT/2;
- data under way are bounded by a window. With --slow-start it begins at ten segments (RFC 6928), grows by what is
  acknowledged a round trip later (RFC 5681), and shrinks by half for each time-out of idleness (RFC 2861, Linux's
  default), as for any new connection over a long path. Its greatest size is four times rate x RTT.
Losses and their recovery are not modelled: the window stays open.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import heapq
import itertools
import json
import os
import selectors
import socket
import struct
import termios
import time
from collections import Counter, deque
from collections.abc import Callable

from benchmarks.hellobench import wire
from benchmarks.hellobench.tally import Tally

READ_BYTES = 256 << 10
FIRST_WINDOW_BYTES = 10 * 1448
LEAST_OPEN_WINDOW_BYTES = 1 << 20
TIMEOUT_S = 0.2  # Linux's least retransmission time-out, to which a round trip is added
# What the kernel holds for a client beyond the window: enough for the rate, little enough for exact counts.
SEND_BUFFER_S = 0.005
LEAST_SEND_BUFFER_BYTES = 128 << 10
SO_SNDBUFFORCE = 32  # socket(7): not bound by net.core.wmem_max
PR_SET_TIMERSLACK = 29  # prctl(2)
RESET = struct.pack("ii", 1, 0)  # struct linger: close() sends RST

Handler = Callable[[int], None]


class Relay:
    """One thread, all connections. `rtt_s` and the window are each connection's."""

    def __init__(self, listener: socket.socket, upstream: tuple[str, int], rtt_s: float, bits_s: int) -> None:
        self.upstream = upstream
        self.rtt_s = rtt_s
        self.open_window_bytes = max(LEAST_OPEN_WINDOW_BYTES, int(4 * rtt_s * bits_s / 8))
        self.first_window_bytes = self.open_window_bytes
        self.send_buffer_bytes = max(LEAST_SEND_BUFFER_BYTES, int(bits_s / 8 * SEND_BUFFER_S))
        self.bytes_down = self.bytes_up = self.connections = 0
        self.ended_requests = 0  # of connections that are gone
        self.blobs: Counter[str] = Counter()
        # select(2) rather than epoll: Python's epoll waits whole milliseconds, a LAN's round trip.
        self._selector = selectors.SelectSelector()
        self._listener = listener
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._open: set[Connection] = set()
        self._ended = False

    def run(self) -> None:
        """Serve until standard input ends; then every connection is reset."""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(0, selectors.EVENT_READ, self._command)
        try:
            while not self._ended:
                wait_s = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
                for key, events in self._selector.select(wait_s):
                    # An earlier event of this round may have ended the connection.
                    if key.fileobj in self._selector.get_map():
                        key.data(events)
                now = time.monotonic()
                while self._timers and self._timers[0][0] <= now:
                    heapq.heappop(self._timers)[2]()
        finally:
            for connection in list(self._open):
                connection.abort()
            self._listener.close()
            self._selector.close()

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Call later; calls for the same time stay in order."""
        heapq.heappush(self._timers, (when, next(self._order), call))

    def want(self, sock: socket.socket, events: int, handler: Handler) -> None:
        """Call `handler` when a socket is ready for these events; 0 for none."""
        key = self._selector.get_map().get(sock)
        if key is None:
            if events:
                self._selector.register(sock, events, handler)
        elif not events:
            self._selector.unregister(sock)
        elif key.events != events:
            self._selector.modify(sock, events, handler)

    def ended(self, connection: Connection) -> None:
        self.ended_requests += connection.tally.requests
        self._open.discard(connection)

    def _accept(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            client, _address = self._listener.accept()
            self.connections += 1
            self._open.add(Connection(self, client))

    def _command(self, _: int) -> None:
        lines = os.read(0, 4096)
        self._ended = not lines
        for _line in range(lines.count(b"\n")):
            print(json.dumps(self._counts()), flush=True)

    def _counts(self) -> list[object]:
        """As links.Counts has them. What the kernel still holds has not reached a client."""
        down, blobs, requests = self.bytes_down, self.blobs.copy(), self.ended_requests
        for connection in self._open:
            unsent = connection.unsent_bytes()
            down -= unsent
            blobs[connection.tally.asked] -= unsent
            requests += connection.tally.requests
        return [down, self.bytes_up, self.connections, requests, blobs]


class Connection:
    """A client's connection and ours to the registry."""

    def __init__(self, relay: Relay, client: socket.socket) -> None:
        self.relay = relay
        self.client = client
        self.server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        for sock in (client, self.server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, relay.send_buffer_bytes)
        # The path's length is ours to model: whatever the host is set to (BBR has pauses) must not shape it, too.
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        self.closed = False
        self.tally = Tally(relay.blobs)
        self._established = False
        self._up = Direction(self, client, self.server)
        self._down = Direction(self, self.server, client)
        self.server.connect_ex(relay.upstream)  # an error comes with the first read
        relay.at(time.monotonic() + relay.rtt_s, self._establish)

    def _establish(self) -> None:
        self._established = True
        self.attend()

    def attend(self) -> None:
        """Ask for what both directions wait for; end when both are done."""
        if self.closed or not self._established:
            return
        if self._up.done and self._down.done:
            self._close()
            return
        read, write = selectors.EVENT_READ, selectors.EVENT_WRITE
        up, down = self._up, self._down
        self.relay.want(self.client, read * up.may_read | write * down.blocked, self._client_ready)
        self.relay.want(self.server, read * down.may_read | write * up.blocked, self._server_ready)

    def abort(self) -> None:
        """Reset both sides."""
        if not self.closed:
            unsent = self.unsent_bytes()
            self.relay.bytes_down -= unsent
            self.tally.down(-unsent)
            for sock in (self.client, self.server):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self._close()

    def unsent_bytes(self) -> int:
        """What the kernel holds of what we wrote to the client."""
        return int(struct.unpack("i", fcntl.ioctl(self.client, termios.TIOCOUTQ, bytes(4)))[0])

    def moved(self, direction: Direction, size: int) -> None:
        if direction is self._down:
            self.relay.bytes_down += size
            self.tally.down(size)
        else:
            self.relay.bytes_up += size

    def came(self, direction: Direction, data: bytes) -> None:
        if direction is self._up:
            self.tally.up(data)

    def _client_ready(self, events: int) -> None:
        self._ready(events, self._up, self._down)

    def _server_ready(self, events: int) -> None:
        self._ready(events, self._down, self._up)

    def _ready(self, events: int, outward: Direction, inward: Direction) -> None:
        if events & selectors.EVENT_WRITE:
            inward.flush()
        if events & selectors.EVENT_READ and not self.closed:
            outward.read()
        self.attend()

    def _close(self) -> None:
        self.closed = True
        for sock in (self.client, self.server):
            self.relay.want(sock, 0, self._client_ready)
            sock.close()
        self.relay.ended(self)


class Direction:
    """One way of a connection: read, delay, write, and the window of what is not acknowledged yet."""

    def __init__(self, connection: Connection, source: socket.socket, sink: socket.socket) -> None:
        self._connection = connection
        self._relay = connection.relay
        self._source, self._sink = source, sink
        self._window_bytes = self._relay.first_window_bytes
        self._under_way_bytes = 0
        self._last_read = time.monotonic() + self._relay.rtt_s
        self._due: deque[memoryview] = deque()  # delivered as far as we are concerned, not yet written
        self._source_ended = self._sink_ends = False
        self.done = False

    @property
    def may_read(self) -> bool:
        return not self._source_ended and self._under_way_bytes < self._window_bytes

    @property
    def blocked(self) -> bool:
        return bool(self._due)

    def read(self) -> None:
        now = time.monotonic()
        if not self._under_way_bytes:
            self._shrink_after(now - self._last_read)
        try:
            data = self._source.recv(min(READ_BYTES, self._window_bytes - self._under_way_bytes))
        except BlockingIOError:
            return
        except OSError:
            self._source_ended = True
            self._relay.at(now + self._relay.rtt_s / 2, self._connection.abort)
            return
        self._last_read = now
        self._connection.came(self, data)
        self._source_ended = not data
        self._under_way_bytes += len(data)
        self._relay.at(now + self._relay.rtt_s / 2, lambda: self._arrive(data))

    def flush(self) -> None:
        """Write what has arrived as far as the sink takes it."""
        try:
            while self._due:
                size = self._sink.send(self._due[0])
                self._connection.moved(self, size)
                acknowledged = time.monotonic() + self._relay.rtt_s / 2
                self._relay.at(acknowledged, lambda size=size: self._acknowledge(size))  # type: ignore[misc]
                if size == len(self._due[0]):
                    self._due.popleft()
                else:
                    self._due[0] = self._due[0][size:]
            if self._sink_ends and not self.done:
                self.done = True
                self._sink.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:
            self._connection.abort()

    def _arrive(self, data: bytes) -> None:
        if not self._connection.closed:
            if data:
                self._due.append(memoryview(data))
            else:
                self._sink_ends = True
            self.flush()
            self._connection.attend()

    def _acknowledge(self, size: int) -> None:
        self._under_way_bytes -= size
        self._window_bytes = min(self._relay.open_window_bytes, self._window_bytes + size)
        self._connection.attend()

    def _shrink_after(self, idle_s: float) -> None:
        halvings = min(32, max(0, int(idle_s / (TIMEOUT_S + self._relay.rtt_s))))
        self._window_bytes = max(self._relay.first_window_bytes, self._window_bytes >> halvings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--upstream", required=True, metavar="ADDRESS:PORT")
    parser.add_argument("--bits-s", type=int, required=True, help="rate of each direction")
    parser.add_argument("--rtt-s", type=float, required=True, help="round trip")
    parser.add_argument("--device", required=True, help="name of the network device to make")
    parser.add_argument("--slow-start", action="store_true", help="connections begin with ten segments")
    asked = parser.parse_args()
    address, port = asked.upstream.rsplit(":", 1)
    laid = wire.free_wire(asked.device, asked.bits_s)
    # Round trips of 1 ms: not 50 us late for nothing.
    wire.prctl(PR_SET_TIMERSLACK, 1)
    with wire.listen_behind(laid, int(port)) as listener:
        relay = Relay(listener, (address, int(port)), asked.rtt_s, asked.bits_s)
        if asked.slow_start:
            relay.first_window_bytes = min(FIRST_WINDOW_BYTES, relay.open_window_bytes)
        print(json.dumps({"host": f"{laid.inner}:{port}"}), flush=True)
        relay.run()


if __name__ == "__main__":
    main()
