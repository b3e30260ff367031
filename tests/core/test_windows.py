"""Windows in groups: what goes in comes out; damage is noticed."""

from __future__ import annotations

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.index.windows import pack_windows, unpack_windows
from lazyfs.core.layer.deflate import WINDOW_BYTES
from lazyfs.core.layer.spans import WINDOWS_PER_GROUP
from lazyfs.errors import ImageError


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=70))
def test_windows_are_grouped_and_filled_in_front(windows: list[bytes]) -> None:
    groups = pack_windows(windows)
    assert len(groups) == -(-len(windows) // WINDOWS_PER_GROUP)
    raw = b"".join(unpack_windows(group) for group in groups)
    assert raw == b"".join(window.rjust(WINDOW_BYTES, b"\0") for window in windows)


@given(st.integers(0, 1 << 30), st.integers(1, 255))
def test_a_damaged_group_is_noticed(at: int, mask: int) -> None:
    group = bytearray(pack_windows([b"window" * 1000, bytes(range(256)) * 100])[0])
    group[at % len(group)] ^= mask
    try:
        raw = unpack_windows(bytes(group))
    except ImageError:
        return
    assert raw == unpack_windows(pack_windows([b"window" * 1000, bytes(range(256)) * 100])[0])


@pytest.mark.parametrize(
    "stored",
    [b"", b"x", zstd.compress(b""), zstd.compress(b"short"), zstd.compress(bytes(33 * WINDOW_BYTES))],
)
def test_a_group_of_the_wrong_length_is_refused(stored: bytes) -> None:
    with pytest.raises(ImageError):
        unpack_windows(stored)
