"""The client's side of a mount: asks a daemon for the root of an image and attaches it.

    kernel          the cache's daemon hands out a detached EROFS mount
    fuse, root      a fusemount process mounts at a private place, a detached clone of which is taken; a later
                    mount of the image clones the first one's (same superblock, same process)
    fuse, user      a fusemount process mounts at the target itself, by fusermount3

What is detached ends with this process, so an interrupted mount leaves nothing. An overlay for `rw` is put on
it, and only the finished root appears at the target.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from lazyfs import control, host, launch, paths
from lazyfs.control import Connection, DaemonGone
from lazyfs.errors import HostError, LazyfsError, UserError
from lazyfs.launch import StartError
from lazyfs.options import MountOptions

SILENCE_ALLOWANCE_S = 30.0  # beyond timeout=, until a silent daemon is given up

Progress = Callable[[str], None]


class AlreadyMounted(UserError):
    exit_code = 32  # what mount(8) says of EBUSY


class Mounted(NamedTuple):
    """A mount that is in place."""

    image: str  # canonical reference
    manifest_digest: str
    target: str  # real path
    backend: str  # kernel or fuse
    joined: bool  # shares an earlier mount's superblock
    dev: tuple[int, int]
    ephemeral_upper: str | None


class _Root(NamedTuple):
    """An image's root, not yet attached. `fd` is None if the fuse process mounted at the target itself."""

    fd: int | None
    connection: Connection
    reply: dict[str, Any]
    backend: str
    joined: bool


def mount(
    image: str,
    target: str,
    options: MountOptions,
    *,
    push_index: bool = False,
    namespace: str | None = None,
    on_progress: Progress | None = None,
    on_attached: Callable[[Mounted], None] | None = None,
) -> Mounted:
    """Mounts `image` at the directory `target` and returns when the root is usable. `namespace`: a mount
    namespace file to enter before attaching (the process then stays in it). `on_attached` is told as soon as
    the mount is there, with no signal in between. Raises LazyfsError."""
    image = absolute_reference(image)
    backend = choose_backend(options, namespace)
    if namespace is None:
        target = check_target(target)
    cache = paths.cache_directory(options.cache)
    runtime = paths.runtime_directory(cache)
    job = _Job(image, target, options, cache, runtime, push_index, on_progress or _ignore, on_attached)
    root = _kernel_root_or_fuse(job) if backend == "kernel" else _any_fuse_root(job)
    try:
        return _finish(job, root, namespace)
    finally:
        root.connection.close()
        if root.fd is not None:
            os.close(root.fd)


class _Job(NamedTuple):
    image: str
    target: str
    options: MountOptions
    cache: str
    runtime: str
    push_index: bool
    progress: Progress
    on_attached: Callable[[Mounted], None] | None

    def request(self) -> dict[str, Any]:
        options = self.options
        return {
            "image": self.image,
            "options": {
                "offline": options.offline,
                "insecure": options.insecure,
                "timeout_s": options.timeout_s,
                "platform": options.platform,
                "ca_files": list(options.ca_files),
                "auth_files": list(options.auth_files) or None,
                "push_index": self.push_index,
            },
            "home": control.environment_home(os.environ),
        }

    def silence_s(self) -> float:
        return self.options.timeout_s + SILENCE_ALLOWANCE_S


def _ignore(_: str) -> None:
    pass


def absolute_reference(image: str) -> str:
    """`oci:DIR` with an absolute DIR: the daemon works in another directory."""
    if image.startswith("oci:") and len(image) > 4:
        return "oci:" + os.path.normpath(os.path.join(os.getcwd(), image[4:]))
    return image


def choose_backend(options: MountOptions, namespace: str | None = None) -> str:
    """ "kernel" or "fuse". Raises UserError or HostError if what was asked for cannot be had."""
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
        raise HostError("rw needs overlayfs, which this kernel lacks", "modprobe overlay, or mount read-only")
    if options.backend != "fuse":
        problem = host.kernel_backend_problem()
        if problem is None:
            return "kernel"
        if options.backend == "kernel":
            raise HostError(*problem)
    problem = host.fuse_problem()
    if problem is not None:
        raise HostError(*problem)
    return "fuse"


def check_target(target: str) -> str:
    """The real path of a directory that can be mounted on. Raises UserError, AlreadyMounted."""
    path = os.path.realpath(target)
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        os.close(fd)
        covered = os.path.ismount(path)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise UserError(
                f"{target} is a mount whose daemon has died", f"lazyfs umount --lazy {target}"
            ) from None
        raise UserError(f"cannot mount on {target}: {error.strerror}", "give an existing directory") from None
    if covered:
        from lazyfs import unmount  # rare: most targets are plain directories

        if unmount.find(path) is not None:
            raise AlreadyMounted(f"{target} is already a lazyfs mount", f"lazyfs umount {target}")
    return path


