"""Containers on three kinds of root, started by runc with one config: lazyfs, ext4, overlayfs on ext4."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.command import Lazyfs
from benchmarks.host import run, timed

# What a script of some size imports; and what a network client does, which loads OpenSSL and SQLite, too.
IMPORTS = "json, logging, pathlib, platform, re, subprocess"
MANY_IMPORTS = (
    "asyncio, email.message, http.client, json, platform, sqlite3, ssl, urllib.request, xml.dom.minidom"
)
PYTHON_START = ("python3", "-c", f"import {IMPORTS}; print(platform.python_version())")
PYTHON_LONG_START = ("python3", "-c", f"import {MANY_IMPORTS}; print(platform.python_version())")
_names = itertools.count()


def start(bundle: Path) -> float:
    """Seconds of `runc run` until the container has ended."""
    state = bundle.parent / "runc"
    return timed("runc", "--root", state, "run", "--bundle", bundle, f"lazyfs-bench-{next(_names)}")


@contextlib.contextmanager
def lazy_bundle(lazyfs: Lazyfs, reference: str, bundle: Path) -> Iterator[Path]:
    """A bundle by `lazyfs bundle`, its root mounted."""
    run(lazyfs.program, "bundle", "-o", lazyfs.options(), reference, bundle, *PYTHON_START)
    try:
        yield bundle
    finally:
        lazyfs.umount(bundle / "rootfs")


def plain_bundle(template: Path, bundle: Path, root: Path) -> Path:
    """A bundle like `template`, on another root."""
    bundle.mkdir()
    config = json.loads((template / "config.json").read_bytes())
    config["root"]["path"] = str(root)
    (bundle / "config.json").write_text(json.dumps(config))
    return bundle


@contextlib.contextmanager
def overlay(lower: Path, directory: Path) -> Iterator[Path]:
    """overlayfs on `lower`, as containerd's snapshotter mounts it."""
    for name in ("upper", "work", "merged"):
        (directory / name).mkdir(parents=True)
    merged = directory / "merged"
    options = f"lowerdir={lower},upperdir={directory}/upper,workdir={directory}/work"
    run("mount", "-t", "overlay", "overlay", "-o", options, merged)
    try:
        yield merged
    finally:
        run("umount", merged)


def ext4_copy(tar: Path, directory: Path) -> Path:
    """The image's root unpacked by GNU tar."""
    directory.mkdir()
    run("tar", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", tar, "-C", directory)
    return directory
