"""Puts an acquired root in place, alone or below an overlay."""

from __future__ import annotations

import os
from collections.abc import Callable

from lazyfs.control import messages
from lazyfs.control.client import DaemonGone
from lazyfs.mounting import launch
from lazyfs.mounting.job import Acquired, Mounted, MountRequest, dev_of
from lazyfs.mounting.options import MountOptions
from lazyfs.mounting.target import check_target, enter_mount_namespace

# -- putting it in place ---------------------------------------------------------------------------------


def _attributes(options: MountOptions) -> int:
    from lazyfs.system.mountapi import MOUNT_NODEV, MOUNT_NOEXEC, MOUNT_NOSUID, MOUNT_RDONLY

    return (
        (0 if options.writable else MOUNT_RDONLY)
        | (0 if options.dev else MOUNT_NODEV)
        | (0 if options.suid else MOUNT_NOSUID)
        | (0 if options.executable else MOUNT_NOEXEC)
    )


def finish(job: MountRequest, root: Acquired, namespace: str | None) -> Mounted:
    if root.fd is None:
        mounted = _mounted(job, root, job.target, dev_of(job.target), None)
        if job.on_attached is not None:
            job.on_attached(mounted)
        _report(job, root, mounted)
        return mounted
    from lazyfs.system.mountapi import MNT_DETACH, mount_setattr, umount2

    upper = None
    top_fd = root.fd
    try:
        if job.options.writable:
            from lazyfs.mounting import overlay

            upper = overlay.prepare_upper(job.options, job.cache, root.fd, *_identity(job, root))
            top_fd = overlay.overlay(root.fd, upper, _attributes(job.options))
        else:
            mount_setattr(root.fd, _attributes(job.options))
        target = job.target
        if namespace is not None:
            enter_mount_namespace(namespace)
            target = check_target(target)
        mounted = _mounted(job, root, target, dev_of(top_fd), upper.ephemeral_path if upper else None)
        _attach(top_fd, mounted, job.on_attached)
        try:
            _report(job, root, mounted)
        except BaseException:
            umount2(target, MNT_DETACH)
            raise
        if upper is not None:
            upper.close()
        return mounted
    except BaseException:
        if top_fd != root.fd:
            os.close(top_fd)
            top_fd = root.fd
        if upper is not None:
            upper.discard()
        raise
    finally:
        if top_fd != root.fd:
            os.close(top_fd)


def _identity(job: MountRequest, root: Acquired) -> tuple[str, str]:
    """The image's canonical reference, and its manifest digest."""
    return str(root.reply.get("image") or job.image), str(root.reply.get("manifest_digest") or "")


def _mounted(job: MountRequest, root: Acquired, target: str, dev: tuple[int, int], ephemeral: str | None) -> Mounted:
    image, manifest_digest = _identity(job, root)
    return Mounted(
        image=image,
        manifest_digest=manifest_digest,
        target=target,
        backend=root.backend,
        joined=root.joined,
        dev=dev,
        ephemeral_upper=ephemeral,
    )


def _attach(fd: int, mounted: Mounted, on_attached: Callable[[Mounted], None] | None) -> None:
    """Attaches `fd`. Whoever wants to know of it does before a signal can end us."""
    from lazyfs.system.detached import attach

    if on_attached is None:
        attach(fd, mounted.target)
        return
    import signal

    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        attach(fd, mounted.target)
        on_attached(mounted)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _report(job: MountRequest, root: Acquired, mounted: Mounted) -> None:
    """Tells the daemon where the mount is: from then on it lives by that, not by our connection."""
    attached = {
        "dev": messages.format_dev(mounted.dev),
        "target": mounted.target,
        "ephemeral_upper": mounted.ephemeral_upper,
        "image_dev": messages.format_dev(mounted.dev if root.fd is None else dev_of(root.fd)),
    }
    as_request = {"op": "attached", "attached": attached}
    try:
        # Joining a fuse mount, the connection carries requests; otherwise it waits for just this.
        root.connection.ask(as_request if root.joined and root.backend == "fuse" else {"attached": attached})
    except DaemonGone:
        if root.backend == "fuse":
            raise
        with launch.connect_or_start(
            job.cache, job.runtime
        ) as again:  # it died just now; its successor learns it
            again.ask(as_request)
