"""The block cache: what it gives is right or absent, whatever happened to its files, and to the
processes using it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyfs.cache.directory import BlockCache
from lazyfs.cache.fill import LayerFill
from lazyfs.cache.locks import exclusive
from lazyfs.core.layer.blocks import BLOCK_BYTES
from lazyfs.errors import HostError, ImageError
from tests.cache.cachelayers import TestLayer, entry, make_layer, small_disk

LAYER = make_layer([1, 4096, 5000, BLOCK_BYTES + 1, 70_000, 3 * BLOCK_BYTES])


@pytest.fixture
def store(tmp_path: Path) -> BlockCache:
    return BlockCache(str(tmp_path / "store"))


@contextlib.contextmanager
def temporary_store() -> Iterator[BlockCache]:
    """A store of its own for each example of a property."""
    with tempfile.TemporaryDirectory(prefix="blockcache-") as directory:
        yield BlockCache(directory)


def test_blocks_are_absent_until_published_and_then_right(store: BlockCache) -> None:
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    assert layer.size_bytes == len(LAYER.device)
    assert layer.read(0, 1) is None
    assert not layer.publish(0, b"not its content")
    assert not layer.publish(0, b"")
    assert layer.missing(range(layer.table.count)) == list(range(layer.table.count))
    LAYER.fill(layer)
    assert layer.present_blocks() == layer.table.count
    assert layer.read(0, len(LAYER.device)) == LAYER.device
    assert layer.read(len(LAYER.device) - 10, 100) == LAYER.device[-10:]
    assert layer.read(len(LAYER.device), 100) == b""
    assert layer.read(1, 4095) == bytes(4095)  # padding between files
    layer.close()
    layer.close()
    with pytest.raises(HostError, match="closed"):
        layer.read(0, 1)


def test_another_process_sees_what_was_published(store: BlockCache) -> None:
    first = store.create_layer(LAYER.content_root, LAYER.table)
    second = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(first, range(2))
    assert second.has(1) and not second.has(2)
    assert second.read(0, 8192) == LAYER.device[:8192]
    first.close()
    second.close()


def test_a_table_under_a_foreign_name_is_refused(store: BlockCache) -> None:
    with pytest.raises(ImageError):
        store.create_layer("0" * 64, LAYER.table)
    assert store.content_roots() == []
    assert store.open_layer("0" * 64) is None


@settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_happens_to_its_files_a_block_is_right_or_absent(data: st.DataObject) -> None:
    with temporary_store() as store:
        layer = store.create_layer(LAYER.content_root, LAYER.table)
        LAYER.fill(layer)
        layer.close()
        for _ in range(data.draw(st.integers(1, 3))):
            damage(
                data, entry(store, LAYER, data.draw(st.sampled_from(["data", "present", "table", "lock"])))
            )
        layer = store.create_layer(LAYER.content_root, LAYER.table)
        try:
            for block in range(layer.table.count):
                address, length = layer.table.addresses[block], layer.table.lengths[block]
                part = data.draw(st.integers(1, length))
                found = layer.read(address, part)
                assert found in (None, LAYER.device[address : address + part])
                assert (found is not None) == layer.has(block)
            everything = layer.read(0, len(LAYER.device))
            assert everything in (None, LAYER.device)
            LAYER.fill(layer)
            assert layer.read(0, len(LAYER.device)) == LAYER.device
        finally:
            layer.close()


def damage(data: st.DataObject, path: str) -> None:
    """What a power cut or a bad disk leaves: a file that is gone, cut, zeroed or flipped in places."""
    if not os.path.exists(path):
        return
    size = os.path.getsize(path)
    kind = data.draw(st.sampled_from(["remove", "cut", "zero", "flip", "grow"]))
    if kind == "remove":
        os.unlink(path)
    elif kind == "cut":
        os.truncate(path, data.draw(st.integers(0, size)))
    elif kind == "grow":
        os.truncate(path, size + data.draw(st.integers(0, 10_000)))
    elif size:
        start = data.draw(st.integers(0, size - 1))
        with open(path, "r+b") as file:
            file.seek(start)
            old = file.read(1 if kind == "flip" else data.draw(st.integers(1, size)))
            file.seek(start)
            file.write(
                bytes(len(old)) if kind == "zero" else bytes([old[0] ^ data.draw(st.integers(1, 255))])
            )


def test_a_data_file_cut_while_open_is_noticed(store: BlockCache) -> None:
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    assert layer.read(0, len(LAYER.device)) == LAYER.device
    os.truncate(entry(store, LAYER, "data"), 5000)
    assert layer.read(0, len(LAYER.device)) is None
    assert layer.read(4097, 4095 + 100) is None or layer.has(1)
    LAYER.fill(layer)
    assert layer.read(0, len(LAYER.device)) == LAYER.device
    layer.close()


def test_verify_finds_rot_and_a_refill_repairs_it(store: BlockCache) -> None:
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    assert layer.verify() == []
    with open(entry(store, LAYER, "data"), "r+b") as file:
        file.seek(layer.table.addresses[3] + 7)
        file.write(b"rot")
    assert layer.verify() == [3]
    assert layer.missing(range(layer.table.count)) == [3]
    LAYER.fill(layer)
    assert layer.verify() == []
    layer.close()


def test_an_entry_without_a_lock_is_replaced(store: BlockCache) -> None:
    os.mkdir(store.layer_path(LAYER.content_root))
    Path(store.layer_path(LAYER.content_root), "rubbish").write_text("x")
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    layer.close()


def test_many_threads_read_and_fill_one_layer(store: BlockCache) -> None:
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    failures: list[object] = []

    def work(seed: int) -> None:
        source = random.Random(seed)
        for _ in range(300):
            block = source.randrange(layer.table.count)
            address, length = layer.table.addresses[block], layer.table.lengths[block]
            found = layer.read(address, length)
            if found is None:
                layer.publish(block, LAYER.content(block))
            elif found != LAYER.content(block):
                failures.append(block)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    layer.close()


def test_closing_below_busy_threads_never_touches_another_file(store: BlockCache, tmp_path: Path) -> None:
    """A descriptor's number is used again at once: a write that came too late would land in the
    wrong file.
    """
    for round_number in range(20):
        layer = store.create_layer(LAYER.content_root, LAYER.table)
        started = threading.Barrier(3)

        def work(layer: object = layer, started: threading.Barrier = started) -> None:
            started.wait()
            with contextlib.suppress(HostError):
                while True:
                    LAYER.fill(layer)  # type: ignore[arg-type]

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        started.wait()
        layer.close()
        victims = []
        for number in range(10):
            victims.append(os.open(tmp_path / f"victim-{round_number}-{number}", os.O_RDWR | os.O_CREAT))
        for thread in threads:
            thread.join()
        for victim in victims:
            assert os.fstat(victim).st_size == 0
            os.close(victim)


def fill_in_process(path: str, seed: int, barrier: Barrier, wrong: object) -> None:
    store = BlockCache(path)
    barrier.wait()
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    order = list(range(layer.table.count)) * 20
    random.Random(seed).shuffle(order)
    for block in order:
        found = layer.read(layer.table.addresses[block], layer.table.lengths[block])
        if found is None:
            layer.publish(block, LAYER.content(block))
        elif found != LAYER.content(block):
            os._exit(1)
    os._exit(0)


def test_two_processes_fill_one_layer_at_once(store: BlockCache) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [
        context.Process(target=fill_in_process, args=(store.path, seed, barrier, None)) for seed in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    layer = store.open_layer(LAYER.content_root)
    assert layer is not None and layer.read(0, len(LAYER.device)) == LAYER.device
    assert os.listdir(os.path.join(store.path, "tmp")) == []
    layer.close()


def fill(store: BlockCache, layer: TestLayer) -> None:
    filling = LayerFill(store)
    try:
        for block in range(layer.blocks.count):
            filling.add(layer.blocks.addresses[block], layer.content(block))
        filling.publish(layer.content_root, layer.table)
    finally:
        filling.discard()


@pytest.mark.parametrize("present", [range(0), range(3), None])
def test_a_fill_makes_a_complete_entry_also_beside_an_open_one(
    store: BlockCache, present: range | None
) -> None:
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer, present)
    fill(store, LAYER)
    assert layer.read(0, len(LAYER.device)) == LAYER.device
    layer.close()
    assert os.listdir(os.path.join(store.path, "tmp")) == []


def test_a_fill_of_an_empty_layer(store: BlockCache) -> None:
    empty = make_layer([])
    fill(store, empty)
    layer = store.open_layer(empty.content_root)
    assert layer is not None and layer.read(0, 100) == b""
    layer.close()


@pytest.mark.parametrize("discard", [True, False])
def test_an_abandoned_fill_leaves_nothing(store: BlockCache, discard: bool) -> None:
    filling = LayerFill(store)
    filling.add(0, b"x" * 1000)
    if not discard:  # the wrong table
        with pytest.raises((ImageError, ValueError)):
            filling.publish(LAYER.content_root, LAYER.table)
    filling.discard()
    filling.discard()
    assert os.listdir(os.path.join(store.path, "tmp")) == []
    assert store.content_roots() == []


def test_a_full_disk_is_the_hosts_fault_and_the_cache_works_on(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 700_000) as disk:
        store = BlockCache(str(disk / "store"))
        layer = store.create_layer(LAYER.content_root, LAYER.table)
        with pytest.raises(HostError, match="No space"):
            LAYER.fill(layer)
        done = [block for block in range(layer.table.count) if layer.has(block)]
        assert done
        for block in done:
            address, length = layer.table.addresses[block], layer.table.lengths[block]
            assert layer.read(address, length) == LAYER.content(block)
        with pytest.raises(HostError, match="No space"):
            fill(store, LAYER)
        with pytest.raises(HostError, match="No space"):
            store.write_atomically(os.path.join(store.path, "refs", "x"), bytes(800_000))
        assert os.listdir(os.path.join(store.path, "tmp")) == []
        layer.close()
        del layer  # its table is mapped as long as it lives


def test_marks_have_their_space_before_the_disk_is_full(tmp_path: Path) -> None:
    """A store through a memory map into a hole of a full disk would kill the process (SIGBUS)."""
    many = make_layer([1] * 3000)
    with small_disk(tmp_path / "disk", 14 << 20) as disk:
        store = BlockCache(str(disk / "store"))
        layer = store.create_layer(many.content_root, many.table)
        with contextlib.suppress(OSError), open(disk / "hog", "wb", buffering=0) as hog:
            while hog.write(bytes(1 << 20)):
                pass
        with contextlib.suppress(HostError):
            many.fill(layer)
        # What has a page of data already needs no space for its mark, the last one on its page included.
        os.unlink(disk / "hog")
        many.fill(layer)
        assert layer.present_blocks() == 3000
        layer.close()
        del layer


def test_no_room_for_an_entry(tmp_path: Path) -> None:
    many = make_layer([1] * 3000)
    with small_disk(tmp_path / "disk", 100_000) as disk:
        store = BlockCache(str(disk / "store"))
        with pytest.raises(HostError):
            store.create_layer(many.content_root, many.table)
        assert store.content_roots() == []
        assert os.listdir(os.path.join(store.path, "tmp")) == []


def test_an_unknown_version_and_a_place_that_is_no_directory_are_refused(tmp_path: Path) -> None:
    BlockCache(str(tmp_path / "store"))
    (tmp_path / "store" / "version").write_text("2\n")
    with pytest.raises(HostError, match="unknown version"):
        BlockCache(str(tmp_path / "store"))
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot use"):
        BlockCache(str(tmp_path / "file"))


def test_the_exclusive_lock_is_only_had_of_an_entry_nobody_uses(store: BlockCache) -> None:
    path = entry(store, LAYER, "lock")
    with exclusive(path) as free:
        assert not free  # there is none
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    with exclusive(path) as free:
        assert not free
    layer.close()
    with exclusive(path) as free:
        assert free
    shutil.rmtree(store.layer_path(LAYER.content_root))


def test_complete_means_every_block(store: BlockCache) -> None:
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    for block in reversed(range(layer.table.count)):
        assert not layer.is_complete()
        LAYER.fill(layer, range(block, block + 1))
    assert layer.is_complete()
    layer.close()


def test_a_layer_is_sound_once_all_of_it_was_compared(store: BlockCache) -> None:
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    last = layer.table.count - 1
    LAYER.fill(layer, range(last))
    assert not layer.seal() and not layer.is_sealed()
    LAYER.fill(layer, range(last, last + 1))
    assert not layer.is_sealed()  # nobody has compared it yet
    assert layer.seal() and layer.is_sealed()
    other = store.create_layer(LAYER.content_root, LAYER.table)
    assert other.is_sealed()
    assert Path(other.open_data_path()).read_bytes() == LAYER.device
    layer.close()
    other.close()


@pytest.mark.parametrize("event", ["write", "mark", "boot", "truncated note"])
def test_a_layer_is_no_longer_sound_after(store: BlockCache, event: str) -> None:
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    assert layer.seal() and layer.is_sealed()
    if event == "write":
        with open(entry(store, LAYER, "data"), "r+b") as data:
            data.write(b"x")
    elif event == "mark":
        with open(entry(store, LAYER, "present"), "r+b") as marks:
            marks.write(bytes(8))
    else:
        note = Path(entry(store, LAYER, "sound"))
        note.write_bytes(note.read_bytes()[:-9] if event == "truncated note" else b"0" + note.read_bytes()[1:])
    assert not layer.is_sealed()
    layer.close()


def test_settling_finds_damage(store: BlockCache) -> None:
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    with open(entry(store, LAYER, "data"), "r+b") as data:
        data.seek(1)  # behind the first file, which has one byte
        data.write(b"rubbish in the padding")
        data.seek(LAYER.blocks.addresses[2])
        data.write(b"damage")
    assert not layer.seal() and layer.has(2)  # the padding was mended: again from the start
    assert not layer.seal() and not layer.has(2) and not layer.is_sealed()
    LAYER.fill(layer, range(2, 3))
    assert layer.seal() and layer.is_sealed()
    assert Path(entry(store, LAYER, "data")).read_bytes() == LAYER.device
    layer.close()


def test_settling_compares_what_was_read_before(store: BlockCache) -> None:
    """Damage to a block that was right when it was first read must not be sealed."""
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    assert layer.read(0, len(LAYER.device)) == LAYER.device
    with open(entry(store, LAYER, "data"), "r+b") as data:
        data.seek(LAYER.blocks.addresses[3])
        data.write(b"damage")
    assert not layer.seal() and not layer.has(3) and not layer.is_sealed()
    layer.close()


def test_settling_goes_by_pieces(store: BlockCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazyfs.cache.layer.SEAL_STEP_BYTES", BLOCK_BYTES)
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    tries = [layer.seal() for _ in range(LAYER.blocks.count + 1)]
    assert 2 < tries.index(True) < LAYER.blocks.count and not any(tries[: tries.index(True)])
    layer.close()


def test_settling_begins_anew_when_somebody_writes(store: BlockCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazyfs.cache.layer.SEAL_STEP_BYTES", BLOCK_BYTES)
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    assert not layer.seal()
    with open(entry(store, LAYER, "data"), "r+b") as data:
        data.seek(LAYER.blocks.addresses[0])
        data.write(b"!" if LAYER.device[:1] != b"!" else b"?")  # the first block was compared already
    tries = [layer.seal() for _ in range(2 * LAYER.blocks.count)]
    assert not any(tries) and not layer.has(0)
    layer.close()


def test_settling_does_not_read_the_disk(store: BlockCache) -> None:
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    with open(entry(store, LAYER, "data"), "rb") as data:
        os.fsync(data.fileno())
        os.posix_fadvise(data.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert not layer.seal()
    assert layer.read(0, len(LAYER.device)) == LAYER.device
    assert layer.seal() and layer.is_sealed()
    layer.close()
