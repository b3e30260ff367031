"""Containers without images: the root is a directory, under an overlay as `lazyfs run` has it.

Also a program, so that signals can be sent to it: ``python -m tests.containers.plainroots TEMPLATE STATE ARG...``
runs ``lazyfs run ARG...`` with TEMPLATE/root as the image's root, TEMPLATE/config.json as its configuration,
and containers' directories below STATE.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

from lazyfs.containers import run
from lazyfs.core.oci.documents import ImageConfig, parse_config
from lazyfs.errors import HostError, LazyfsError
from lazyfs.mounting.options import MountOptions
from lazyfs.system.mountinfo import mount_at


class PlainRoots:
    """A RootProvider over TEMPLATE/root. `detached` counts, so that tests see a clean-up."""

    def __init__(self, template: Path) -> None:
        self.template = template
        self.detached = 0

    def attach(self, image: str, target: str, options: MountOptions) -> ImageConfig:
        if image == "missing":
            raise HostError("there is no such image")
        if image == "slow":
            print("attaching", flush=True)
            signal.pause()
        lower = self.template / "root"
        if options.writable:
            # an upper that nobody named lies beside the mount, to go with the bundle
            upper = Path(options.upperdir or f"{target}.upper")
            work = Path(options.workdir or f"{target}.work")
            upper.mkdir(exist_ok=True)
            work.mkdir(exist_ok=True)
            layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
            command = ["mount", "-t", "overlay", "-o", layers, "overlay", target]
        else:
            command = ["mount", "--bind", "-o", "ro", str(lower), target]
        subprocess.run(command, check=True)
        return parse_config((self.template / "config.json").read_bytes())

    def detach(self, target: str) -> None:
        self.detached += 1
        if mount_at(target) is not None:
            subprocess.run(["umount", target], check=True)


def run_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.add_run_arguments(parser)
    return parser.parse_args(arguments)


def main(template: str, state: str, *arguments: str) -> int:
    run.containers_directory = lambda: state
    try:
        return run.run(run_arguments(list(arguments)), PlainRoots(Path(template)))
    except LazyfsError as error:
        print(f"lazyfs: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
