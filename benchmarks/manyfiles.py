"""Images of 33,000 small files in three layers, and the same with one file changed in a layer on top."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.image import TAG
from tests.layertar import LayerTar
from tests.layout import GZIP, Layout

FILES_PER_LAYER = 11_000
FILES_PER_DIRECTORY = 50


def layouts(directory: Path) -> tuple[Path, Path]:
    """Makes both below `directory`; returns their layouts, tagged `image.TAG`."""
    source = random.Random(2)  # the same bytes on every machine
    first, changed = Layout(directory / "many"), Layout(directory / "changed")
    layers = [_layer(number, source) for number in range(3)]
    top = LayerTar().file("usr/lib0/d0/f0", b"changed\n").data()
    first.tag(TAG, first.add_image([first.add_layer(layer, GZIP) for layer in layers]))
    changed.tag(TAG, changed.add_image([changed.add_layer(layer, GZIP) for layer in (*layers, top)]))
    return first.path, changed.path


def _layer(number: int, source: random.Random) -> bytes:
    tar = LayerTar()
    if number == 0:
        tar.dir("usr")
    tar.dir(f"usr/lib{number}")
    for file in range(FILES_PER_LAYER):
        directory = f"usr/lib{number}/d{file // FILES_PER_DIRECTORY}"
        if file % FILES_PER_DIRECTORY == 0:
            tar.dir(directory)
        tar.file(f"{directory}/f{file}", source.randbytes(source.randrange(200, 2000)).hex().encode())
    return tar.data()
