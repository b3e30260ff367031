"""The figures of `lazyfs analyze --plot` (data by layer depth) and `lazyfs profile show --plot` (touches by time)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lazyfs.commands.report import human_bytes
from lazyfs.core.index.analysis import ImageAnalysis
from lazyfs.core.starts.profile import Profile
from lazyfs.errors import HostError, UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    _save(figure, path)


def plot_profile(path: str, image: str, profile: Profile, labels: Sequence[str]) -> None:
    """What was touched over time: a point for each block, in its layer's colour, where the curve of all bytes so far
    is. `labels`: of the layers. Raises UserError: the file cannot be written."""
    figure, axes = pyplot.subplots(figsize=(8, 5))
    points: list[tuple[list[float], list[float]]] = [([], []) for _ in labels]
    total_bytes = 0
    for touch in sorted(profile.touches, key=lambda touch: touch.at_ms):
        total_bytes += touch.length_bytes
        points[touch.layer][0].append(touch.at_ms / 1000)
        points[touch.layer][1].append(total_bytes / 1e6)
    colours = pyplot.get_cmap("tab20")
    for number, (label, (times_s, sizes)) in enumerate(zip(labels, points, strict=True)):
        axes.plot(times_s, sizes, ".", color=colours(number % 20), markersize=4, label=f"layer {label}")
    axes.set_xlabel("seconds since the first touch")
    axes.set_ylabel("touched so far, MB unpacked")
    axes.set_title(
        f"{image}\n{len(profile.touches):,} blocks, {human_bytes(total_bytes)}, starts: {profile.starts}", fontsize=9
    )
    axes.legend(loc="best", fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: str) -> None:
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:  # ValueError: no such format
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise UserError(f"cannot draw to {path}: {reason}", "name a file that ends in .png, .svg or .pdf") from None
    finally:
        pyplot.close(figure)
