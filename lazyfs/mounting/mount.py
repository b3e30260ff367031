"""The client's side of a mount: asks a daemon for the root of an image and attaches it.

    kernel          the cache's daemon hands out a detached EROFS mount
    fuse, root      a fusemount process mounts at a private place, a detached clone of which is taken; a later
                    mount of the image clones the first one's (same superblock, same process)
    fuse, user      a fusemount process mounts at the target itself, by fusermount3

What is detached ends with this process, so an interrupted mount leaves nothing. An overlay for `rw` is put on
it, and only the finished root appears at the target.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from lazyfs.cache import places
from lazyfs.control import rundir
from lazyfs.errors import Unsupported, UserError
from lazyfs.mounting.attach import finish
from lazyfs.mounting.fuseroot import any_fuse_root
from lazyfs.mounting.job import Mounted, MountRequest, Progress, ignore
from lazyfs.mounting.kernelroot import kernel_root_or_fuse
from lazyfs.mounting.options import MountOptions
from lazyfs.mounting.target import check_target
from lazyfs.system import host

if TYPE_CHECKING:
    from lazyfs.indexing.missing import Bars


def mount(
    image: str,
    target: str,
    options: MountOptions,
    *,
    push_index: bool = False,
    namespace: str | None = None,
    on_progress: Progress | None = None,
    bars: Bars | None = None,
    on_attached: Callable[[Mounted], None] | None = None,
) -> Mounted:
    """Mounts `image` at the directory `target` and returns when the root is usable. `namespace`: a mount
    namespace file to enter before attaching (the process then stays in it). `on_attached` is told as soon as
    the mount is there, with no signal in between. Raises LazyfsError."""
    image = absolute_reference(image)
    backend = choose_backend(options, namespace)
    if namespace is None:
        target = check_target(target)
    cache = places.cache_directory(options.cache)
    runtime = rundir.runtime_directory(cache)
    job = MountRequest(image, target, options, cache, runtime, push_index, on_progress or ignore, bars, on_attached)
    root = kernel_root_or_fuse(job) if backend == "kernel" else any_fuse_root(job)
    try:
        return finish(job, root, namespace)
    finally:
        root.connection.close()
        if root.fd is not None:
            os.close(root.fd)


def absolute_reference(image: str) -> str:
    """`oci:DIR` with an absolute DIR: the daemon works in another directory. It is not parsed here: that would load
    regular expressions, which the daemon has."""
    if image.startswith("oci:") and len(image) > 4:
        return "oci:" + os.path.normpath(os.path.join(os.getcwd(), image[4:]))
    return image


def choose_backend(options: MountOptions, namespace: str | None = None) -> str:
    """ "kernel" or "fuse". Raises UserError or Unsupported if what was asked for cannot be had."""
    if not host.is_root():
        for wanted, name in ((options.dev, "dev"), (options.suid, "suid"), (options.writable, "rw")):
            if wanted:
                raise UserError(f"mount option {name} needs root", "run as root, or leave it out")
        if namespace is not None:
            raise UserError("mounting into another namespace needs root", "run as root, or leave -N out")
        if options.allow_other and not host.users_may_allow_other():
            raise UserError(
                "mount option allow_other is not allowed", "add user_allow_other to /etc/fuse.conf"
            )
    if options.writable and not host.has_filesystem("overlay"):
        raise Unsupported("rw needs overlayfs, which this kernel lacks", "modprobe overlay, or mount read-only")
    if options.backend != "fuse":
        problem = host.kernel_backend_problem()
        if problem is None:
            return "kernel"
        if options.backend == "kernel":
            raise Unsupported(*problem)
    problem = host.fuse_problem()
    if problem is not None:
        raise Unsupported(*problem)
    return "fuse"
