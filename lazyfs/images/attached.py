"""What is attached to an image, in its own repository and in index repositories. Each is asked once, for indexes and
packs together, whoever looks for them."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.core.index import imageindex, v1
from lazyfs.core.oci.digests import Digest
from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.oci.reference import Reference
from lazyfs.core.starts.pack import PACK_ARTIFACT_TYPE
from lazyfs.errors import ImageError, NotFound, RemoteError
from lazyfs.images.elsewhere import IndexRepository
from lazyfs.images.resolve import Resolved, close_source
from lazyfs.sources.source import Source
from lazyfs.tasks import together

ARTIFACT_TYPES = (imageindex.ARTIFACT_TYPE, v1.ARTIFACT_TYPE, PACK_ARTIFACT_TYPE)


class Attached:
    """Of one image. Several tasks may ask at once. Close it when nothing that was found through it is used any more."""

    def __init__(self, cache: CacheDirectory, resolved: Resolved) -> None:
        self.cache = cache
        self.resolved = resolved
        templates = resolved.access.index_repositories
        self.repositories = [IndexRepository(cache, resolved, template, ARTIFACT_TYPES) for template in templates]
        self._opened: list[Source] = []
        self._own: list[Descriptor] | None = None
        self._asking = trio.Lock()

    async def own(self) -> Sequence[Descriptor]:
        """What the image's own repository has; nothing if that does not say (some forbid the question). RemoteError: it
        cannot say just now."""
        async with self._asking:
            if self._own is None:
                self._own = await _referrers(self.resolved.source, self.resolved.manifest_digest)
            return self._own

    async def ask_repositories(self) -> None:
        """Asks all index repositories that were not asked, at once."""
        await together(*(one.answer for one in self.repositories))

    def open(self, repository: Reference) -> Source:
        """A source beside the image's own, which is closed with this."""
        source = self.resolved.open_beside(repository)
        self._opened.append(source)
        return source

    async def aclose(self, keep: Source | None = None) -> None:
        """Closes the sources of index repositories, but for `keep`. Idempotent."""
        for source in (*(one.source for one in self.repositories), *self._opened):
            if source is not None and source is not keep:
                await close_source(source)


async def _referrers(source: Source, manifest_digest: Digest) -> list[Descriptor]:
    try:
        return await source.referrers(manifest_digest, *ARTIFACT_TYPES)
    except RemoteError as error:
        if error.temporary:
            raise
    except (ImageError, NotFound):
        pass
    return []


def of_type(artifacts: Sequence[Descriptor], artifact_type: str) -> list[Descriptor]:
    """Those of one type."""
    return [one for one in artifacts if one.artifact_type == artifact_type]
