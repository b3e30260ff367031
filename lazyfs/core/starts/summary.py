"""A profile for people: how much of which layer and of which file starts touch, and when."""

from __future__ import annotations

from dataclasses import dataclass

from lazyfs.core.starts.profile import Profile


@dataclass(slots=True)
class TouchedLayer:
    """What is touched of one layer."""

    content_root: str
    blocks: int = 0
    files: int = 0  # those whose names are known
    size_bytes: int = 0  # of the blocks


@dataclass(slots=True)
class TouchedFile:
    """What is touched of one file."""

    path: bytes  # b"": all blocks of the layer whose file is not known
    layer: int  # position in Profile.layers
    blocks: int
    size_bytes: int  # of the blocks
    first_ms: int
    last_ms: int
    starts: int  # how many of the starts touched the block that most of them did


def by_layer(profile: Profile) -> list[TouchedLayer]:
    """In the order of Profile.layers."""
    layers = [TouchedLayer(root) for root in profile.layers]
    for touch in profile.touches:
        layers[touch.layer].blocks += 1
        layers[touch.layer].size_bytes += touch.length_bytes
    for file in by_file(profile):
        layers[file.layer].files += bool(file.path)
    return layers


def by_file(profile: Profile) -> list[TouchedFile]:
    """In the order in which they are needed first."""
    found: dict[tuple[int, bytes], TouchedFile] = {}
    for touch in profile.touches:
        at_ms = touch.at_ms
        file = found.setdefault(
            (touch.layer, touch.path), TouchedFile(touch.path, touch.layer, 0, 0, at_ms, at_ms, 0)
        )
        file.blocks += 1
        file.size_bytes += touch.length_bytes
        file.first_ms, file.last_ms = min(file.first_ms, at_ms), max(file.last_ms, at_ms)
        file.starts = max(file.starts, touch.starts)
    return list(found.values())
