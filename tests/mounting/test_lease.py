"""A root is acquired first and attached later, or never."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazyfs.control import rundir
from lazyfs.errors import HostError
from lazyfs.mounting import unmount
from lazyfs.mounting.acquire import acquire
from lazyfs.mounting.attach import attach
from lazyfs.mounting.lease import Lease, Wanted
from lazyfs.sources.access import Access
from lazyfs.system.devices import dev_of
from lazyfs.system.mountapi import MOUNT_NOEXEC, MOUNT_RDONLY
from lazyfs.system.mountinfo import mounts as all_mounts
from tests.mounting.standin import attributes, said


@pytest.fixture
def lease(fake: Path) -> Iterator[Lease]:
    with acquire(wanted(fake)) as lease:
        yield lease


def wanted(fake: Path, **more: Any) -> Wanted:
    return Wanted("indexed", Access(), str(fake), rundir.runtime_directory(str(fake)), **more)


def test_a_lease_is_known_before_it_is_attached(lease: Lease, fake: Path, target: Path) -> None:
    assert lease.backend == "kernel" and not lease.joined and lease.manifest_digest == "sha256:" + "ab" * 32
    assert lease.fd is not None and lease.dev == dev_of(lease.fd)
    assert not any(entry.dev == lease.dev for entry in all_mounts())
    mounted = attach(lease, str(target), MOUNT_RDONLY | MOUNT_NOEXEC)
    assert mounted.dev == lease.dev and attributes(target) == {"ro", "noexec"}
    lease.release()
    assert (target / "file").read_text() == "from the image\n"
    assert said(fake)[-1]["attached"]["target"] == str(target)


def test_what_was_not_attached_leaves_nothing(fake: Path) -> None:
    lease = acquire(wanted(fake))
    dev = lease.dev
    lease.release()
    lease.release()
    assert lease.fd is None
    assert not any(entry.dev == dev for entry in all_mounts())
    assert not any("attached" in line for line in said(fake))


def test_two_leases_share_what_is_mounted(lease: Lease, fake: Path, target: Path, second: Path) -> None:
    attach(lease, str(target), MOUNT_RDONLY)
    with acquire(wanted(fake)) as other:
        assert other.joined and other.dev == lease.dev
        attach(other, str(second), MOUNT_RDONLY)
    assert (second / "file").read_text() == "from the image\n"


def test_a_lease_that_cannot_be_attached(lease: Lease, tmp_path: Path) -> None:
    with pytest.raises(HostError):
        attach(lease, str(tmp_path / "nowhere"), MOUNT_RDONLY)
    assert lease.fd is not None


def test_a_lease_of_a_fuse_process(fake: Path, target: Path) -> None:
    with acquire(wanted(fake, backend="fuse")) as lease:
        assert lease.backend == "fuse" and not any(entry.dev == lease.dev for entry in all_mounts())
        attach(lease, str(target), MOUNT_RDONLY)
    assert (target / "file").read_text() == "from the image\n"
    unmount.umount(str(target), wait=True)