# -- getting a root --------------------------------------------------------------------------------------


def _until_indexed(job: _Job, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer of `ask`, after having built the index that it says is missing."""
    reply = ask()
    if reply.get("needs_index") is not True:
        return reply
    if job.options.offline:
        raise UserError(
            f"{job.image} has no index, and offline forbids to build one", "mount it once without offline"
        )
    job.progress(f"{job.image} has no index: reading its layers once (`lazyfs index --push` attaches one)")
    from lazyfs.commands import build_missing_index

    build_missing_index(job.image, job.options, job.push_index, quiet=job.progress is _ignore)
    reply = ask()
    if reply.get("needs_index") is True:
        raise HostError(
            f"the index of {job.image} was built, but the daemon does not find it", "check the cache's disk"
        )
    return reply


def _kernel_root(job: _Job) -> _Root:
    connection: Connection | None = None

    def ask() -> dict[str, Any]:
        nonlocal connection
        request = {"op": "mount", **job.request()}
        for attempt in (1, 2, 3):
            if connection is not None:
                connection.close()
            connection = launch.connect_or_start(job.cache, job.runtime)
            try:
                return connection.ask(request, job.silence_s(), job.progress)
            except DaemonGone:  # it was just ending, or was killed: the next one answers
                if attempt == 3:
                    raise
        raise AssertionError("unreachable")

    try:
        reply = _until_indexed(job, ask)
        assert connection is not None
        return _Root(connection.take_fd(), connection, reply, "kernel", reply.get("joined") is True)
    except BaseException:
        if connection is not None:
            connection.close()
        raise


def _kernel_root_or_fuse(job: _Job) -> _Root:
    try:
        return _kernel_root(job)
    except HostError as error:
        # Only what the daemon itself reports of this host (no file-backed EROFS, say), not its absence.
        if job.options.backend != "auto" or type(error) is not HostError:
            raise
        job.progress(f"the kernel backend failed ({error.message}): trying backend=fuse")
        try:
            return _any_fuse_root(job)
        except LazyfsError:
            raise error from None


def _any_fuse_root(job: _Job) -> _Root:
    return _fuse_root(job) if host.is_root() else _start_fuse(job, job.target)


def _start_fuse(job: _Job, place: str) -> _Root:
    """A fusemount process that serves at `place`; the mount is there when this returns."""
    connection: Connection | None = None
    process: launch.Child | None = None

    def ask() -> dict[str, Any]:
        nonlocal connection, process
        if connection is not None and process is not None:
            connection.close()
            process.end()
        connection, process = launch.start_fusemount(job.cache, job.runtime, job.image, place)
        request = {
            "op": "fuse_mount",
            **job.request(),
            "target": place,
            # Root's mounts are for everybody, as those of the kernel backend are; modes are checked.
            "allow_other": job.options.allow_other or host.is_root(),
            "exec": job.options.executable,
        }
        try:
            return connection.ask(request, job.silence_s(), job.progress)
        except DaemonGone:
            log = paths.log_file(job.runtime)
            raise StartError(
                f"the fuse process ended: {launch.last_words(log) or 'it said nothing'}", f"see {log}"
            ) from None

    try:
        reply = _until_indexed(job, ask)
    except BaseException:
        if connection is not None:
            connection.close()  # it ends by that; but it may hang
        if process is not None and process.poll() is None:
            process.end()
        raise
    assert connection is not None and process is not None
    return _Root(None, connection, reply, "fuse", False)


def _fuse_root(job: _Job) -> _Root:
    from lazyfs.linux import MNT_DETACH, open_tree_clone, umount2

    joined = _join_fuse(job)
    if joined is not None:
        return joined
    place = os.path.join(job.runtime, f"root-{os.urandom(8).hex()}")
    os.mkdir(place, 0o700)
    try:
        root = _start_fuse(job, place)
        try:
            fd = open_tree_clone(place)
            umount2(place, MNT_DETACH)
        except BaseException:
            root.connection.close()
            raise
        return root._replace(fd=fd)
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(place)  # a mount that never came off is the fusemount process's to remove


def _join_fuse(job: _Job) -> _Root | None:
    """A detached clone of an attached fuse mount of the same image, if there is one."""
    from lazyfs.core.reference import parse_reference

    wanted = str(parse_reference(job.image))
    for path in paths.fuse_sockets(job.runtime):
        connection: Connection | None = None
        try:
            connection = Connection.open(path, 2.0)
            for entry in connection.ask({"op": "list"}, 5.0).get("mounts", []):
                if entry.get("image") == wanted and entry.get("platform") == job.options.platform:
                    fd = _clone_of(control.parse_dev(entry.get("dev")))
                    if fd is not None:
                        return _Root(fd, connection, entry, "fuse", True)
        except DaemonGone:
            paths.remove_dead_socket(path)
        except (LazyfsError, AttributeError, TypeError):
            pass  # it is ending, or talks another version: a new process serves us
        if connection is not None:
            connection.close()
    return None


def _dev_of(place: int | str) -> tuple[int, int]:
    device = os.stat(place).st_dev
    return os.major(device), os.minor(device)


def _clone_of(dev: tuple[int, int]) -> int | None:
    """A detached clone of any mount of the file system `dev`; None if there is none to be seen."""
    from lazyfs.linux import open_tree_clone
    from lazyfs.mountinfo import mounts

    for entry in mounts():
        if entry.dev == dev and entry.root == "/":
            try:
                fd = open_tree_clone(entry.mountpoint)
            except HostError:
                continue
            if _dev_of(fd) == dev:  # else something lies over it
                return fd
            os.close(fd)
    return None


# -- putting it in place ---------------------------------------------------------------------------------


def _attributes(options: MountOptions) -> int:
    from lazyfs.linux import MOUNT_NODEV, MOUNT_NOEXEC, MOUNT_NOSUID, MOUNT_RDONLY

    return (
        (0 if options.writable else MOUNT_RDONLY)
        | (0 if options.dev else MOUNT_NODEV)
        | (0 if options.suid else MOUNT_NOSUID)
        | (0 if options.executable else MOUNT_NOEXEC)
    )


def _finish(job: _Job, root: _Root, namespace: str | None) -> Mounted:
    if root.fd is None:
        mounted = _mounted(job, root, job.target, _dev_of(job.target), None)
        if job.on_attached is not None:
            job.on_attached(mounted)
        _report(job, root, mounted)
        return mounted
    from lazyfs.linux import MNT_DETACH, mount_setattr, umount2

    upper = None
    top_fd = root.fd
    try:
        if job.options.writable:
            from lazyfs import uppers

            upper = uppers.prepare_upper(job.options, job.cache, root.fd)
            top_fd = uppers.overlay(root.fd, upper, _attributes(job.options))
        else:
            mount_setattr(root.fd, _attributes(job.options))
        target = job.target
        if namespace is not None:
            enter_mount_namespace(namespace)
            target = check_target(target)
        mounted = _mounted(job, root, target, _dev_of(top_fd), upper.ephemeral if upper else None)
        _attach(top_fd, mounted, job.on_attached)
        try:
            _report(job, root, mounted)
        except BaseException:
            umount2(target, MNT_DETACH)
            raise
        return mounted
    except BaseException:
        if top_fd != root.fd:
            os.close(top_fd)
            top_fd = root.fd
        if upper is not None:
            uppers.discard(upper)
        raise
    finally:
        if top_fd != root.fd:
            os.close(top_fd)


def _mounted(job: _Job, root: _Root, target: str, dev: tuple[int, int], ephemeral: str | None) -> Mounted:
    return Mounted(
        image=str(root.reply.get("image") or job.image),
        manifest_digest=str(root.reply.get("manifest_digest") or ""),
        target=target,
        backend=root.backend,
        joined=root.joined,
        dev=dev,
        ephemeral_upper=ephemeral,
    )


def _attach(fd: int, mounted: Mounted, on_attached: Callable[[Mounted], None] | None) -> None:
    """Attaches `fd`. Whoever wants to know of it does before a signal can end us."""
    from lazyfs.detached import attach

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


def _report(job: _Job, root: _Root, mounted: Mounted) -> None:
    """Tells the daemon where the mount is: from then on it lives by that, not by our connection."""
    attached = {
        "dev": control.format_dev(mounted.dev),
        "target": mounted.target,
        "ephemeral_upper": mounted.ephemeral_upper,
        "image_dev": control.format_dev(mounted.dev if root.fd is None else _dev_of(root.fd)),
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


def enter_mount_namespace(path: str) -> None:
    """Moves this (single-threaded) process into the mount namespace `path`, e.g. /proc/PID/ns/mnt, or that
    of process `path`, a number. Raises UserError, HostError."""
    import ctypes

    from lazyfs.linux import CLONE_NEWNS

    if path.isdecimal():
        path = f"/proc/{path}/ns/mnt"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(
            f"cannot open the namespace {path}: {error.strerror}", "give /proc/PID/ns/mnt"
        ) from None
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNS) != 0:
            raise HostError(
                f"cannot enter the namespace {path}: {os.strerror(ctypes.get_errno())}", "run as root"
            )
    finally:
        os.close(fd)
