"""Which blocks the starts of an image touch, and when: a profile, as the cache keeps it and a pack carries it.

A *start* is a container from nothing to useful. Its profile has each block once, in the order in which starts need it.
It names a block by the layer's content root and the number in that layer's table. So that it is of use for another
version of the image, it also has the beginning of the block's sha256, and the file with the block's number in it.

The bytes (docs/FORMATS.md, "Profile"), little-endian:

    0   8s  magic "LZFSPRF1"
    8   I   number of layers
    12  I   stored length of the frame
    16  I   plain length of the frame
    20  I   reserved, 0
    24      content roots of the layers, 32 bytes each
            frame (zstd): numbers of starts, touches and paths, bytes of all paths (I), the columns of the touches,
            lengths of the paths (H), the paths
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lazyfs.core.index.record import MAX_LAYERS
from lazyfs.core.index.sections import compress, decompress
from lazyfs.core.layer.blocks import BLOCK_BYTES, MAX_BLOCKS
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.errors import ImageError

DIGEST_BYTES = 8
# 16 GiB in blocks of full size. A start of science (numpy, pandas, scipy, matplotlib) touches 2,000.
MAX_TOUCHES = 1 << 16
# When more starts are merged, all counts are halved, so that what starts need no more is forgotten.
MAX_STARTS = 64
MAX_PATH_BYTES = 4096  # PATH_MAX
MAX_PATHS_BYTES = 4 << 20  # of all paths; the touches behind that many have none
MAX_AT_MS = (1 << 32) - 1
MAX_PROFILE_BYTES = 8 << 20  # as stored, and plain

_HEAD = struct.Struct("<8s4I")
_MAGIC = b"LZFSPRF1"
_ROOT_BYTES = 32
_COUNTS = struct.Struct("<4I")
_NUMBERS = ("block", "at_ms", "part", "path", "length_bytes")  # the columns of type I, in this order
_TOUCH_BYTES = 4 * len(_NUMBERS) + 2 + 1 + DIGEST_BYTES
_WHAT = "the profile"


class Touch(NamedTuple):
    """One block, as starts touched it."""

    layer: int  # position in Profile.layers
    block: int  # number in that layer's block table
    at_ms: int  # first touch, since the start's first touch of all; the mean over the starts that touched it
    starts: int  # how many of the starts touched it, 1 or more
    digest: bytes  # the first 8 bytes of the block's sha256
    path: bytes  # of a file that has it, without a leading "/"; b"": unknown
    part: int  # number of the block in that file
    length_bytes: int = 0  # of the block; 0: unknown


class Profile(NamedTuple):
    """The blocks that some starts of one image touched."""

    layers: tuple[ContentRoot, ...]
    starts: int  # of how many it tells, 1 to MAX_STARTS
    touches: tuple[Touch, ...]  # in order of need, no block twice

    def without_paths(self) -> Profile:
        """The same without the names of files, which takes less space."""
        return self._replace(touches=tuple(touch._replace(path=b"", part=0) for touch in self.touches))

    def encode(self) -> bytes:
        """The bytes, at most MAX_PROFILE_BYTES; the same profile gives the same ones. ValueError: it is not a profile
        that `decode` takes."""
        numbers: dict[bytes, int] = {b"": 0}
        paths = [numbers.setdefault(touch.path, len(numbers)) for touch in self.touches]
        names = list(numbers)[1:]
        touches = self.touches
        columns = {name: [getattr(touch, name) for touch in touches] for name in _NUMBERS} | {"path": paths}
        try:
            plain = b"".join(
                (
                    _COUNTS.pack(self.starts, len(touches), len(names), sum(map(len, names))),
                    *(array("I", columns[name]).tobytes() for name in _NUMBERS),
                    array("H", [touch.layer for touch in touches]).tobytes(),
                    bytes(touch.starts for touch in touches),
                    *(touch.digest for touch in touches),
                    array("H", map(len, names)).tobytes(),
                    *names,
                )
            )
        except (OverflowError, struct.error) as error:
            raise ValueError(f"a profile has a number out of range: {error}") from None
        stored = compress(plain)
        data = _HEAD.pack(_MAGIC, len(self.layers), len(stored), len(plain), 0)
        data += b"".join(map(bytes.fromhex, self.layers)) + stored
        try:
            if Profile.decode(data) != self:
                raise ValueError("a profile that cannot be read back")
        except ImageError as error:
            raise ValueError(f"a profile out of bounds: {error}") from None
        return data

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Profile:
        """Inverse of `encode`, for bytes from anywhere. ImageError: damaged, or of an unknown version."""
        layers = layers_of(data)
        _, _, stored_bytes, plain_bytes, reserved = _HEAD.unpack_from(data)
        at = _HEAD.size + _ROOT_BYTES * len(layers)
        if reserved or len(data) != at + stored_bytes or max(len(data), plain_bytes) > MAX_PROFILE_BYTES:
            raise ImageError(f"{_WHAT} has the wrong length")
        plain = decompress(memoryview(data)[at:], plain_bytes, _WHAT)
        if len(plain) != plain_bytes or len(plain) < _COUNTS.size:
            raise ImageError(f"{_WHAT} has the wrong length")
        starts, touches = _read_touches(plain, len(layers))
        return cls(layers, starts, touches)


def layers_of(data: bytes | memoryview) -> tuple[ContentRoot, ...]:
    """The layers of an encoded profile, of which the first LAYERS_BYTES are enough. ImageError."""
    if len(data) < _HEAD.size:
        raise ImageError(f"{_WHAT} is cut short")
    magic, count, *_ = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise ImageError(f"{_WHAT} is of no version that this lazyfs knows", "update lazyfs")
    end = _HEAD.size + _ROOT_BYTES * count
    if count > MAX_LAYERS or len(data) < end:
        raise ImageError(f"{_WHAT} is cut short")
    roots = bytes(data[_HEAD.size : end]).hex()
    layers = tuple(ContentRoot(roots[at : at + 64]) for at in range(0, len(roots), 64))
    if len(set(layers)) != count:
        raise ImageError(f"{_WHAT} names a layer twice")
    return layers


LAYERS_BYTES = _HEAD.size + _ROOT_BYTES * MAX_LAYERS


def _read_touches(plain: bytes, layers: int) -> tuple[int, tuple[Touch, ...]]:
    """Number of starts and touches of a frame's content."""
    starts, count, names, names_bytes = _COUNTS.unpack_from(plain)
    if not 1 <= starts <= MAX_STARTS or count > MAX_TOUCHES or names > count or names_bytes > MAX_PATHS_BYTES:
        raise ImageError(f"{_WHAT} declares impossible numbers")
    if len(plain) != _COUNTS.size + _TOUCH_BYTES * count + 2 * names + names_bytes:
        raise ImageError(f"{_WHAT} has the wrong length")
    at = _COUNTS.size
    columns = {}
    for name in _NUMBERS:
        columns[name] = array("I", plain[at : at + 4 * count])
        at += 4 * count
    layer_numbers = array("H", plain[at : at + 2 * count])
    at += 2 * count
    counts = plain[at : at + count]
    at += count
    digests = [plain[place : place + DIGEST_BYTES] for place in range(at, at + DIGEST_BYTES * count, DIGEST_BYTES)]
    at += DIGEST_BYTES * count
    paths = _read_paths(plain, at, names)
    limits = {"block": MAX_BLOCKS - 1, "part": MAX_BLOCKS - 1, "path": names, "length_bytes": BLOCK_BYTES}
    if (
        any(max(columns[name], default=0) > limit for name, limit in limits.items())
        or max(layer_numbers, default=0) >= max(1, layers)
        or (count and not layers)
        or not 1 <= min(counts, default=1) <= max(counts, default=1) <= starts
        or len(set(zip(layer_numbers, columns["block"], strict=True))) != count
    ):
        raise ImageError(f"{_WHAT} has touches that cannot be")
    named = map(paths.__getitem__, columns["path"])
    rows = zip(
        layer_numbers, columns["block"], columns["at_ms"], counts, digests, named, columns["part"],
        columns["length_bytes"], strict=True,
    )  # fmt: skip
    return starts, tuple(map(Touch._make, rows))


