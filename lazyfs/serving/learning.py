"""learn=push: what a start touched improves the startup pack that is attached to its image.

After the start, and never in its way. A failure is one line in the log, and the same one is not said again.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.profiles import load_profile
from lazyfs.core.oci.digests import Digest
from lazyfs.core.starts.profile import Profile
from lazyfs.errors import LazyfsError
from lazyfs.images.resolve import close_source, resolve
from lazyfs.sources.access import Access

if TYPE_CHECKING:
    from types import ModuleType

log = logging.getLogger("lazyfs.serving")

# A pack is clearly worse than one with a start in it, if it lacks such a part of what that touched, and so much.
# Two starts of one command differ by 0.2 % at most, by another backend by 20 % (docs/MEASUREMENTS.md).
LACKING_PART = 0.1
LACKING_BYTES = 1 << 20
# To look at what is attached, make a pack and push it; and when the process is about to end.
PUSH_S = 300.0
PUSH_AT_END_S = 60.0


def is_clearly_better(start: Profile, known: Profile | None) -> bool:
    """Whether a pack of `known` starts, if there is one, would be clearly better with `start`."""
    if known is None:
        return True
    attached = {(known.layers[touch.layer], touch.block) for touch in known.touches}
    touched = lacking = 0
    for touch in start.touches:
        touched += touch.length_bytes
        if (start.layers[touch.layer], touch.block) not in attached:
            lacking += touch.length_bytes
    return lacking >= LACKING_BYTES and lacking > LACKING_PART * touched


class Improver:
    """Improves packs by starts. Owned by the trio thread."""

    def __init__(self, cache: CacheDirectory) -> None:
        self._cache = cache
        self._said: set[str] = set()

    async def improve(self, manifest_digest: Digest, reference: str, access: Access, start: Profile) -> None:
        """Attaches a better pack, if one start of an image shows that there is none or that it is clearly worse: in the
        first index repository, or else where the image is. Raises nothing."""
        problem = ""
        try:
            with trio.fail_after(PUSH_S):
                await self._improve(manifest_digest, reference, access, start)
        except LazyfsError as error:
            problem = str(error)
        except trio.TooSlowError:
            problem = f"it took longer than {PUSH_S:g} s"
        except Exception as error:  # it only saves others time
            log.error("a startup pack is not improved", exc_info=error)
        if problem and problem not in self._said:
            self._said.add(problem)
            log.warning("learn=push: the startup pack of %s is not improved: %s", reference, problem)

    async def _improve(self, manifest_digest: Digest, reference: str, access: Access, start: Profile) -> None:
        packs = await trio.to_thread.run_sync(_packs)
        resolved = await resolve(self._cache, reference, access, manifest_digest)
        try:
            place = access.index_repositories[0] if access.index_repositories else ""
            known = await packs.attached_profile(resolved, place)
            if not is_clearly_better(start, known):
                return
            if known is None:  # all that this host knows; later ones are added start by start
                everything = await trio.to_thread.run_sync(_load, self._cache, manifest_digest)
                start = everything or start
            pushed = await packs.improve_pack(self._cache, resolved, start, place)
            log.info("%s has a startup pack of %d starts now, %d bytes", reference, pushed.starts, pushed.size_bytes)
        finally:
            await close_source(resolved.source)


def _load(cache: CacheDirectory, manifest_digest: Digest) -> Profile | None:
    return load_profile(cache, manifest_digest)


def _packs() -> ModuleType:
    """Imported when it is needed, which is seldom, and in a thread: that takes 30 ms."""
    from lazyfs.indexing import packs

    return packs
