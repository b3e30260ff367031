"""Colours and axes that all figures share. Modes: Okabe and Ito's colours; categories: Paul Tol's "muted"."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

GREY = "#666666"
MODE_COLOURS = {
    "ctr": "#D55E00",
    "overlayfs": "#D55E00",  # what ctr runs on
    "umoci": "#E69F00",
    "lazyfs": "#0072B2",
    "lazyfs-noindex": "#56B4E9",
    "lazyfs-shared": "#009E73",
    "lazyfs-pack": "#CC79A7",
    "lazyfs-profile": "#F0E442",
    "lazyfs-before": "#999999",
}
CATEGORY_COLOURS = {
    "distro": "#332288",
    "database": "#CC6677",
    "language": "#117733",
    "web-server": "#88CCEE",
    "web-framework": "#AA4499",
    "other": "#999933",
}
CATEGORY_MARKERS = {
    "distro": "o",
    "database": "s",
    "language": "^",
    "web-server": "D",
    "web-framework": "v",
    "other": "P",
}
# Fast to slow: all are of one mode, so the links differ by line, not by hue.
LINK_STYLES = {"loopback": ":", "lan": "-.", "wan": "--", "home": "-"}


@contextlib.contextmanager
def drawing() -> Iterator[Any]:
    """matplotlib without a display, imported here because it takes a second; pyplot, and no figure left open."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    try:
        with pyplot.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
            yield pyplot
    finally:
        pyplot.close("all")


def plain_log(axes: Any, which: str) -> None:
    """Logarithmic axes with ticks such as 0.2, 1 and 50 in place of powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name in ("x", "y") if which == "both" else (which,):
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        low, high = sorted(getattr(axes, f"get_{name}lim")())
        # Few powers of ten: also the 2 and the 5 of each.
        axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0) if high / low < 200 else (1.0,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
