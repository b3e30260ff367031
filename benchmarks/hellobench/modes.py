"""The ways of starting a container that are compared."""

from __future__ import annotations

from benchmarks.hellobench.eager import CtrRunner, UmociRunner
from benchmarks.hellobench.lazy import LazyRunner, SharingLazyRunner, UnindexedLazyRunner
from benchmarks.hellobench.runners import Runner

MODES: dict[str, type[Runner]] = {
    kind.mode: kind for kind in (CtrRunner, UmociRunner, LazyRunner, UnindexedLazyRunner, SharingLazyRunner)
}

DEPLOYMENT, SECOND, DEVELOPMENT = "deployment", "second", "development"
OPERATIONS = (DEPLOYMENT, SECOND, DEVELOPMENT)
# A cache that has another image is another cold start; from then on it is as any.
_ONLY = {SharingLazyRunner.mode: (DEPLOYMENT,), UnindexedLazyRunner.mode: (DEPLOYMENT, DEVELOPMENT)}


def operations_of(mode: str) -> tuple[str, ...]:
    """What is measured of a mode, in this order on one host."""
    return _ONLY.get(mode, OPERATIONS)
