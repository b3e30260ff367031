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

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.locks import Exclusive
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.errors import HostError, ImageError
from tests.cache.cachelayers import LAYER, entry


@contextlib.contextmanager
def temporary_store() -> Iterator[CacheDirectory]:
    """A store of its own for each example of a property."""
    with tempfile.TemporaryDirectory(prefix="blockcache-") as directory:
        yield CacheDirectory(directory)


def test_blocks_are_absent_until_published_and_then_right(store: CacheDirectory) -> None:
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


def test_another_process_sees_what_was_published(store: CacheDirectory) -> None:
    first = store.create_layer(LAYER.content_root, LAYER.table)
    second = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(first, range(2))
    assert second.has(1) and not second.has(2)
    assert second.read(0, 8192) == LAYER.device[:8192]
    first.close()
    second.close()


def test_a_table_under_a_foreign_name_is_refused(store: CacheDirectory) -> None:
    with pytest.raises(ImageError):
        store.create_layer(ContentRoot("0" * 64), LAYER.table)
    assert store.content_roots() == []
    assert store.open_layer(ContentRoot("0" * 64)) is None


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


def test_a_data_file_cut_while_open_is_noticed(store: CacheDirectory) -> None:
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    assert layer.read(0, len(LAYER.device)) == LAYER.device
    os.truncate(entry(store, LAYER, "data"), 5000)
    assert layer.read(0, len(LAYER.device)) is None
    assert layer.read(4097, 4095 + 100) is None or layer.has(1)
    LAYER.fill(layer)
    assert layer.read(0, len(LAYER.device)) == LAYER.device
    layer.close()


@pytest.mark.parametrize("repair", ["read", "publish", "open", "another's read"])
def test_no_process_shows_zeros_for_what_was_cut_off_after_it_was_checked(
    store: CacheDirectory, repair: str
) -> None:
    """Whoever gives the file its size back makes holes of what was lost."""
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    other = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    for one in (layer, other):
        assert one.read(0, len(LAYER.device)) == LAYER.device
    cut = LAYER.blocks.addresses[2] + 5
    os.truncate(os.path.join(layer.path, "data"), cut)
    last = LAYER.blocks.count - 1
    if repair == "publish":
        assert layer.publish(last, LAYER.content(last))
    elif repair == "open":
        store.create_layer(LAYER.content_root, LAYER.table).close()
    else:
        assert (layer if repair == "read" else other).read(LAYER.blocks.addresses[last], 1) is None
    lost = set(range(2, last + (repair != "publish")))
    for one in (layer, other):
        for block in range(LAYER.blocks.count):
            address, content = LAYER.blocks.addresses[block], LAYER.content(block)
            assert one.read(address, len(content)) == (None if block in lost else content)
    LAYER.fill(other, range(2, LAYER.blocks.count))
    for one in (layer, other):
        assert one.read(0, len(LAYER.device)) == LAYER.device
        one.close()


def test_verify_finds_rot_and_a_refill_repairs_it(store: CacheDirectory) -> None:
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


def test_an_entry_without_a_lock_is_replaced(store: CacheDirectory) -> None:
    os.mkdir(store.layer_path(LAYER.content_root))
    Path(store.layer_path(LAYER.content_root), "rubbish").write_text("x")
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    LAYER.fill(layer)
    layer.close()


def test_many_threads_read_and_fill_one_layer(store: CacheDirectory) -> None:
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


def test_closing_below_busy_threads_never_touches_another_file(store: CacheDirectory, tmp_path: Path) -> None:
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
    store = CacheDirectory(path)
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


def test_two_processes_fill_one_layer_at_once(store: CacheDirectory) -> None:
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


def test_an_unknown_version_and_a_place_that_is_no_directory_are_refused(tmp_path: Path) -> None:
    CacheDirectory(str(tmp_path / "store"))
    (tmp_path / "store" / "version").write_text("2\n")
    with pytest.raises(HostError, match="unknown version"):
        CacheDirectory(str(tmp_path / "store"))
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot use"):
        CacheDirectory(str(tmp_path / "file"))


def test_the_exclusive_lock_is_only_had_of_an_entry_nobody_uses(store: CacheDirectory) -> None:
    path = entry(store, LAYER, "lock")
    with Exclusive(path) as free:
        assert not free  # there is none
    layer = store.create_layer(LAYER.content_root, LAYER.table)
    with Exclusive(path) as free:
        assert not free
    layer.close()
    with Exclusive(path) as free:
        assert free
    shutil.rmtree(store.layer_path(LAYER.content_root))
