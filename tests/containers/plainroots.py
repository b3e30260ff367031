"""Containers without images: the root is a directory, under an overlay as `lazyfs run` has it.

Also a program, so that signals can be sent to it: ``python -m tests.containers.plainroots TEMPLATE STATE ARG...``
runs ``lazyfs run ARG...`` with TEMPLATE/root as the image's root, TEMPLATE/config.json as its configuration,
and containers' directories below STATE.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from lazyfs.commands.arguments import parser
from lazyfs.commands.containers import run_request, say
from lazyfs.containers.bundle import MountedImage, RootProvider
from lazyfs.containers.run import run
from lazyfs.containers.store import ContainerStore
from lazyfs.core.oci.documents import parse_config
from lazyfs.errors import HostError, LazyfsError
from lazyfs.mounting.options import MountOptions
from lazyfs.system.mountinfo import mount_at


class PlainRoots:
    """A RootProvider over TEMPLATE/root. `detached` counts, so that tests see a clean-up."""

    def __init__(self, template: Path) -> None:
        self.template = template
        self.detached = 0

    def attach(self, image: str, target: str, options: MountOptions) -> MountedImage:
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
        return mounted_image(self.template)

    def detach(self, target: str) -> None:
        self.detached += 1
        if mount_at(target) is not None:
            subprocess.run(["umount", target], check=True)


def mounted_image(template: Path) -> MountedImage:
    config = parse_config((template / "config.json").read_bytes())
    return MountedImage(config, "sha256:" + "ab" * 32, "plain:image")


def run_plainly(arguments: list[str], state: Path, roots: RootProvider) -> int:
    """`lazyfs run` with these arguments."""
    args = parser(["run"]).parse_args(["run", *arguments])
    return run(run_request(args), ContainerStore(str(state)), roots, say)


def main(template: str, state: str, *arguments: str) -> int:
    try:
        return run_plainly(list(arguments), Path(state), PlainRoots(Path(template)))
    except LazyfsError as error:
        print(f"lazyfs: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