def _read_paths(plain: bytes, at: int, names: int) -> list[bytes]:
    """All paths, behind the empty one that stands for none."""
    lengths = array("H", plain[at : at + 2 * names])
    at += 2 * names
    if sum(lengths) != len(plain) - at or not 1 <= min(lengths, default=1) <= max(lengths, default=1) <= MAX_PATH_BYTES:
        raise ImageError(f"{_WHAT} has paths that cannot be")
    paths = [b""]
    for length in lengths:
        paths.append(plain[at : at + length])
        at += length
    if len(set(paths)) != names + 1:
        raise ImageError(f"{_WHAT} has a path twice")
    return paths


# -- several starts ----------------------------------------------------------------------------------------


class _Need:
    """What is known of one block."""

    __slots__ = ("place", "starts", "sum_ms", "touch")

    def __init__(self, touch: Touch, place: int) -> None:
        self.touch = touch
        self.place = place  # the earliest in any profile, to order blocks of one moment
        self.starts = 0
        self.sum_ms = 0


def merge(profiles: Sequence[Profile]) -> Profile:
    """One profile of all the starts that `profiles` tell of, in whatever order they are given.

    The order of need is that of time, but a block that only one in *n* starts touched counts as touched *n* times
    later: of what starts need early all comes early, and of the rest first what most of them need. What is too much
    (MAX_TOUCHES, MAX_PATHS_BYTES) is left out from the end. ValueError: there are no profiles.
    """
    if not profiles:
        raise ValueError("nothing to merge")
    return _joined(profiles, sum(profile.starts for profile in profiles))


