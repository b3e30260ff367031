"""`make demo`: the main job on this machine alone, without an outside registry.

A Debian image with python3 and nodejs goes to a local docker-registry by skopeo, is indexed, mounted lazily
and run with runc, and the same image is pulled and unpacked whole by containerd, to compare.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks import command, host, image
from benchmarks.attached import index_bytes
from benchmarks.command import Lazyfs
from benchmarks.containers import MANY_IMPORTS
from tests.layout import push
from tests.servers import RegistryServer

REPOSITORY = "demo/python-node"
PROGRAM = f"import {MANY_IMPORTS}; print('Python', platform.python_version(), 'with', ssl.OPENSSL_VERSION)"


def main() -> int:
    argparse.ArgumentParser(prog="make demo", description=__doc__).parse_args()
    if os.geteuid() != 0:
        print("make demo mounts file systems and starts containers: run it as root", file=sys.stderr)
        return 1
    say("1. Build an image of Debian, python3 and nodejs from packages (kept for the next time)")
    picture = image.interpreters()
    sizes = f"{mb(picture.tar_bytes)}, {mb(picture.compressed_bytes)} compressed"
    print(f"   {sizes}, {picture.entries:,} entries")
    with host.work_directory() as directory, RegistryServer(directory / "registry") as registry:
        reference = f"{registry.host}/{REPOSITORY}:{image.TAG}"
        say(f"2. Push it with skopeo to a local docker-registry: {reference}")
        push(picture.layout, image.TAG, reference)
        say("3. lazyfs index --push: build its index and attach it in the registry")
        _, seconds = command.index(reference, directory / "indexing")
        size = index_bytes(registry.url, reference)
        share = size / picture.compressed_bytes
        print(f"   {seconds:.1f} s, {size / 1e3:,.0f} kB, {share:.2%} of the compressed image")
        compare(directory, reference, picture)
    return 0


def compare(directory: Path, reference: str, picture: image.BenchmarkImage) -> None:
    say("4. Full pull: ctr image pull, containerd with overlayfs")
    with host.Containerd(directory / "containerd") as containerd:
        host.drop_page_cache()
        pull_s = containerd.pull(reference)
        print(f"   {pull_s:.2f} s until a container could start; {mb(picture.compressed_bytes)} fetched")
    lazyfs, target = Lazyfs(directory / "cache"), directory / "root"
    say("5. lazyfs mount, then python3 with imports by lazyfs run (runc)")
    host.drop_page_cache()
    mount_s = lazyfs.mount(reference, target)
    try:
        command_words = ("python3", "-c", PROGRAM)
        started_s = elapsed(lazyfs, reference, command_words)
        counters = lazyfs.stats(target)
        warm_s = elapsed(lazyfs, reference, command_words, quiet=True)
    finally:
        lazyfs.umount(target)
        lazyfs.wait_until_ended()
    fetched = int(counters["bytes_fetched"])
    say("What it took")
    print(f"   {'':24} {'time':>8} {'fetched':>10}")
    print(f"   {'full pull and unpack':24} {pull_s:6.2f} s {mb(picture.compressed_bytes):>10}")
    print(f"   {'lazyfs mount':24} {mount_s:6.2f} s {'':>10}  {pull_s / mount_s:.0f} times faster")
    print(f"   {'  + first container':24} {started_s:6.2f} s {mb(fetched):>10}  ", end="")
    print(f"{fetched / picture.compressed_bytes:.1%} of the image, {counters['requests']} requests")
    print(f"   {'  + second container':24} {warm_s:6.2f} s {mb(0):>10}")


def elapsed(lazyfs: Lazyfs, reference: str, words: tuple[str, ...], quiet: bool = False) -> float:
    """Seconds of `lazyfs run`; prints what the container printed."""
    started = host.now()
    output = lazyfs.run_container(reference, *words)
    seconds = host.now() - started
    if not quiet:
        print(f"   the container says: {output.strip()}")
    return seconds


def say(text: str) -> None:
    print(text, flush=True)


def mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
