"""The figure of `lazyfs analyze --plot`: data by layer depth."""

from __future__ import annotations

import os
from typing import Any

from lazyfs.commands.report import human_bytes
from lazyfs.core.index.analysis import ImageAnalysis
from lazyfs.errors import HostError, UserError

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
except ImportError:
    raise HostError("--plot needs matplotlib", "pip install matplotlib") from None


def plot(path: str, image: str, analysis: ImageAnalysis, start: dict[str, Any] | None) -> None:
    """A bar for each layer, the bottom one lowest: what is visible, what later layers replaced, and how much of it
    the cache has; what a start reads is a line across. Raises UserError: the file cannot be written."""
    layers = analysis.layers
    unit = 1e6
    places = range(len(layers))
    visible = [layer.visible_bytes / unit for layer in layers]
    hidden = [max(0, layer.data_bytes - layer.visible_bytes) / unit for layer in layers]
    cached = [layer.cached_bytes / unit for layer in layers]
    figure, axes = pyplot.subplots(figsize=(8, 1.8 + 0.4 * len(layers)))
    axes.barh(places, visible, color="tab:blue", label="visible in the root")
    axes.barh(places, hidden, left=visible, color="lightgrey", label="replaced or removed by later layers")
    axes.barh(places, cached, height=0.25, color="tab:orange", label="in the cache")
    axes.set_yticks(places, [f"{layer.depth}  {layer.blob_digest[7:19]}" for layer in layers])
    axes.set_xlabel("data, MB unpacked")
    axes.set_ylabel("layer, the bottom one first")
    title = image
    if start is not None:
        axes.axvline(start["read_bytes"] / unit, color="black", linestyle="--", label="read by a start, in all")
        title += f"\na start reads {human_bytes(start['read_bytes'])} and fetches {human_bytes(start['fetched_bytes'])}"
    axes.set_title(title, fontsize=9)
    axes.legend(loc="best", fontsize=8)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:  # ValueError: no such format
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise UserError(f"cannot draw to {path}: {reason}", "name a file that ends in .png, .svg or .pdf") from None
    finally:
        pyplot.close(figure)
