"""Fetches what a profile names and the cache lacks, for a program that serves nothing."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.core.starts.profile import Profile
from lazyfs.errors import HostError, RemoteError
from lazyfs.images.documents import Missing
from lazyfs.images.resolve import Resolved
from lazyfs.serving.image import Image
from lazyfs.serving.schedule import Rank
from lazyfs.serving.store import ImageStore
from lazyfs.tasks import open_nursery

_BLOCK_S = 60.0  # the longest that nothing comes of what is waited for


async def bring(cache: CacheDirectory, resolved: Resolved, profile: Profile, most_bytes: int) -> int:
    """Fetches the blocks that are absent, in the order of need; returns how many there were.

    `most_bytes`: what lies behind so many bytes of contents is left out. The image's index has to be in the cache.
    Blocks of layers that the image does not have are passed over. Raises LazyfsError.
    """
    wanted = _absent(cache, profile, most_bytes)
    if not wanted:
        return 0
    async with open_nursery() as nursery:
        store = ImageStore(cache, nursery)
        access = resolved.access._replace(learn="off")  # it is no start
        image = await store.open(
            str(resolved.reference), access, _BLOCK_S, make_index=False, known=resolved.manifest_digest
        )
        try:
            if isinstance(image, Missing):
                raise HostError("the index of the image is not in the cache any more", "try again")
            await _fetch(image, wanted)
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                if not isinstance(image, Missing):
                    await store.close(image)
                await store.aclose()
    return len(wanted)


def _absent(cache: CacheDirectory, profile: Profile, most_bytes: int) -> list[tuple[ContentRoot, int]]:
    tables = {root: cache.peek(root) for root in profile.layers}
    wanted = []
    for touch in profile.touches:
        root = profile.layers[touch.layer]
        entry = tables[root]
        if entry is None or touch.block >= entry[0].count:
            continue
        table, marks = entry
        most_bytes -= table.lengths[touch.block]
        if most_bytes < 0:
            break
        if not marks[touch.block]:
            wanted.append((root, touch.block))
    return wanted


async def _fetch(image: Image, wanted: Sequence[tuple[ContentRoot, int]]) -> None:
    fetchers = {device.content_root: device.fetcher for device in image.layers}
    for root, fetcher in fetchers.items():
        fetcher.foresee(block for layer, block in wanted if layer == root)
    try:
        for root, block in wanted:
            if root in fetchers:
                with trio.fail_after(_BLOCK_S):
                    await fetchers[root].ensure(range(block, block + 1), Rank.PACK)
    except trio.TooSlowError:
        message = f"nothing came for {_BLOCK_S:g} s of what earlier starts needed"
        raise RemoteError(message, "see how the registry is doing") from None
