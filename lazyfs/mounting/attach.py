"""Puts the root of a lease in place, alone or below an overlay."""

from __future__ import annotations

import os

from lazyfs.mounting.lease import Lease
from lazyfs.mounting.target import check_target, enter_mount_namespace
from lazyfs.records import NamedTuple
from lazyfs.system.devices import dev_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.mounting.overlay import Upper


class Mounted(NamedTuple):
    """A mount that is in place."""

    image: str  # canonical reference
    manifest_digest: str
    target: str  # real path
    backend: str  # kernel or fuse
    joined: bool  # shares an earlier mount's superblock
    dev: tuple[int, int]
    ephemeral_upper: str | None


def attach(
    lease: Lease,
    target: str,
    attributes: int,
    upper: Upper | None = None,
    *,
    namespace: str | None = None,
    on_attached: Callable[[Mounted], None] | None = None,
) -> Mounted:
    """Attaches the root of `lease` at the directory `target` and reports it. Only the complete root appears there.

    `attributes`: mountapi.MOUNT_*. `upper`: an upper directory, the caller's, for an overlay on the root. `namespace`:
    a mount namespace to enter before; the process stays in it. `on_attached` is called as soon as the mount is there,
    with no signal in between. Raises LazyfsError; then nothing is attached.
    """
    if lease.fd is None:  # the fuse process put it there
        mounted = _mounted(lease, target, lease.dev, None)
        if on_attached is not None:
            on_attached(mounted)
        lease.report(mounted.dev, target)
        return mounted
    from lazyfs.system.mountapi import MNT_DETACH, mount_setattr, umount2

    top_fd = lease.fd
    if upper is None:
        mount_setattr(top_fd, attributes)
    else:
        from lazyfs.mounting.overlay import overlay

        top_fd = overlay(lease.fd, upper, attributes)
    try:
        if namespace is not None:
            enter_mount_namespace(namespace)
            target = check_target(target)
        mounted = _mounted(lease, target, dev_of(top_fd), upper)
        _put(top_fd, mounted, on_attached)
        try:
            lease.report(mounted.dev, target, mounted.ephemeral_upper)
        except BaseException:
            umount2(target, MNT_DETACH)
            raise
        return mounted
    finally:
        if top_fd != lease.fd:
            os.close(top_fd)


def _mounted(lease: Lease, target: str, dev: tuple[int, int], upper: Upper | None) -> Mounted:
    ephemeral = upper.ephemeral_path if upper is not None else None
    return Mounted(lease.image, lease.manifest_digest, target, lease.backend, lease.joined, dev, ephemeral)


def _put(fd: int, mounted: Mounted, on_attached: Callable[[Mounted], None] | None) -> None:
    """Attaches `fd`. Signals are blocked until `on_attached` has run, so that none ends the process in between."""
    from lazyfs.system import detached

    if on_attached is None:
        detached.attach(fd, mounted.target)
        return
    import signal

    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        detached.attach(fd, mounted.target)
        on_attached(mounted)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
