"""An image whose starts read chosen files, and what is attached to it."""

from __future__ import annotations

import random
import shutil
import socket
from pathlib import Path
from typing import NamedTuple

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.profiles import load_profile
from lazyfs.core.oci.digests import Digest
from lazyfs.core.starts.pack import PACK_ARTIFACT_TYPE
from lazyfs.core.starts.profile import Profile
from lazyfs.images.packs import listed_packs, load_head
from lazyfs.indexing.missing import resolved_image, run_async
from lazyfs.indexing.publish import place_to_push
from lazyfs.sources.access import Access
from tests.layertar import LayerTar
from tests.layout import Layout

FILES = 24
FILE_BYTES = 400_000  # two blocks
APPLETS = ("sh", "cat", "echo", "sleep", "nc", "httpd", "true", "mkdir")


def content(number: int) -> bytes:
    return random.Random(number).randbytes(FILE_BYTES)


def make_image(directory: Path) -> Layout:
    """Tag "latest": busybox, and /data/0 to /data/23, in two layers."""
    program = shutil.which("busybox")
    assert program, "install the package busybox-static"
    base, data = LayerTar(), LayerTar()
    for path in ("bin", "etc", "proc", "sys", "dev", "tmp"):
        base.dir(path)
    base.file("bin/busybox", Path(program).read_bytes(), 0o755)
    for applet in APPLETS:
        base.symlink(f"bin/{applet}", "busybox")
    for name in ("hosts", "resolv.conf"):
        base.file(f"etc/{name}")
    data.dir("data")
    for number in range(FILES):
        data.file(f"data/{number}", content(number))
    layout = Layout(directory)
    layers = [layout.add_layer(tar.data()) for tar in (base, data)]
    layout.tag("latest", layout.add_image(layers, {"Env": ["PATH=/bin"], "Cmd": ["sh", "-c", reading(0, 1)]}))
    return layout


def reading(*numbers: int) -> str:
    """A shell command that reads some of the files."""
    return "cat " + " ".join(f"/data/{number}" for number in numbers) + " > /tmp/all"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


class SeenPack(NamedTuple):
    """A pack, as who mounts would find it."""

    size_bytes: int
    starts: int
    files: set[str]  # that it has whole
    profile: Profile


def packs(image: str, cache: Path, repository: str = "") -> list[SeenPack]:
    """The packs of an image in its own repository, or in an index repository; file names as the profile has them in
    `cache`."""
    found: list[SeenPack] = []
    store = CacheDirectory(str(cache))

    async def look() -> None:
        async with resolved_image(store, image, Access()) as resolved, place_to_push(resolved, repository) as place:
            source, name = place
            digest = resolved.manifest_digest
            listed = await source.referrers(digest, PACK_ARTIFACT_TYPE)
            names = _names(store, digest)
            for pack in await listed_packs(source, name, digest, listed):
                head = await load_head(pack)
                has = {key for frame in head.frames for key in head.blocks(frame)}
                files = {path for path, blocks in names.items() if blocks <= has}
                found.append(SeenPack(pack.size_bytes, pack.starts, files, Profile.decode(head.profile)))

    run_async(look)
    return found


def known_starts(layout: Layout, cache: Path) -> int:
    """Of how many starts of the image the cache's profile tells."""
    profile = load_profile(CacheDirectory(str(cache)), Digest(str(layout.resolve("latest")["digest"])))
    return profile.starts if profile is not None else 0


def _names(cache: CacheDirectory, manifest_digest: str) -> dict[str, set[tuple[str, int]]]:
    """The blocks of each file that the cache's profile names."""
    profile = load_profile(cache, Digest(manifest_digest))
    names: dict[str, set[tuple[str, int]]] = {}
    if profile is not None:
        for touch in profile.touches:
            names.setdefault(touch.path.decode(), set()).add((profile.layers[touch.layer], touch.block))
    return names
