"""What becomes of a failed HTTP request: whose fault it is, and whether and when to try again."""

from __future__ import annotations

import random
import socket
import ssl
from dataclasses import dataclass

import httpx

MAX_CAUSES = 20


class Failed(Exception):
    """One attempt failed."""

    def __init__(
        self,
        problem: str,
        hint: str,
        *,
        temporary: bool,
        status: int | None = None,
        wait_s: float | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint
        self.temporary = temporary
        self.status = status
        self.wait_s = wait_s


def explain(error: Exception) -> Failed:
    """What a failure below HTTP means for the user. The texts of httpx are not used: they may hold URLs."""
    causes: list[BaseException] = [error]
    for cause in causes:  # grows while it is walked
        if isinstance(cause, BaseExceptionGroup):  # trio's, one exception per address of the host
            causes += cause.exceptions
        elif (below := cause.__cause__ or cause.__context__) is not None and len(causes) < MAX_CAUSES:
            causes.append(below)
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Failed(
                f"its certificate is not trusted: {cause.verify_message}",
                "give its CA with the option ca, or put it into /etc/docker/certs.d/HOST/ca.crt",
                temporary=False,
            )
        if isinstance(cause, ssl.SSLError):
            return Failed(f"TLS failed: {cause.reason}", "does this port speak https?", temporary=False)
        if isinstance(cause, socket.gaierror):
            again = cause.errno == socket.EAI_AGAIN
            return Failed("no such host", "check the name and this host's DNS", temporary=again)
        if isinstance(cause, ConnectionRefusedError):
            return Failed("connection refused", "is the server running, and the port right?", temporary=True)
    hint = "the network or the server is in trouble; try again later"
    if isinstance(error, httpx.TimeoutException):
        return Failed("no answer in time", hint, temporary=True)
    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return Failed("not a valid request", "report this to the server's operator", temporary=False)
    if isinstance(error, httpx.ProxyError):
        return Failed("the proxy failed", "check https_proxy and no_proxy", temporary=True)
    if isinstance(error, httpx.ConnectError):
        return Failed("cannot connect", hint, temporary=True)
    return Failed(f"the connection broke ({type(error).__name__})", hint, temporary=True)


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with full jitter: attempt n waits a random time up to min(cap, base * 2^n)."""

    attempts: int = 5
    base_s: float = 0.2
    cap_s: float = 5.0

    def delay_s(self, attempt: int) -> float:
        """How long to wait after failed attempt number `attempt` (from 1), in seconds."""
        return random.uniform(0, min(self.cap_s, self.base_s * 2**attempt))
