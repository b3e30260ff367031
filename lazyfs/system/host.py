"""What this host can do, as far as a few reads of /proc show: the cheap checks that `mount` makes.

`lazyfs doctor` (commands/doctor.py) makes them, too, and tries things out.
"""

from __future__ import annotations

import os

from lazyfs.system.process import SYSTEM_PATH, find_program

KERNEL_BACKEND_SINCE = (6, 12)  # EROFS from files, without loop devices
RESEND_SINCE = (6, 9)  # FUSE_NOTIFY_RESEND: the daemon may die without a read failing
CAP_SYS_ADMIN = 21  # include/uapi/linux/capability.h


def kernel_version() -> tuple[int, int]:
    major, _, rest = os.uname().release.partition(".")
    minor = ""
    for character in rest:
        if not character.isdigit():
            break
        minor += character
    return (int(major), int(minor)) if major.isdigit() and minor else (0, 0)


def is_root() -> bool:
    """Whether this process may mount in the initial user namespace."""
    return os.geteuid() == 0 and _effective_capability(CAP_SYS_ADMIN) and _in_initial_user_namespace()


def _effective_capability(number: int) -> bool:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("CapEff:"):
                    return bool(int(line.split()[1], 16) >> number & 1)
    except (OSError, ValueError, IndexError):
        pass
    return False


def _in_initial_user_namespace() -> bool:
    try:
        with open("/proc/self/uid_map", encoding="ascii", errors="replace") as file:
            return file.read().split() == ["0", "0", "4294967295"]
    except OSError:
        return True  # a kernel without user namespaces


def has_filesystem(name: str) -> bool:
    """Whether the kernel has file system `name`, or a module for it."""
    try:
        with open("/proc/filesystems", encoding="ascii", errors="replace") as file:
            if any(line.split()[-1:] == [name] for line in file):
                return True
    except OSError:
        pass
    release = os.uname().release
    for directory in ("/lib/modules", "/usr/lib/modules"):
        try:
            with open(f"{directory}/{release}/modules.dep", encoding="ascii", errors="replace") as file:
                if any(line.partition(":")[0].rpartition("/")[2].startswith(f"{name}.ko") for line in file):
                    return True
        except OSError:
            continue
    return False


def kernel_backend_problem() -> tuple[str, str] | None:
    """Why backend=kernel cannot work here, and what to do; None if no reason was found."""
    if not is_root():
        return "the kernel backend needs root", "run as root, or use backend=fuse"
    if kernel_version() < KERNEL_BACKEND_SINCE:
        return (
            f"the kernel backend needs Linux 6.12, this is {os.uname().release}",
            "use backend=fuse, or a newer kernel",
        )
    if not has_filesystem("erofs"):
        return "this kernel has no EROFS", "modprobe erofs, or use backend=fuse"
    return fuse_problem()


def fuse_problem() -> tuple[str, str] | None:
    """Why no FUSE file system can be mounted here, and what to do; None if no reason was found."""
    if not has_filesystem("fuse"):
        return "this kernel has no FUSE", "modprobe fuse"
    if not os.path.exists("/dev/fuse"):
        return "/dev/fuse is missing", "modprobe fuse; in a container, give it the device /dev/fuse"
    if not is_root():
        if find_program("fusermount3", also=SYSTEM_PATH) is None:
            return "fusermount3 is missing", "install the package fuse3"
        if not os.access("/dev/fuse", os.R_OK | os.W_OK):
            return "you may not open /dev/fuse", "as root: chmod 666 /dev/fuse"
    return None


def users_may_allow_other(configuration: str = "/etc/fuse.conf") -> bool:
    """Whether fusermount3 grants allow_other to ordinary users (fusermount3(1))."""
    try:
        with open(configuration, encoding="utf-8", errors="replace") as file:
            return any(line.strip() == "user_allow_other" for line in file)
    except OSError:
        return False
