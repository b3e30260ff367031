"""Makes the index that an image lacks, as the only job of a process; with progress bars, if the caller has some."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager

import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.core.oci.documents import parse_config
from lazyfs.errors import LazyfsError, RemoteError
from lazyfs.images.config import load_config
from lazyfs.images.resolve import Resolved, resolve
from lazyfs.indexing.assemble import BuiltIndex
from lazyfs.indexing.build import LayerProgress, OnLayers
from lazyfs.indexing.publish import index_push
from lazyfs.indexing.small import make_index
from lazyfs.sources.access import Access

# Finding an image's documents takes a few small requests. Reading its layers has no such bound, only one for stalls.
DOCUMENTS_S = 120.0

# Shown while layers are read. It is entered once, and yields a function that is called with each layer's progress.
Bars = Callable[[], AbstractContextManager[Callable[[LayerProgress], None]]]


def build_missing_index(
    image: str, cache_path: str, access: Access, push: bool, bars: Bars | None = None, known: str | None = None
) -> None:
    """The pass of a first mount without an index: reads all layers once, fills the cache, keeps the index.

    `push`: it is attached in the first index repository of `access`, or else to the image. `known`: the manifest's
    digest, if the caller knows it; one that is in the cache is not asked for again.
    """
    cache = CacheDirectory(cache_path)

    async def work() -> None:
        async with resolved_image(cache, image, access, known) as resolved:
            if not push:
                await build(cache, resolved, fill=True, bars=bars)
                return
            async with index_push(cache, resolved, *access.index_repositories[:1]) as attaching:
                built = await build(cache, resolved, fill=True, bars=bars, on_layers=attaching.begin)
                await attaching.finish(built)

    run_async(work)


@contextlib.asynccontextmanager
async def resolved_image(
    cache: CacheDirectory, image: str, access: Access, known: str | None = None
) -> AsyncIterator[Resolved]:
    """The resolved image; its source is closed at the end."""
    with trio.fail_after(DOCUMENTS_S):
        resolved = await resolve(cache, image, access, known)
    try:
        yield resolved
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
            await resolved.source.aclose()


async def build(
    cache: CacheDirectory,
    resolved: Resolved,
    *,
    fill: bool,
    bars: Bars | None = None,
    on_layers: OnLayers | None = None,
) -> BuiltIndex:
    """Reads all layers once and keeps the index; with `fill`, all data, too. Raises LazyfsError. `on_layers` as of
    build_index."""
    with trio.fail_after(DOCUMENTS_S):
        config = parse_config(await load_config(cache, resolved))
    with (bars or _no_bars)() as on_progress:
        return await make_index(
            cache, resolved, config, fill=fill, on_progress=on_progress, on_layers=on_layers
        )


@contextlib.contextmanager
def _no_bars() -> Iterator[Callable[[LayerProgress], None]]:
    yield lambda progress: None


def run_async(work: Callable[[], Awaitable[None]]) -> None:
    """Runs one async job. Takes an expected error out of the nurseries' exception groups."""
    try:
        trio.run(work)
    except trio.TooSlowError:
        raise RemoteError(
            f"the registry did not answer within {DOCUMENTS_S:g} s", "try again later"
        ) from None
    except BaseExceptionGroup as group:
        known = group.subgroup(LazyfsError)
        if known is None:
            raise
        error: BaseException = known
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
