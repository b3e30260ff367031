"""Windows are trimmed the same by a thread and by a process, which goes when its work is done, or can be killed."""

from __future__ import annotations

import contextlib
import gzip
import os
import random
import signal
from pathlib import Path

import pytest

from lazyfs.decoding import trimming
from lazyfs.decoding.gzipscan import GzipInflater
from tests.decoding.test_gzipscan import check_spans, scan, text


def children() -> set[int]:
    """Trimming processes of this one."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread or a process that has just ended
            for word in (task / "children").read_text().split():
                if b"lazyfs.decoding.trimming" in Path(f"/proc/{word}/cmdline").read_bytes():
                    found.add(int(word))
    return found


@pytest.fixture(scope="module")
def layer() -> tuple[bytes, bytes]:
    """A layer of about 40 windows, plain and packed."""
    plain = text(30_000_000, 7)
    return plain, gzip.compress(plain, 3, mtime=0)


@pytest.fixture(scope="module")
def by_thread(layer: tuple[bytes, bytes]) -> list[bytes]:
    """The windows, packed, without a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trimming, "_PROCESS_FROM", 1 << 30)
        inflater, _ = scan(layer[1])
        assert not children()
        return inflater.window_groups


def feed_half(blob: bytes) -> GzipInflater:
    inflater = GzipInflater()
    for at in range(0, len(blob) // 2, 1 << 20):
        for _ in inflater.feed(blob[at : at + (1 << 20)]):
            pass
    return inflater


def feed_rest(inflater: GzipInflater, blob: bytes) -> None:
    for at in range(0, len(blob), 1 << 20):
        if at >= len(blob) // 2:
            for _ in inflater.feed(blob[at : at + (1 << 20)]):
                pass
    for _ in inflater.finish():
        pass


def test_a_process_gives_the_same_windows(layer: tuple[bytes, bytes], by_thread: list[bytes]) -> None:
    plain, blob = layer
    inflater = feed_half(blob)
    inflater._windows[trimming._PROCESS_FROM].result(timeout=30)
    assert len(children()) == 1
    feed_rest(inflater, blob)
    assert not children()
    assert inflater.window_groups == by_thread and len(by_thread) > 3
    check_spans(inflater, blob, plain)


def test_a_killed_process_changes_nothing(layer: tuple[bytes, bytes], by_thread: list[bytes]) -> None:
    inflater = feed_half(layer[1])
    inflater._windows[trimming._PROCESS_FROM].result(timeout=30)
    (process,) = children()
    os.kill(process, signal.SIGKILL)
    feed_rest(inflater, layer[1])
    assert not children()
    assert inflater.window_groups == by_thread


def test_a_stopped_process_is_not_waited_for(
    layer: tuple[bytes, bytes], by_thread: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trimming, "_ANSWER_S", 0.5)
    inflater = feed_half(layer[1])
    inflater._windows[trimming._PROCESS_FROM].result(timeout=30)
    (process,) = children()
    os.kill(process, signal.SIGSTOP)
    feed_rest(inflater, layer[1])
    assert not children()
    assert inflater.window_groups == by_thread


def test_no_process_can_be_started(
    layer: tuple[bytes, bytes], by_thread: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trimming, "python_command", lambda module: ["/nonexistent/python"])
    inflater, _ = scan(layer[1])
    assert inflater.window_groups == by_thread


def test_a_pass_that_is_given_up_leaves_no_process(layer: tuple[bytes, bytes]) -> None:
    inflater = feed_half(layer[1])
    inflater._windows[trimming._PROCESS_FROM].result(timeout=30)
    assert len(children()) == 1
    inflater.close()
    inflater.close()
    assert not children()


def test_a_small_layer_starts_no_process() -> None:
    started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trimming, "_start", lambda: started.append(1))
        inflater, _ = scan(gzip.compress(text(3_000_000), 6, mtime=0))
    assert inflater.window_groups and not started


def random_jobs(count: int) -> list[tuple[int, bytes, bytes]]:
    source = random.Random(9)
    return [(source.randrange(8), source.randbytes(32768), source.randbytes(2000)) for _ in range(count)]


def test_windows_before_rubbish_stay_whole() -> None:
    """What does not decode cannot tell which bytes are used."""
    trimmer = trimming.WindowTrimmer()
    try:
        jobs = random_jobs(trimming._PROCESS_FROM + 4)
        done = [trimmer.submit(*job) for job in jobs]
        assert [future.result(timeout=30) for future in done] == [window for _, window, _ in jobs]
    finally:
        trimmer.close()
    assert not children()
