"""`lazyfs doctor`: what this host can do, and what to change where it cannot."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lazyfs.cache import places
from lazyfs.control import rundir
from lazyfs.errors import LazyfsError
from lazyfs.system import host
from lazyfs.system.process import SYSTEM_PATH, find_program

MIN_FREE_BYTES = 2 * 10**9
MIN_OPEN_FILES = 4096  # a descriptor per layer device and cache file, three per layer
# Module, its package, whether it is required.
_LIBRARIES = (
    ("trio", "trio", True),
    ("httpx", "httpx", True),
    ("xxhash", "xxhash", True),
    ("pyfuse3", "pyfuse3", False),
    ("isal", "isal", True),
    ("backports.zstd", "backports.zstd", True),
)


class Check(NamedTuple):
    """`status`: ok, warn (something is slower or missing) or fail (images cannot be mounted)."""

    name: str
    status: str
    finding: str
    advice: str = ""


def examine(cache: str | None = None) -> list[Check]:
    """All checks, in order. Never raises for what it finds."""
    parts: tuple[Callable[[], Iterator[Check]], ...] = (
        _python,
        _libraries,
        _inflating,
        _kernel,
        _fuse,
        _trials,
        _containers,
        lambda: _cache(cache),
        _limits,
    )
    found: list[Check] = []
    for part in parts:
        found += part()
    backends = _backends()
    works = " and ".join(backends) or "none"
    advice = "" if backends else "see the advice above"
    found.append(Check("backends", "ok" if backends else "fail", f"{works} for this user", advice))
    return found


def _backends() -> list[str]:
    found = []
    if host.kernel_backend_problem() is None:
        found.append("kernel")
    if host.fuse_problem() is None and _importable("pyfuse3"):
        found.append("fuse")
    return found


def _python() -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Check("python", "ok" if good else "fail", version, "" if good else "install Python 3.11 or later")


def _importable(module: str) -> bool:
    from importlib import import_module

    try:
        import_module(module)
    except Exception:  # a broken binary wheel raises anything
        return False
    return True


def _libraries() -> Iterator[Check]:
    from importlib.metadata import PackageNotFoundError, version

    for module, package, required in _LIBRARIES:
        try:
            number = version(package)
        except PackageNotFoundError:
            number = "present"
        if _importable(module):
            yield Check(f"library {package}", "ok", number)
        elif required:
            yield Check(f"library {package}", "fail", "cannot be imported", f"pip install {package}")
        else:
            advice = "apt install libfuse3-dev pkg-config gcc python3-dev; pip install pyfuse3"
            yield Check(f"library {package}", "warn", "cannot be imported: no backend=fuse", advice)


def _inflating() -> Iterator[Check]:
    """Whether zlib-ng's C functions can be called; if not, the system's zlib serves, at half the speed."""
    from lazyfs.decoding.zstream import zlib_ng

    if zlib_ng() is not None:
        yield Check("library zlib-ng", "ok", "usable")
        return
    wrong = "its package hides the C functions" if _importable("zlib_ng.zlib_ng") else "cannot be imported"
    finding = f"{wrong}: layers are indexed with the system's zlib, at half the speed"
    yield Check("library zlib-ng", "warn", finding, "pip install --force-reinstall zlib-ng (a wheel from PyPI)")


def _kernel() -> Iterator[Check]:
    release = os.uname().release
    version = host.kernel_version()
    if version < host.KERNEL_BACKEND_SINCE:
        yield Check("kernel", "warn", f"Linux {release}: no backend=kernel", "Linux 6.12 or later has it")
    else:
        yield Check("kernel", "ok", f"Linux {release}")
    if version < host.RESEND_SINCE:
        advice = "with Linux 6.9 or later, reads survive a daemon that dies"
        yield Check("daemon recovery", "warn", "the kernel cannot repeat requests", advice)
    else:
        yield Check("daemon recovery", "ok", "reads survive a daemon that dies")
    for name, use in (("erofs", "backend=kernel"), ("fuse", "every backend"), ("overlay", "-o rw")):
        if host.has_filesystem(name):
            yield Check(f"file system {name}", "ok", "present")
        else:
            status = "fail" if name == "fuse" else "warn"
            yield Check(f"file system {name}", status, f"missing: needed by {use}", f"modprobe {name}")
    if host.is_root():
        yield Check("privileges", "ok", "root")
    elif os.geteuid() == 0:
        yield Check(
            "privileges", "warn", "root of a container: backend=fuse only, if at all", "run it on the host"
        )
    else:
        yield Check(
            "privileges",
            "ok",
            "ordinary user: backend=fuse, read-only",
            "root also has backend=kernel and rw",
        )


def _fuse() -> Iterator[Check]:
    if os.path.exists("/dev/fuse"):
        yield Check("/dev/fuse", "ok", "present")
    else:
        yield Check("/dev/fuse", "fail", "missing", "modprobe fuse; in a container, give it the device")
    program = find_program("fusermount3", also=SYSTEM_PATH)
    if program is None:
        status = "warn" if host.is_root() else "fail"
        yield Check("fusermount3", status, "missing: needed by users other than root", "apt install fuse3")
    else:
        set_id = os.stat(program).st_mode & 0o4000
        status, finding = ("ok", program) if set_id else ("warn", f"{program} is not set-uid root")
        yield Check("fusermount3", status, finding, "" if set_id else f"chmod u+s {program}")
    if host.users_may_allow_other():
        yield Check("user_allow_other", "ok", "set in /etc/fuse.conf")
    else:
        advice = "for -o allow_other by users other than root: add user_allow_other to /etc/fuse.conf"
        yield Check(
            "user_allow_other", "ok" if host.is_root() else "warn", "not set in /etc/fuse.conf", advice
        )


def _trials() -> Iterator[Check]:
    """Really mounts a tiny EROFS from a file, and an overlay on it; both detached, so nothing can be left."""
    if not host.is_root() or host.kernel_version() < host.KERNEL_BACKEND_SINCE:
        return
    from lazyfs.core.erofs.writer import write_erofs
    from lazyfs.core.tar.kinds import Kind
    from lazyfs.core.tar.tree import Node
    from lazyfs.system.detached import erofs_mount_detached, overlay_mount_detached

    root = Node(Kind.DIR, 0o755, 0, 0, 0, 0, children={}, nlink=2)
    with tempfile.TemporaryDirectory(prefix="lazyfs-doctor-") as directory:
        image = os.path.join(directory, "image.erofs")
        with open(image, "wb") as file:
            file.write(write_erofs(root, []))
        try:
            fd = erofs_mount_detached(image, [], directio=False)
        except LazyfsError as error:
            advice = "backend=fuse works without; the kernel needs CONFIG_EROFS_FS_BACKED_BY_FILE"
            yield Check("EROFS from a file", "fail", error.message, advice)
            return
        yield Check("EROFS from a file", "ok", "mounted one")
        try:
            upper, work = os.path.join(directory, "upper"), os.path.join(directory, "work")
            os.mkdir(upper)
            os.mkdir(work)
            os.close(overlay_mount_detached(fd, upper, work, ("index=off",)))
            yield Check("overlay on it", "ok", "mounted one")
        except LazyfsError as error:
            yield Check(
                "overlay on it",
                "warn",
                error.message,
                f"-o rw needs it; is {tempfile.gettempdir()} an overlay?",
            )
        finally:
            os.close(fd)


def _containers() -> Iterator[Check]:
    program = find_program("runc", also=SYSTEM_PATH)
    if program is None:
        yield Check("runc", "warn", "missing: needed by `lazyfs run`", "apt install runc")
    else:
        yield Check("runc", "ok", program)


def _cache(chosen: str | None) -> Iterator[Check]:
    try:
        cache = places.cache_directory(chosen)
        with tempfile.TemporaryFile(dir=cache) as file:
            file.write(b"x")
    except LazyfsError as error:
        yield Check("cache directory", "fail", error.message, error.hint)
        return
    except OSError as error:
        yield Check(
            "cache directory", "fail", f"cannot write: {error.strerror}", "check the disk, or -o cache=DIR"
        )
        return
    space = os.statvfs(cache)
    free_bytes = space.f_bavail * space.f_frsize
    from lazyfs.commands.report import human_bytes

    finding = f"{cache}, {human_bytes(free_bytes)} free"
    if free_bytes < MIN_FREE_BYTES:
        yield Check("cache directory", "warn", finding, "lazyfs cache gc --max-size SIZE, or -o cache=DIR")
    else:
        yield Check("cache directory", "ok", finding)
    try:
        yield Check("runtime directory", "ok", rundir.runtime_directory(cache))
    except LazyfsError as error:
        yield Check("runtime directory", "fail", error.message, error.hint)


def _limits() -> Iterator[Check]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    if hard != resource.RLIM_INFINITY and hard < MIN_OPEN_FILES:
        yield Check("open files", "warn", f"limit {soft}, at most {shown}", f"ulimit -Hn {MIN_OPEN_FILES}")
    else:
        yield Check("open files", "ok", f"limit {soft}, at most {shown}")
