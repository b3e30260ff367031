"""Frames of a startup pack, as they stream, to blocks in the cache."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

from lazyfs.cache.layer import CachedLayer
from lazyfs.core.oci.digests import ContentRoot
from lazyfs.core.starts.pack import FrameDecoder, PackHead
from lazyfs.errors import ImageError


class Unpacker:
    """Takes the bytes of a pack from `start` on, and publishes the blocks of some of its frames, which come in this
    order. Used by one thread at a time.

    What is not of these layers, is here already, or does not verify is left out; so is the rest of a damaged frame.
    """

    def __init__(
        self, head: PackHead, layers: Mapping[ContentRoot, CachedLayer], frames: Sequence[int], start: int
    ) -> None:
        self.at = start  # in the blob
        self.published = 0
        self.refused = 0  # blocks that are not what the pack says, or could not be decoded
        self.over: list[int] = []  # frames of which all came
        self._head = head
        self._layers = layers
        self._left = collections.deque(frames)
        self._decoder: FrameDecoder | None = None
        self._damaged = False  # the frame that is under way

    def feed(self, data: bytes) -> None:
        """The next bytes. HostError: the disk fails."""
        left = memoryview(data)
        while left and self._left:
            number = self._left[0]
            frame = self._head.frames[number]
            end = frame.offset if self.at < frame.offset else frame.offset + frame.stored_bytes
            piece = left[: end - self.at]
            left = left[len(piece) :]
            if self.at >= frame.offset and not self._damaged:
                self._decode(number, piece)
            self.at += len(piece)
            if self.at == frame.offset + frame.stored_bytes:
                self._finish(number)
        self.at += len(left)

    def _decode(self, number: int, piece: memoryview) -> None:
        try:
            if self._decoder is None:
                self._decoder = FrameDecoder(self._head, number)
            blocks = self._decoder.feed(piece)
        except ImageError:
            self._spoil()
            return
        for root, block, content in blocks:
            layer = self._layers.get(root)
            if layer is None or block >= layer.table.count or layer.has(block):
                continue
            if layer.publish(block, content):
                self.published += 1
            else:
                self.refused += 1

    def _finish(self, number: int) -> None:
        try:
            if self._decoder is not None:
                self._decoder.finish()
        except ImageError:
            self._spoil()
        self._decoder, self._damaged = None, False
        self._left.popleft()
        self.over.append(number)

    def _spoil(self) -> None:
        self._damaged = True
        self.refused += 1
