"""Plays what the cache knows of earlier starts: all blocks that they touched are wanted at once, in the order of need.

Nobody waits for it, nothing fails by it, and it ends by itself. What is wrong in a profile costs bytes, and no more of
them than MOST_BYTES: when a start touches mostly what was not foreseen, the rest is not fetched.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Collection
from typing import NamedTuple

import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.layer import LayerClosed
from lazyfs.cache.profiles import load_profile, profiles_with
from lazyfs.core.erofs.metadata import Metadata
from lazyfs.core.oci.reference import parse_reference, repository_of
from lazyfs.core.starts.matching import Block, Match, find_file, match
from lazyfs.core.starts.recording import FileData
from lazyfs.errors import ImageError
from lazyfs.serving.image import Image

log = logging.getLogger("lazyfs.fetch")

# Of plain data, as much as is fetched at most: for what this image's own starts touched, and for a guess from others.
MOST_BYTES = 1 << 30
MOST_SIMILAR_BYTES = 256 << 20
# So many blocks are wanted in one turn of the trio thread: the most that could be neighbours of the first.
_TURN_BLOCKS = 512
# A start is judged by so many blocks that it touched, and again after so long.
MIN_TOUCHED = 64
LOOK_S = 0.25


class Foresight(NamedTuple):
    """What the next start of an image most likely touches. `own`: as earlier starts of the same image did."""

    own: bool
    match: Match


def foresee(cache: CacheDirectory, image: Image, own: bool = False) -> Foresight | None:
    """What the cache's profiles say of an image; None if nothing. `own` as for play_known(). Reads files: call it in a
    thread."""
    layers = [(device.content_root, device.layer.table) for device in image.layers]
    find = functools.cache(_finder(image))
    profile = load_profile(cache, image.manifest_digest)
    if profile is not None:
        return Foresight(True, match(profile, layers, find, MOST_BYTES))
    if own:
        return None
    repository = repository_of(parse_reference(image.reference))
    similar = profiles_with(cache, [root for root, _ in layers], repository, but=image.manifest_digest)
    if not similar:
        return None
    return Foresight(False, match(similar[0], layers, find, MOST_SIMILAR_BYTES))


def _finder(image: Image) -> Callable[[bytes], FileData | None]:
    """Looks files up in the image's namespace, which is read when the first one is."""

    @functools.cache
    def namespace() -> Metadata:
        with open(image.namespace_path, "rb") as file:
            return Metadata(file.read())

    def find(path: bytes) -> FileData | None:
        try:
            return find_file(namespace(), path)
        except (ImageError, OSError):
            return None

    return find


async def play_known(cache: CacheDirectory, image: Image, *, own: bool = False) -> None:
    """Fetches ahead what earlier starts touched, as long as that is what this start reads. Raises nothing.

    `own`: only what starts of this image touched, not those of similar ones.
    """
    try:
        foresight = await trio.to_thread.run_sync(foresee, cache, image, own, abandon_on_cancel=True)
        if foresight is not None and _absent(image, foresight.match):
            await _play(image, foresight)
    except LayerClosed:
        pass  # the image was closed meanwhile
    except Exception as error:  # it only saves time
        log.error("what is known of starts of %s is of no use", image.reference, exc_info=error)


async def _play(image: Image, foresight: Foresight) -> None:
    found = foresight.match
    log.info(
        "%s: fetching %d blocks ahead, as %s touched them (%d moved, %d changed)",
        image.reference, len(found.blocks), "earlier starts" if foresight.own else "starts of a similar image",
        found.moved, found.changed,
    )  # fmt: skip
    for at in range(0, len(found.blocks), _TURN_BLOCKS):
        for layer, run in itertools.groupby(found.blocks[at : at + _TURN_BLOCKS], key=lambda block: block[0]):
            image.layers[layer].fetcher.foresee(block for _, block in run)
        await trio.lowlevel.checkpoint()
    while _absent(image, found):
        with trio.move_on_after(LOOK_S):
            await image.dispatcher.idle()
            return
        if is_another(found.blocks, image.traces.touched(image.manifest_digest)):
            log.info("%s: this start is another one than was foreseen", image.reference)
            for device in image.layers:
                device.fetcher.forget_foreseen()
            return


def _absent(image: Image, found: Match) -> bool:
    """Whether something of it is still to come."""
    return any(not image.layers[layer].layer.has(block) for layer, block in reversed(found.blocks))


def is_another(foreseen: Collection[Block], touched: Collection[Block]) -> bool:
    """Whether a start that has `touched` these blocks is another one than was foreseen: of those in layers of which
    something was foreseen, most were not."""
    known = set(foreseen)
    layers = {layer for layer, _ in known}
    judged = [block for block in touched if block[0] in layers]
    return len(judged) >= MIN_TOUCHED and 2 * sum(block in known for block in judged) < len(judged)
