"""What a start touches is in the image's profile when it is over, however it ends."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.profiles import load_profile
from lazyfs.core.layer.blocks import BLOCK_BYTES
from lazyfs.core.starts.profile import Profile
from lazyfs.serving import trace
from lazyfs.serving.device import DataDevice
from lazyfs.serving.image import Image
from lazyfs.serving.store import ImageStore
from lazyfs.sources.access import Access
from tests.layertar import LayerTar
from tests.layout import GZIP, PLAIN, Layout
from tests.serving.rig import hang, rig

FILES = {"bin/sh": 3 * BLOCK_BYTES, "etc/group": 100, "etc/passwd": 5000, "usr/lib/libc.so": 2 * BLOCK_BYTES}


def make_images(directory: Path) -> list[str]:
    """References of two images that share their first layer; the own one's file has the image's name."""
    layout = Layout(directory)
    tar = LayerTar()
    for name, size in FILES.items():
        tar.file(name, os.urandom(size))
    shared = layout.add_layer(tar.data(), GZIP)
    for name in ("one", "other"):
        own = layout.add_layer(LayerTar().file(name, os.urandom(70_000)).data(), PLAIN)
        layout.tag(name, layout.add_image([shared, own]))
    return [f"oci:{directory}:{name}" for name in ("one", "other")]


class Opened:
    """Two open images, and what is known of them."""

    def __init__(self, store: ImageStore, images: list[Image]) -> None:
        self.store = store
        self.one, self.other = images
        (self.shared,) = set(self.one.layers) & set(self.other.layers)

    def profile(self, image: Image) -> Profile | None:
        return load_profile(self.store.cache, image.manifest_digest)

    def touched(self, image: Image) -> list[tuple[bytes, int]]:
        """File and part of each block of the profile."""
        found = self.profile(image)
        return [(one.path, one.part) for one in found.touches] if found is not None else []


def own(image: Image, opened: Opened) -> DataDevice:
    return next(device for device in image.layers if device is not opened.shared)


@contextlib.asynccontextmanager
async def opened(tmp_path: Path) -> AsyncIterator[Opened]:
    async with trio.open_nursery() as nursery:
        store = ImageStore(CacheDirectory(str(tmp_path / "cache")), nursery)
        images = []
        for reference in make_images(tmp_path / "layout"):
            image = await store.open(reference, Access(), 30.0)
            assert isinstance(image, Image)
            images.append(image)
        yield Opened(store, images)
        for image in list(store.images.values()):
            await store.close(image)
        await store.aclose()
        nursery.cancel_scope.cancel()


async def read(device: DataDevice, block: int, *, size_bytes: int = 4096) -> None:
    """One read as the kernel's, of the beginning of a block."""
    address = device.layer.table.addresses[block]
    if device.read_cached(address, size_bytes) is None:
        await device.read(address, size_bytes)


def is_traced(device: DataDevice) -> bool:
    return device.reads is not None


