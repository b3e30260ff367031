"""Progress of reading an image's layers: one bar a layer on a terminal, a line a layer elsewhere."""

from __future__ import annotations

import sys

from lazyfs.commands.report import human_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import TextIO

    from rich.progress import Progress, TaskID

    from lazyfs.indexing.build import LayerProgress


class LayerBars:
    """A context manager. It yields a function to be called with each layer's progress, any number of times."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._said: set[str] = set()

    def __enter__(self) -> Callable[[LayerProgress], None]:
        if self._stream.isatty():
            # Imported here, because it takes 0.1 s, and scripts do not need it.
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                console=Console(file=self._stream),
            )  # fmt: skip
            self._progress.start()
        return self._update

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _update(self, layer: LayerProgress) -> None:
        """Shows how far a layer is."""
        name = layer.digest.removeprefix("sha256:")[:12]
        if self._progress is not None:
            if layer.digest not in self._tasks:
                self._tasks[layer.digest] = self._progress.add_task(f"layer {name}", total=layer.blob_bytes)
            self._progress.update(self._tasks[layer.digest], completed=layer.done_bytes)
        elif layer.done_bytes >= layer.blob_bytes and layer.digest not in self._said:
            self._said.add(layer.digest)
            print(
                f"lazyfs: layer {name} read ({human_bytes(layer.blob_bytes)})", file=self._stream, flush=True
            )


def layer_bars() -> LayerBars:
    """Bars on standard error."""
    return LayerBars(sys.stderr)
