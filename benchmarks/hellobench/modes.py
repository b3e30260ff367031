"""The ways of starting a container that are compared."""

from __future__ import annotations

from benchmarks.hellobench.eager import CtrRunner, UmociRunner
from benchmarks.hellobench.lazy import (
    FormerLazyRunner,
    LazyRunner,
    PackedLazyRunner,
    ProfiledLazyRunner,
    SharingLazyRunner,
    UnindexedLazyRunner,
)
from benchmarks.hellobench.runners import Runner

MODES: dict[str, type[Runner]] = {
    kind.mode: kind
    for kind in (
        CtrRunner,
        UmociRunner,
        LazyRunner,
        UnindexedLazyRunner,
        SharingLazyRunner,
        PackedLazyRunner,
        ProfiledLazyRunner,
        FormerLazyRunner,
    )
}
BEFORE = FormerLazyRunner.mode  # needs another checkout

DEPLOYMENT, SECOND, DEVELOPMENT = "deployment", "second", "development"
OPERATIONS = (DEPLOYMENT, SECOND, DEVELOPMENT)
# A cache that has another image or a profile is another cold start; from then on it is as any. What is pushed in a
# development has no pack.
_ONLY = {
    SharingLazyRunner.mode: (DEPLOYMENT,),
    ProfiledLazyRunner.mode: (DEPLOYMENT,),
    FormerLazyRunner.mode: (DEPLOYMENT,),
    PackedLazyRunner.mode: (DEPLOYMENT, SECOND),
    UnindexedLazyRunner.mode: (DEPLOYMENT, DEVELOPMENT),
}


def operations_of(mode: str) -> tuple[str, ...]:
    """What is measured of a mode, in this order on one host."""
    return _ONLY.get(mode, OPERATIONS)