async def test_first_touches_are_kept_in_order_hits_and_misses(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        await read(it.shared, 3)
        it.one.begin_trace()
        for block in (4, 3, 4, 0, 3):
            await read(it.shared, block)
        await read(own(it.one, it), 0)
        assert await it.one.end_trace() == 4
        assert it.touched(it.one) == [(b"etc/passwd", 0), (b"etc/group", 0), (b"bin/sh", 0), (b"one", 0)]
        found = it.profile(it.one)
        assert found is not None and found.starts == 1
        times = [touch.at_ms for touch in found.touches]
        assert times[0] == 0 and times == sorted(times) and {touch.starts for touch in found.touches} == {1}
        table = it.shared.layer.table
        assert [one.digest for one in found.touches[:3]] == [table.digest(block)[:8] for block in (4, 3, 0)]
        assert [one.length_bytes for one in found.touches[:3]] == [5000, 100, BLOCK_BYTES]
        assert it.shared.reads is None
        await read(it.shared, 5)  # nobody is being traced any more
        assert await it.one.end_trace() == 0
        assert it.profile(it.one) == found


async def test_a_recorded_start_is_over_when_somebody_says_so(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    async with opened(tmp_path) as it:
        it.one.begin_trace(recorded=True)
        await read(it.shared, 0)
        mock_clock.autojump_threshold = 0
        await trio.sleep(trace.LONGEST_S + trace.QUIET_S + 1)
        mock_clock.autojump_threshold = math.inf
        await read(it.shared, 4)
        assert await it.one.end_trace() == 2
        found = it.profile(it.one)
        assert found is not None and found.starts == 1

        it.one.begin_trace(recorded=True)
        await read(it.shared, 5)
        it.one.traces.leave(it.one.manifest_digest)  # unmounted: it failed, say
        assert await it.one.end_trace() == 0
        assert it.profile(it.one) == found


async def test_a_read_touches_all_blocks_that_it_overlaps(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        it.one.begin_trace()
        await read(it.shared, 0, size_bytes=BLOCK_BYTES + 1)
        assert await it.one.end_trace() == 2
        assert it.touched(it.one) == [(b"bin/sh", 0), (b"bin/sh", 1)]


async def test_a_touch_of_a_shared_layer_counts_for_each_image_that_is_traced(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        it.one.begin_trace()
        await read(it.shared, 0)
        it.other.begin_trace()
        await read(it.shared, 3)
        await read(own(it.other, it), 0)
        await it.one.end_trace()
        await read(it.shared, 4)
        await it.other.end_trace()
        assert it.touched(it.one) == [(b"bin/sh", 0), (b"etc/group", 0)]
        assert it.touched(it.other) == [(b"etc/group", 0), (b"other", 0), (b"etc/passwd", 0)]


async def test_ten_containers_at_once_are_one_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        it.one.begin_trace()
        blocks = list(range(it.shared.layer.table.count))

        def container(number: int) -> None:
            for block in blocks[number % len(blocks) :] + blocks[: number % len(blocks)]:
                trio.from_thread.run(read, it.shared, block)

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(trio.to_thread.run_sync, container, number)
        assert await it.one.end_trace() == len(blocks)
        found = it.profile(it.one)
        assert found is not None and found.starts == 1
        assert sorted(touch.block for touch in found.touches) == blocks
        assert {touch.starts for touch in found.touches} == {1}


async def test_no_read_of_many_threads_is_lost(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        count = it.shared.layer.table.count
        await it.shared.fetcher.ensure(range(count))
        it.one.begin_trace()
        addresses = list(it.shared.layer.table.addresses)

        def reader(start: int) -> None:
            for address in addresses[start::4]:
                assert it.shared.read_cached(address, 4096) is not None

        threads = [threading.Thread(target=reader, args=(start,)) for start in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert await it.one.end_trace() == count


async def test_a_start_is_over_when_nothing_new_is_touched(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    async with opened(tmp_path) as it:
        await it.shared.fetcher.ensure(range(1))
        it.one.begin_trace()
        mock_clock.autojump_threshold = 0
        await trio.sleep(10 * trace.LONGEST_S)  # mounted, and not used
        for _ in range(4):
            await read(it.shared, 0)
            await trio.sleep(trace.QUIET_S / 2)  # nothing new: it does not count
        assert it.shared.reads is None
        mock_clock.autojump_threshold = math.inf
        await it.one.end_trace()
        assert it.touched(it.one) == [(b"bin/sh", 0)]


async def test_a_start_that_goes_on_is_over_in_the_end(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    async with opened(tmp_path) as it:
        count = it.shared.layer.table.count
        await it.shared.fetcher.ensure(range(count))
        it.one.begin_trace()
        begun = trio.current_time()
        mock_clock.autojump_threshold = 0
        block = 0
        while it.shared.reads is not None:
            it.store.traces._open[it.one.manifest_digest].first.clear()  # so that each touch is a new one
            await read(it.shared, block % count)
            block += 1
            await trio.sleep(trace.QUIET_S / 4)
        mock_clock.autojump_threshold = math.inf
        assert trace.LONGEST_S <= trio.current_time() - begun <= trace.LONGEST_S + trace.QUIET_S


async def test_it_is_not_quiet_while_a_read_waits(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    async with opened(tmp_path) as it:
        it.one.begin_trace()
        await read(it.shared, 0)
        it.shared.waiting += 1
        mock_clock.autojump_threshold = 0
        await trio.sleep(3 * trace.QUIET_S)
        assert is_traced(it.shared)
        it.shared.waiting -= 1
        await trio.sleep(1.2 * trace.QUIET_S)
        assert not is_traced(it.shared)
        mock_clock.autojump_threshold = math.inf


async def test_reads_count_as_waiting_until_they_end() -> None:
    async with rig("plain", hang, hang) as it:
        async with trio.open_nursery() as nursery:
            for block in (0, 0, 3):
                nursery.start_soon(it.device.read, *it.blocks(block))
            await trio.testing.wait_all_tasks_blocked()
            assert it.device.waiting == 3
            nursery.cancel_scope.cancel()
        assert it.device.waiting == 0


async def test_closing_the_image_ends_the_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        it.one.begin_trace()
        await read(it.shared, 3)
        await it.store.close(it.one)
        assert it.shared.reads is None
        assert await it.one.end_trace() == 0  # it waits for the profile, which is being made
        assert it.touched(it.one) == [(b"etc/group", 0)]


async def test_a_root_that_is_made_again_is_another_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        for _ in range(3):
            it.one.begin_trace()
            await read(it.shared, 3)
        await it.one.end_trace()
        found = it.profile(it.one)
        assert found is not None and found.starts == 3


async def test_layers_that_the_kernel_reads_by_itself_are_not_seen(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        it.one.begin_trace(frozenset(device.content_root for device in it.one.layers))
        await read(it.shared, 0)
        assert await it.one.end_trace() == 0 and it.profile(it.one) is None
        it.one.begin_trace()
        for block in (0, 3):
            await read(it.shared, block)
        await it.one.end_trace()
        it.other.begin_trace()
        it.one.begin_trace(frozenset([it.shared.content_root]))
        await read(it.shared, 4)  # for the other image
        await read(own(it.one, it), 0)
        assert await it.one.end_trace() == 1
        found = it.profile(it.one)
        assert found is not None and found.starts == 1  # what was not seen is not thought to be unneeded
        assert sorted(it.touched(it.one)) == [(b"bin/sh", 0), (b"etc/group", 0), (b"one", 0)]


async def test_the_end_of_the_process_keeps_what_was_seen(tmp_path: Path) -> None:
    async with opened(tmp_path) as it:
        for image in (it.one, it.other):
            image.begin_trace()
        await read(it.shared, 3)
        await it.store.traces.finish(10, partial=True)
        assert it.touched(it.one) == it.touched(it.other) == [(b"etc/group", 0)]
        assert it.shared.reads is None
        it.one.begin_trace()
        for block in (3, 4):
            await read(it.shared, block)
        await it.store.traces.finish(10)
        it.one.begin_trace()
        await read(it.shared, 3)
        await it.store.traces.finish(10, partial=True)  # the start went on without this process
        found = it.profile(it.one)
        assert found is not None and found.starts == 2
        assert [touch.starts for touch in found.touches] == [2, 1]


async def test_the_end_of_the_process_does_not_wait_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mock_clock: trio.testing.MockClock
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(trace, "keep_profile", lambda *_, **__: go_on.wait(10))
    async with opened(tmp_path) as it:
        it.one.begin_trace()
        await read(it.shared, 3)
        begun = trio.current_time()
        mock_clock.autojump_threshold = 0
        await it.store.traces.finish(2.0)
        assert trio.current_time() - begun == 2.0
        mock_clock.autojump_threshold = math.inf
        go_on.set()


async def test_a_cache_that_cannot_be_written_costs_the_profile_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(tmp_path) as it:
        it.one.begin_trace()
        await read(it.shared, 3)
        os.rmdir(os.path.dirname(it.store.cache.profile_path(it.one.manifest_digest)))
        assert await it.one.end_trace() == 1
        assert it.profile(it.one) is None
        [logged] = caplog.messages
        assert "is not kept: cannot open" in logged and it.one.reference in logged


@pytest.mark.parametrize("content", [None, b"", b"x" * 8192])
async def test_without_a_namespace_there_are_no_names(tmp_path: Path, content: bytes | None) -> None:
    async with opened(tmp_path) as it:
        it.one.begin_trace()
        await read(it.shared, 3)
        os.unlink(it.one.namespace_path)
        if content is not None:
            await trio.Path(it.one.namespace_path).write_bytes(content)
        assert await it.one.end_trace() == 1
        assert it.touched(it.one) == [(b"", 0)]


async def test_memory_is_bounded(tmp_path: Path) -> None:
    """Nobody looks at the reads: as when the trio thread is busy for long."""
    async with opened(tmp_path) as it:
        await it.shared.fetcher.ensure(range(1))
        it.one.begin_trace()
        tracemalloc.start()
        try:
            for _ in range(60_000):
                it.shared.read_cached(0, 4096)
            used, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert it.shared.reads is not None and len(it.shared.reads) == trace._MAX_READS
        assert used < 2_500_000
        assert await it.one.end_trace() == 1
