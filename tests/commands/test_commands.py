"""`lazyfs index`, `inspect` and `cache` as processes, with and without --json."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.core.index.imageindex import ImageIndex, encode_image
from lazyfs.indexing.packs import improve_pack
from tests.cache.cachelayers import entry, make_layer
from tests.indexing.localimages import big_layer, indexed, resolved, small_layer, write_image
from tests.indexing.somestarts import some_starts
from tests.layertar import LayerTar
from tests.layout import push
from tests.servers import RegistryServer

Lazyfs = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(lazyfs: Lazyfs, tmp_path: Path) -> Callable[..., Any]:
    """The command with a cache of its own; its JSON if it prints some."""

    def command(*words: str, check: bool = True) -> Any:
        option = (
            ["--cache", str(tmp_path / "store")] if words[0] == "cache" else ["-o", f"cache={tmp_path}/store"]
        )
        result = lazyfs(*words, *option, check=check)
        return json.loads(result.stdout) if check and "--json" in words else result

    return command


def test_index_inspect_and_push(run: Callable[..., Any], registry: RegistryServer, tmp_path: Path) -> None:
    write_image(tmp_path / "image", [big_layer(), small_layer()])
    image = f"{registry.host}/commands/pushed:latest"
    push(tmp_path / "image", "latest", image)
    before = run("inspect", image, "--json")
    assert before["index"] == "none" and before["platform"].startswith("linux/")
    assert [layer["content_root"] for layer in before["layers"]] == [None, None]
    made = run("index", image, "--push", "--json", "--output", str(tmp_path / "out"))
    assert made["tar_bytes"] == len(big_layer()) + len(small_layer())
    assert made["artifact_digest"] == made["output_digest"]
    assert made["manifest_digest"] == before["manifest_digest"]
    after = run("inspect", image, "--json")
    assert after["index"] == "in the cache"
    assert [layer["compression"] for layer in after["layers"]] == ["gzip", "gzip"]
    run("cache", "prune")
    assert run("inspect", image, "--json")["index"] == "attached"
    text = run("inspect", image).stdout
    assert "index     in the cache" in text and "gzip" in text
    assert "attached as sha256:" in run("index", image, "--push").stdout


def attach_pack(maker: CacheDirectory, image: str, *profiles: range) -> None:
    """As a host does that has the image whole: starts that touch these blocks, each told by a pack of its own."""

    async def work() -> None:
        built, _ = await indexed(maker, image, fill=True)
        async with resolved(maker, image) as it:
            for blocks in profiles:
                await improve_pack(maker, it, some_starts(built, blocks))

    trio.run(work)


def test_index_keeps_the_pack_that_inspect_shows(
    run: Callable[..., Any], registry: RegistryServer, tmp_path: Path
) -> None:
    write_image(tmp_path / "image", [big_layer(), small_layer()])
    image = f"{registry.host}/commands/packed:latest"
    push(tmp_path / "image", "latest", image)
    assert run("inspect", image, "--json")["pack"] is None
    assert "pack      none (lazyfs record --push attaches one)" in run("inspect", image).stdout
    run("index", image, "--push")
    attach_pack(CacheDirectory(str(tmp_path / "maker")), image, range(2), range(1, 4))
    pack = run("inspect", image, "--json")["pack"]
    assert pack["starts"] == 2 and 4 <= pack["blocks"] <= 8 and pack["repository"] is None
    assert 100_000 < pack["size_bytes"] < pack["plain_bytes"]
    run("index", image, "--push")
    report = run("inspect", image, "--json")
    assert report["pack"] == pack and report["pack_reasons"] == []
    assert f"{pack['blocks']} blocks of" in run("inspect", image).stdout


def test_inspect_tells_a_damaged_index(run: Callable[..., Any], tmp_path: Path) -> None:
    """One whose header, digests and superblock agree, and whose tree leads astray nevertheless."""
    layer = LayerTar().dir("data")
    for number in range(300):
        layer.file(f"data/file-{number}", b"x")
    image = write_image(tmp_path / "image", [layer.data()])
    run("index", image)
    assert run("inspect", image, "--json")["index"] == "in the cache"
    (kept,) = (tmp_path / "store/indexes").glob("*/image-made")
    sound = kept.read_bytes()
    index = ImageIndex(sound)
    namespace = index.namespace()
    at = namespace.rindex(b"file-250")
    assert at >= 4096  # behind what the superblock's checksum covers
    spoiled = namespace[:at] + b"f/le-250" + namespace[at + 8 :]
    heads = {part.index_digest: index.inlined_head(part) or b"" for part in index.parts}
    kept.write_bytes(encode_image(index.manifest_digest, spoiled, index.parts, heads))
    assert run("inspect", image, "--json")["index"] == "damaged"
    assert "index     damaged (lazyfs index --push" in run("inspect", image).stdout
    for content, state in ((sound[:-1], "damaged"), (b"", "damaged"), (sound, "in the cache")):
        kept.write_bytes(content)
        assert run("inspect", image, "--json")["index"] == state
    kept.unlink()
    assert run("inspect", image, "--json")["index"] == "none"


def test_what_cannot_be_had_is_one_line_and_an_exit_code(run: Callable[..., Any], tmp_path: Path) -> None:
    write_image(tmp_path / "image", [small_layer()])
    for words, code in (
        (("index", f"oci:{tmp_path}/image:nothing"), 32),
        (("inspect", f"oci:{tmp_path}/none:latest"), 1),
        (("inspect", "NOT A REFERENCE"), 1),
        (("cache", "gc"), 1),
    ):
        result = run(*words, check=False)
        assert result.returncode == code, result.stderr
        assert (
            result.stderr.count("\n") == 1 and "Traceback" not in result.stderr and "bug" not in result.stderr
        )


def test_cache_commands(run: Callable[..., Any], tmp_path: Path) -> None:
    store = CacheDirectory(str(tmp_path / "store"))
    made = make_layer([100_000])
    layer = store.create_layer(made.content_root, made.table)
    made.fill(layer)
    used = run("cache", "du", "--json")
    assert [(one["kind"], one["name"], one["in_use"]) for one in used["entries"]] == [
        ("layer", made.content_root, True)
    ]
    assert run("cache", "verify", "--json") == {
        "checked_blocks": 1,
        "damaged_blocks": 0,
        "broken_entries": [],
    }
    assert run("cache", "gc", "--max-size", "1", "--json")["freed_bytes"] == 0
    layer.close()
    with open(entry(store, made, "data"), "r+b") as file:
        file.write(b"rot")
    result = run("cache", "verify", check=False)
    assert result.returncode == 1 and "1 damaged" in result.stdout
    assert made.content_root[:12] in run("cache", "du").stdout
    assert run("cache", "prune", "--json")["left_bytes"] == 0
    assert store.content_roots() == []
