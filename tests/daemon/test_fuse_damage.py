"""What is served through FUSE over metadata that is damaged: only errors that FUSE knows. Without a mount."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazyfs.core.erofs.reader import ErofsReader
from lazyfs.errors import ImageError
from lazyfs.fuse.root import RootOperations, may_have_acls
from tests.daemon.roottree import TreeBuilder, every_kind, small_image


class _Zeros:
    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def read_cached(self, address: int, size_bytes: int, /) -> bytes | None:
        return bytes(size_bytes)

    async def read(self, address: int, size_bytes: int, /) -> bytes:
        raise AssertionError


def over_zeros(reader: ErofsReader) -> RootOperations:
    return RootOperations(reader, [_Zeros(device.size_bytes) for device in reader.devices])


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    builder = TreeBuilder(tmp_path_factory.mktemp("damage") / "image")
    tree = every_kind(builder)
    assert tree.children is not None
    deep = tree.children[b"deep"].children
    assert deep is not None
    for number in range(20, 3000):
        del deep[b"entry-%d" % number]
    return (builder.finish() / "namespace.erofs").read_bytes()


def test_only_access_lists_look_like_them(namespace: bytes, tmp_path: Path) -> None:
    assert may_have_acls(namespace)
    assert not may_have_acls((small_image(tmp_path) / "namespace.erofs").read_bytes())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_metadata_gives_only_fuse_errors(namespace: bytes, data: st.DataObject) -> None:
    damaged = bytearray(namespace)
    for _ in range(data.draw(st.integers(1, 20))):
        damaged[data.draw(st.integers(4096, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        reader = ErofsReader(bytes(damaged))
    except ImageError:
        return
    trio.run(_ask_everything, over_zeros(reader))


async def _ask_everything(operations: RootOperations) -> None:
    ctx: Any = SimpleNamespace(uid=1)
    pending: list[int] = [pyfuse3.ROOT_INODE]
    seen = set(pending)

    async def ask(handler: Any, *arguments: Any) -> Any:
        try:
            return await handler(*arguments)
        except pyfuse3.FUSEError as error:
            assert error.errno in (errno.EIO, errno.ENODATA)

    while pending:
        inode = pending.pop()
        for handler in (operations.getattr, operations.readlink, operations.listxattr, operations.opendir):
            await ask(handler, inode, ctx)
        await ask(operations.getxattr, inode, b"user.a", ctx)
        info = await ask(operations.open, inode, os.O_RDONLY, ctx)
        if info is not None:
            assert len(await operations.read(info.fh, 0, 100)) <= 100
        for name in b"deep,link-b,entry-7,xattrs,symlink,level 0,acl,chr,huge".split(b","):
            entry = await ask(operations.lookup, inode, name, ctx)
            if entry is not None and entry.st_ino and entry.st_ino not in seen:
                seen.add(entry.st_ino)
                pending.append(entry.st_ino)


async def test_handlers_refuse_writes_themselves(namespace: bytes) -> None:
    reader = ErofsReader(namespace)
    operations: Any = over_zeros(reader)
    writes = "setattr mknod mkdir unlink rmdir symlink rename link write create setxattr removexattr"
    for name in writes.split():
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await getattr(operations, name)(1, b"name", None)
        assert caught.value.errno == errno.EROFS
    with pytest.raises(pyfuse3.FUSEError):
        await operations.open(pyfuse3.ROOT_INODE, os.O_WRONLY, None)


def test_layers_that_do_not_fit_are_refused(namespace: bytes) -> None:
    with pytest.raises(ImageError):
        RootOperations(ErofsReader(namespace), [_Zeros(4096)])
