"""Index repositories, asked about one image beside the image's own repository. None of them can fail a mount."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.images import forget_lacking, is_lacking, note_lacking
from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.oci.indexrepository import index_repository, place_of
from lazyfs.core.oci.reference import DirectoryReference
from lazyfs.errors import LazyfsError
from lazyfs.images.resolve import Resolved
from lazyfs.sources.source import Source

# The longest a mount waits for the answer of an index repository, which is asked while the image's own is. With a login
# it takes about ten round trips.
ANSWER_S = 2.0
# What it has must come within ANSWER_S once more, and the time that its size takes at this rate.
MIN_BYTES_PER_S = 256 << 10
# However large it is, and however many index repositories there are, all that takes so many times the patience of the
# image's source, which is half of `timeout=`: an image has to be open within eight of them.
_PATIENCES = 2


class IndexRepository:
    """One index repository, as `template` says, and what it has of an image. `source` is closed by the caller."""

    def __init__(self, cache: CacheDirectory, resolved: Resolved, template: str, artifact_types: Sequence[str]) -> None:
        self.place = template  # as text, once it was asked without placeholders
        self.source: Source | None = None
        self.problem = ""  # why it has nothing, if that is not simply so; once it was asked
        self._cache = cache
        self._resolved = resolved
        self._template = template
        self._artifact_types = artifact_types
        self._answer_s = _answer_s(resolved)
        self._artifacts: list[Descriptor] | None = None
        self._asking = trio.Lock()
        self._all_until_s = _all_until_s(resolved)

    async def answer(self) -> Sequence[Descriptor]:
        """What it has; it is asked once. Ends within ANSWER_S, and never fails."""
        async with self._asking:
            if self._artifacts is None:
                try:
                    with trio.fail_after(self._answer_s):
                        self._artifacts = await self._ask()
                except trio.TooSlowError:
                    self.problem = f"no answer within {self._answer_s:g} s"
                except LazyfsError as error:
                    self.problem = error.message
                self._artifacts = self._artifacts or []
            return self._artifacts

    async def _ask(self) -> list[Descriptor]:
        reference = index_repository(self._template, self._resolved.reference)
        self.place = place_of(reference)
        digest = self._resolved.manifest_digest
        if is_lacking(self._cache, digest, self.place):
            return []
        if self.source is None:
            self.source = self._resolved.open_beside(reference)
        artifacts = await self.source.referrers(digest, *self._artifact_types)
        # One that stumbled did not say no. A directory is asked for nothing.
        if artifacts:
            forget_lacking(self._cache, digest, self.place)
        elif not self.source.counters.retries and not isinstance(reference, DirectoryReference):
            note_lacking(self._cache, digest, self.place)
        return artifacts

    def delivery(self) -> Delivery:
        """The time for what it has, from now."""
        return Delivery(self._answer_s, self._all_until_s)


class Delivery:
    """A time limit of `first_s` that grows with the bytes that are to come, but not beyond `until_s` (trio time)."""

    def __init__(self, first_s: float, until_s: float) -> None:
        self.scope = trio.CancelScope(deadline=trio.current_time() + first_s)
        self._until_s = until_s

    def expect(self, size_bytes: int) -> None:
        """So many bytes more are on their way."""
        longer_s = self.scope.deadline + size_bytes / MIN_BYTES_PER_S
        self.scope.deadline = max(self.scope.deadline, min(longer_s, self._until_s))


def delivery_for(resolved: Resolved) -> Delivery:
    """The time for the rest of an index that is known already, from now."""
    return Delivery(_answer_s(resolved), _all_until_s(resolved))


def _answer_s(resolved: Resolved) -> float:
    return min(ANSWER_S, resolved.patience_s)


def _all_until_s(resolved: Resolved) -> float:
    return trio.current_time() + _PATIENCES * resolved.patience_s
