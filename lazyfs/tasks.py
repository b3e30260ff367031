"""Tasks that succeed or fail together, and then with one error instead of a group; slots by key."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from typing import TypeVar

import trio

from lazyfs.errors import LazyfsError

_T = TypeVar("_T")
_MAX_IDLE_KEYS = 256  # a daemon asks a handful of hosts


class Slots:
    """A semaphore of `number` for each key. Unused ones are dropped when there are many."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._semaphores: dict[Hashable, trio.Semaphore] = {}

    def of(self, key: Hashable) -> trio.Semaphore:
        """The semaphore of `key`. Enter it before the next checkpoint, or it may be dropped."""
        if len(self._semaphores) >= _MAX_IDLE_KEYS:
            used = {one: slots for one, slots in self._semaphores.items() if slots.value < self._number}
            self._semaphores = used
        return self._semaphores.setdefault(key, trio.Semaphore(self._number))


@contextlib.asynccontextmanager
async def open_nursery() -> AsyncIterator[trio.Nursery]:
    """As trio's, but the first failure is raised itself."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        raise _first(group) from None


async def together(*tasks: Callable[[], Awaitable[object]], at_most: int | None = None) -> None:
    """Runs all `tasks` at once (or `at_most` at a time). The first failure cancels the others and is raised by itself,
    not in a group.
    """
    limiter = trio.CapacityLimiter(at_most) if at_most is not None else None

    async def run(task: Callable[[], Awaitable[object]]) -> None:
        if limiter is None:
            await task()
        else:
            async with limiter:
                await task()

    try:
        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(run, task)
    except BaseExceptionGroup as group:
        raise _first(group) from None


async def beside(work: Callable[[], Awaitable[_T]], *, background: Callable[[], Awaitable[object]]) -> _T:
    """The result of `work`. `background` runs meanwhile and is cancelled in the end. A failure of either is raised by
    itself, not in a group.
    """
    results: list[_T] = []
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(background)
            results.append(await work())
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise _first(group) from None
    return results[0]


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """A leaf of the group: one of our own errors if there is one, else any error rather than a cancellation."""
    known, _ = group.split(LazyfsError)
    _, real = group.split(trio.Cancelled)
    error: BaseException = known or real or group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
