"""How a worker ends."""

from __future__ import annotations

import signal

import trio

from lazyfs.daemon.handover import EXIT_ENDED, EXIT_SUCCESSOR


class Life:
    """Requests, signals and idleness set it; worker.py then ends the process."""

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
        """Waits for SIGTERM, which asks to make way for a successor. Runs until cancelled."""
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                self.interrupted.set()
                self.end(EXIT_SUCCESSOR)