def learn(known: Profile | None, start: Profile, *, partial: bool = False) -> Profile:
    """What is known after one more start.

    `partial`: not all that it touched was seen. A start that seems to touch less than half of what most starts touch
    counts as such, too: its pages were in memory, or it was of another command. It adds its blocks, but does not say
    that others are needed more seldom.
    """
    if known is None:
        return merge([start])
    usual = {_key(known, touch) for touch in known.touches if 2 * touch.starts >= known.starts}
    seen = {_key(start, touch) for touch in start.touches}
    if not partial and 2 * len(usual & seen) >= len(usual):
        return merge([known, start])
    old = {_key(known, touch) for touch in known.touches}
    new = [touch._replace(starts=1) for touch in start.touches if _key(start, touch) not in old]
    return _joined([known, start._replace(touches=tuple(new))], known.starts)


def includes(known: Profile, other: Profile) -> bool:
    """Whether `known` tells of all starts that `other` tells of, and of others, as far as can be seen: of more in all,
    and of no fewer of each block. Then it was made of `other`, most likely, and to merge them would count those twice.
    """
    counts = {_key(known, touch): touch.starts for touch in known.touches}
    return known.starts > other.starts and all(
        counts.get(_key(other, touch), 0) >= touch.starts for touch in other.touches
    )


def _key(profile: Profile, touch: Touch) -> tuple[ContentRoot, int]:
    return profile.layers[touch.layer], touch.block


def _joined(profiles: Sequence[Profile], total: int) -> Profile:
    """The touches of all profiles in order, as those of `total` starts."""
    needs: dict[tuple[ContentRoot, int], _Need] = {}
    for profile in profiles:
        for place, touch in enumerate(profile.touches):
            need = needs.setdefault(_key(profile, touch), _Need(touch, place))
            need.starts += touch.starts
            need.sum_ms += touch.at_ms * touch.starts
            need.place = min(need.place, place)
            if (touch.path, touch.length_bytes) > (need.touch.path, need.touch.length_bytes):
                need.touch = touch  # one with a path, and always the same one
    rows = [(key, need, need.sum_ms // need.starts, need.starts) for key, need in needs.items()]
    while total > MAX_STARTS:
        total //= 2
        rows = [(key, need, at_ms, starts // 2) for key, need, at_ms, starts in rows if starts > 1]
    rows.sort(key=lambda row: (row[2] * total / row[3], row[1].place, row[0]))
    return _bounded(total, ((root, need.touch, at_ms, starts) for (root, _), need, at_ms, starts in rows))


def _bounded(total: int, rows: Iterable[tuple[ContentRoot, Touch, int, int]]) -> Profile:
    """Content root, touch, time and number of starts of each block in order -> the profile, within all bounds."""
    layers: dict[ContentRoot, int] = {}
    paths: set[bytes] = set()
    paths_bytes = 0
    touches: list[Touch] = []
    for root, touch, at_ms, starts in rows:
        if len(touches) == MAX_TOUCHES:
            break
        if root not in layers and len(layers) == MAX_LAYERS:
            continue
        path, part = touch.path, touch.part
        if path and path not in paths:
            if len(path) > MAX_PATH_BYTES or paths_bytes + len(path) > MAX_PATHS_BYTES:
                path, part = b"", 0
            else:
                paths.add(path)
                paths_bytes += len(path)
        layer = layers.setdefault(root, len(layers))
        touches.append(Touch(layer, touch.block, at_ms, starts, touch.digest, path, part, touch.length_bytes))
    return Profile(tuple(layers), total, tuple(touches))

