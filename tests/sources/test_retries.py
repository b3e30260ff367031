"""A server that never gives in is asked no more often than core/retries.py says."""

from __future__ import annotations

import pytest

from lazyfs.core.oci.digests import sha256_digest
from lazyfs.core.retries import MAX_REDIRECTS, MAX_RESOLVES, REQUEST_ATTEMPTS, requests_for_range
from lazyfs.errors import LazyfsError
from tests.faultproxy import FaultProxy, Rule
from tests.servers import RegistryServer
from tests.sources.repositories import BLOB, open_registry

BLOBS = "/blobs/"
MOST = {
    "status": REQUEST_ATTEMPTS,
    "reset": REQUEST_ATTEMPTS,
    "truncate": REQUEST_ATTEMPTS,
    "forbidden": MAX_RESOLVES,
    "loop": MAX_REDIRECTS + 1,
}


@pytest.mark.parametrize("fault", MOST)
async def test_a_range_costs_what_the_arithmetic_says(fault: str, registry: RegistryServer) -> None:
    with FaultProxy(registry) as proxy:
        rules = {
            "status": Rule("status"),
            "reset": Rule("reset"),
            "truncate": Rule("truncate", after_bytes=10),
            "forbidden": Rule("status", status=403),
            "loop": Rule("redirect", location=proxy.url),
        }
        async with open_registry(proxy.host, "retries") as source:
            digest = await source.push_blob(BLOB)
            assert digest == sha256_digest(BLOB)
            rule = rules[fault]
            rule.path, rule.times = BLOBS, None
            proxy.clear()
            proxy.rules = [rule]
            with pytest.raises(LazyfsError):
                await source.blob_range(digest, 0, 1000)
            assert rule.hits <= MOST[fault] <= requests_for_range()
