"""Kernel settings that no mount option sets: read-ahead, and the number of background reads of a FUSE mount.

Both only improve speed: what cannot be set stays at the kernel's default and is logged once.
"""

from __future__ import annotations

import logging
import os

from lazyfs.errors import HostError
from lazyfs.system.mountapi import fsconfig_create, fsmount, fsopen

log = logging.getLogger(__name__)

_BDI = "/sys/class/bdi"
_CONNECTIONS = "/sys/fs/fuse/connections"


def set_read_ahead(dev: tuple[int, int], kibibytes: int) -> bool:
    """Sets the mount's read-ahead, which only root may do. Returns whether it was set."""
    return _write(f"{_BDI}/{dev[0]}:{dev[1]}/read_ahead_kb", kibibytes)


def erofs_devices() -> set[str]:
    """Names of the backing-device entries of all EROFS mounts on files. A name does not say which mount it is."""
    try:
        return {name for name in os.listdir(_BDI) if name.startswith("erofs-")}
    except OSError:
        return set()


def set_erofs_read_ahead(name: str, kibibytes: int) -> bool:
    """Sets the read-ahead of one of `erofs_devices`. Returns whether it was set."""
    return _write(f"{_BDI}/{name}/read_ahead_kb", kibibytes)


def set_max_background(dev: tuple[int, int], requests: int) -> bool:
    """Lets the kernel have `requests` page-cache reads in flight instead of 12: when 12 wait for a slow registry, reads
    of cached data queue behind them. The mount's owner may set it where the fusectl file system is mounted (systemd
    does so); root may set it anywhere. Returns whether it was set."""
    connection = os.minor(os.makedev(*dev))
    if os.path.isdir(f"{_CONNECTIONS}/{connection}"):
        return _set_background(f"{_CONNECTIONS}/{connection}", requests)
    try:
        context_fd = fsopen("fusectl")
        try:
            fsconfig_create(context_fd, "fusectl")
            mount_fd = fsmount(context_fd)
        finally:
            os.close(context_fd)
    except HostError as error:
        log.info("background reads stay at the kernel's default: %s", error.message)
        return False
    try:
        return _set_background(f"/proc/self/fd/{mount_fd}/{connection}", requests)
    finally:
        os.close(mount_fd)


def _set_background(directory: str, requests: int) -> bool:
    # Above the threshold the kernel stops reading ahead. Three quarters is its own default, too.
    return _write(f"{directory}/max_background", requests) and _write(
        f"{directory}/congestion_threshold", requests * 3 // 4
    )


def _write(path: str, value: int) -> bool:
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(str(value))
    except OSError as error:
        log.info("%s is not set to %d: %s", path, value, error.strerror)
        return False
    return True
