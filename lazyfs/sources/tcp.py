"""One connection to a server: TCP, TLS, and the way through a proxy. No HTTP but a proxy's CONNECT."""

from __future__ import annotations

import ssl

import trio

# Of one recv. Every piece goes through Python, so many small ones cost twice the CPU.
READ_BYTES = 512 << 10
_WRITE_BYTES = 64 << 10  # is sent under one time limit: a slow link may take its time for all
_RECORD_BYTES = 16 << 10  # of TLS, at most


class Link:
    """A connection, used by one task at a time. `idle_since_s`: trio time, while it is kept for later. It is closed by
    `close`, at once and without a farewell."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._tls: list[_Tls] = []  # the outermost first: a proxy may be reached by TLS, too
        self.idle_since_s = 0.0

    @classmethod
    async def open(cls, host: str, port: int) -> Link:
        """Raises OSError. The caller bounds the time of this, and of `start_tls`."""
        return cls(await trio.open_tcp_stream(host, port))

    @property
    def peer(self) -> str:
        """The address of who is at the other end; "" if the connection has ended."""
        try:
            return str(self._stream.socket.getpeername()[0])
        except OSError:
            return ""

    def is_over(self) -> bool:
        """Whether the server has ended it, or said something unasked, while it was idle."""
        return bool(self._stream.socket.is_readable())

    def close(self) -> None:
        """Idempotent."""
        self._stream.socket.close()

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """Raises OSError (ssl.SSLError)."""
        tls = _Tls(context, host)
        while True:
            done = tls.shake_hands()
            await self._send_raw(tls.take(), len(self._tls))
            if done:
                break
            tls.put(await self._receive_raw(len(self._tls)))
        self._tls.append(tls)

    async def send(self, data: bytes, silence_s: float) -> None:
        """All of `data`. Raises OSError, trio.BrokenResourceError; TooSlowError if nothing moves for `silence_s`."""
        view = memoryview(data)
        for start in range(0, len(view), _WRITE_BYTES):
            with trio.fail_after(silence_s):
                await self._send_raw(bytes(view[start : start + _WRITE_BYTES]), len(self._tls))

    async def receive(self, silence_s: float) -> bytes:
        """What comes next, b"" at the end. Raises as `send` does."""
        with trio.fail_after(silence_s):
            return await self._receive_raw(len(self._tls))

    async def _send_raw(self, data: bytes, layers: int) -> None:
        """Through the outermost `layers` of TLS."""
        for tls in reversed(self._tls[:layers]):
            tls.write(data)
            data = tls.take()
        if data:
            await self._stream.send_all(data)

    async def _receive_raw(self, layers: int) -> bytes:
        if not layers:
            return await self._stream.receive_some(READ_BYTES)
        tls = self._tls[layers - 1]
        while True:
            plain = tls.read()
            if answer := tls.take():  # the server asked for new keys
                await self._send_raw(answer, layers - 1)
            if plain is not None:
                return plain
            tls.put(await self._receive_raw(layers - 1))


class _Tls:
    """TLS over a stream that others move: trio's own gives out 16 KiB at a time, which is slow."""

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)

    def shake_hands(self) -> bool:
        """One step; whether it was the last."""
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def put(self, data: bytes) -> None:
        """What the other side sent, b"" at the end."""
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def take(self) -> bytes:
        """What is to be sent to it."""
        return self._outgoing.read()

    def write(self, data: bytes) -> None:
        while data:
            data = data[self._ssl.write(data) :]

    def read(self) -> bytes | None:
        """All that came so far, b"" at the end; None: more has to be put first."""
        pieces = []
        try:
            while piece := self._ssl.read(_RECORD_BYTES):
                pieces.append(piece)
        except ssl.SSLWantReadError:
            return b"".join(pieces) if pieces else None
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            pass  # many servers just hang up; HTTP says how long an answer is
        return b"".join(pieces)
