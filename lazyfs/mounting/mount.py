"""`lazyfs mount` as a function: acquires a root, for `rw` puts an overlay on it, and attaches it at the target."""

from __future__ import annotations

import os

from lazyfs.cache import places
from lazyfs.control import rundir
from lazyfs.errors import Unsupported, UserError
from lazyfs.mounting.acquire import acquire
from lazyfs.mounting.attach import Mounted, attach
from lazyfs.mounting.lease import SILENT, Lease, Reporter, Wanted
from lazyfs.mounting.target import check_target
from lazyfs.system import host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.mounting.options import MountOptions


def mount(
    image: str,
    target: str,
    options: MountOptions,
    *,
    push_index: bool = False,
    namespace: str | None = None,
    reporter: Reporter = SILENT,
    on_attached: Callable[[Mounted], None] | None = None,
    own_runtime: str | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> Mounted:
    """Mounts `image` at the directory `target` and returns when the root is usable. `namespace`: a mount namespace to
    enter before attaching; the process stays in it. `on_attached` is called as soon as the mount is there, with no
    signal in between. `own_runtime`: the runtime directory of a daemon of its own (owndaemon.py), which sees every
    read. `meanwhile`: see acquire(). Raises LazyfsError."""
    image = absolute_reference(image)
    backend = choose_backend(options, namespace)
    if namespace is None:
        target = check_target(target)
    cache = places.cache_directory(options.cache)
    wanted = Wanted(
        image,
        options.access,
        cache,
        own_runtime or rundir.runtime_directory(cache),
        backend="fuse" if backend == "fuse" else options.backend,
        timeout_s=options.timeout_s,
        push_index=push_index,
        allow_other=options.allow_other,
        executable=options.executable,
        place=target,
        traced=own_runtime is not None,
    )
    with acquire(wanted, reporter, meanwhile or (_load_overlay if options.writable else None)) as lease:
        if not options.writable:
            return attach(lease, target, _attributes(options), namespace=namespace, on_attached=on_attached)
        return _attach_writable(lease, target, options, namespace, on_attached)


def _attach_writable(
    lease: Lease,
    target: str,
    options: MountOptions,
    namespace: str | None,
    on_attached: Callable[[Mounted], None] | None,
) -> Mounted:
    from lazyfs.mounting.overlay import prepare_upper

    upper = prepare_upper(options, lease)
    try:
        mounted = attach(lease, target, _attributes(options), upper, namespace=namespace, on_attached=on_attached)
    except BaseException:
        upper.discard()
        raise
    upper.close()
    return mounted


def _load_overlay() -> None:
    from lazyfs.mounting import overlay  # noqa: F401


def _attributes(options: MountOptions) -> int:
    from lazyfs.system.mountapi import MOUNT_NODEV, MOUNT_NOEXEC, MOUNT_NOSUID, MOUNT_RDONLY

    return (
        (0 if options.writable else MOUNT_RDONLY)
        | (0 if options.dev else MOUNT_NODEV)
        | (0 if options.suid else MOUNT_NOSUID)
        | (0 if options.executable else MOUNT_NOEXEC)
    )


def absolute_reference(image: str) -> str:
    """`oci:DIR` with an absolute DIR, because the daemon works in another directory. The daemon parses references:
    parsing here would load regular expressions."""
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
