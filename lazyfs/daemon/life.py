"""How a worker ends."""

from __future__ import annotations

import signal

import trio

from lazyfs.daemon.handover import EXIT_ENDED, EXIT_SUCCESSOR


class Life:
    """Set by requests, signals and idleness; worker.py sees to it that the process ends."""

    def __init__(self) -> None:
        self.ending = trio.Event()
        self.status = EXIT_ENDED  # of the process; meaningful once `ending` is set
        self.interrupted = trio.Event()  # a signal came, perhaps after everything was let go

    def end(self, status: int) -> None:
        """The worker shall end with this exit status. The first call counts."""
        if not self.ending.is_set():
            self.status = status
            self.ending.set()

    async def until_signalled(self) -> None:
        """SIGTERM: make way for a successor. Until cancelled."""
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                self.interrupted.set()
                self.end(EXIT_SUCCESSOR)
