"""How long a read of a layer may take that several images share."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from lazyfs.core.deadlines import answer_s
from lazyfs.errors import RemoteError
from tests.serving.rig import hang, rig


async def test_the_shortest_promise_of_the_open_images_holds(autojump_clock: trio.testing.MockClock) -> None:
    async with rig("plain", *[hang] * 50, timeout_s=60) as it:
        address, size_bytes = it.blocks(0)

        async def failed_after_s() -> float:
            begun_s = trio.current_time()
            with pytest.raises(RemoteError, match="did not arrive"):
                await it.device.read(address, size_bytes)
            return trio.current_time() - begun_s

        assert await failed_after_s() == pytest.approx(answer_s(60))
        it.device.promise("hurried", 5)
        assert await failed_after_s() == pytest.approx(answer_s(5))
        it.device.promise("patient", 600)  # whoever opens last does not decide
        assert it.device.timeout_s == 5
        it.device.promise("hurried", 50)  # another mount of that image: the first one's promise holds, too
        assert await failed_after_s() == pytest.approx(answer_s(5))
        it.device.release("hurried")
        assert await failed_after_s() == pytest.approx(answer_s(60))
        it.device.release("image")
        assert it.device.timeout_s == 600


async def test_a_request_outlives_the_reads_of_a_hurried_image() -> None:
    """The next read finds it under way, or what it brought."""

    go_on = trio.Event()

    async def slow(answer: bytes) -> bytes:
        await go_on.wait()
        return answer

    async with rig("plain", slow, timeout_s=60) as it:
        it.device.promise("hurried", 0.1)
        for _ in range(3):
            with pytest.raises(RemoteError, match="did not arrive"):
                await it.device.read(*it.blocks(0))
        go_on.set()
        await it.landed()
        await it.read(*it.blocks(0))
        assert len(it.source.ranges) == 1
