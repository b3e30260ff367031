"""Image layouts: directories that skopeo wrote, hostile ones, and the same behind nginx."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trustme

from lazyfs.core.oci import documents, platforms, referrers
from lazyfs.core.oci.digests import DiffId, Digest
from lazyfs.core.oci.documents import Descriptor, Manifest
from lazyfs.core.oci.reference import parse_reference
from lazyfs.errors import HostError, LazyfsError, NotFound, RemoteError, UserError
from lazyfs.sources.access import Access
from lazyfs.sources.source import Source, open_source
from tests.servers import FaultProxy, RegistryServer, Rule, StaticServer, sha256_digest
from tests.sources.repositories import BLOB, DEADLINE_S

TYPE = "application/vnd.lazyfs.test.v1"
DIGEST = sha256_digest(BLOB)


@asynccontextmanager
async def opened(text: str, ca_files: tuple[str, ...] = ()) -> AsyncIterator[Source]:
    """The source for a reference, under a deadline."""
    source = open_source(parse_reference(text), Access(auth_files=(), ca_files=ca_files))
    with trio.fail_after(DEADLINE_S):
        try:
            yield source
        finally:
            await source.aclose()


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout that skopeo made, with the names "one" and "two" for one image. Not to be changed."""
    base = tmp_path_factory.mktemp("layout")
    with RegistryServer(base) as server:
        server.put_image("demo", "latest", [BLOB])
        for name in ("one", "two"):
            source, target = f"docker://{server.host}/demo", f"oci:{base}/oci:{name}"
            subprocess.run(["skopeo", "copy", "-q", "--src-tls-verify=false", source, target], check=True)
    return base / "oci"


async def make(path: Path, *tags: str) -> Digest:
    """A layout written by ourselves, with one image per tag; returns the last one's digest."""
    os.makedirs(path, exist_ok=True)
    digest = Digest("")
    async with opened(f"oci:{path}") as source:
        layer = await source.push_blob(BLOB)
        for tag in tags:
            config = json.dumps({"rootfs": {"type": "layers", "diff_ids": [layer]}, "author": tag}).encode()
            document = {
                "schemaVersion": 2,
                "mediaType": documents.MEDIA_MANIFEST,
                "config": Descriptor(documents.MEDIA_CONFIG, await source.push_blob(config), len(config)).to_json(),
                "layers": [Descriptor("application/x.layer", layer, len(BLOB)).to_json()],
            }
            digest = await source.push_manifest(json.dumps(document).encode(), documents.MEDIA_MANIFEST, tag)
    return digest


async def check_image(source: Source, selector: str) -> None:
    """All ways of reading give the image."""
    raw, media_type = await source.manifest(selector)
    manifest = documents.parse_manifest(raw, media_type)
    assert isinstance(manifest, Manifest)
    assert (await source.manifest(sha256_digest(raw)))[0] == raw
    config = await source.blob(manifest.config.digest, manifest.config.size_bytes)
    assert documents.parse_config(config).diff_ids == (DiffId(DIGEST),)
    for start, end in ((0, 1), (5, 70_000), (len(BLOB) - 1, len(BLOB)), (0, len(BLOB)), (9, 9)):
        assert await source.blob_range(DIGEST, start, end) == BLOB[start:end]
    async with source.blob_stream(DIGEST, len(BLOB)) as pieces:
        assert b"".join([piece async for piece in pieces]) == BLOB


async def test_layout_by_skopeo(pulled: Path) -> None:
    """Named images, by tag and by digest; two names of one image are one image."""
    async with opened(f"oci:{pulled}") as source:
        for selector in ("one", "two", ""):
            await check_image(source, selector)
        with pytest.raises(NotFound, match="one, two"):
            await source.manifest("three")


async def test_written_layout_is_read_by_skopeo(tmp_path: Path) -> None:
    """What push writes is an image layout for others, too."""
    digest = await make(tmp_path / "oci", "a", "b")
    done = await trio.run_process(
        ["skopeo", "inspect", "--raw", f"oci:{tmp_path}/oci:b"], capture_stdout=True
    )
    assert sha256_digest(done.stdout) == digest
    async with opened(f"oci:{tmp_path}/oci") as source:
        with pytest.raises(UserError, match="a, b"):
            await source.manifest("")
    assert not [path for path in (tmp_path / "oci").rglob(".lazyfs-*")]


async def test_attach(tmp_path: Path) -> None:
    """What is attached is no image: the only image stays the only one."""
    digest = await make(tmp_path / "oci", "only")
    async with opened(f"oci:{tmp_path}/oci") as source:
        raw, media_type = await source.manifest("")
        assert sha256_digest(raw) == digest
        subject = Descriptor(media_type, digest, len(raw))
        await source.push_blob(b"{}")
        await source.attach(subject, referrers.build_artifact(TYPE, [], subject, {}))
        await check_image(source, "")


async def test_platforms_only(tmp_path: Path) -> None:
    """A layout that is one image for several platforms answers with its index."""
    digest = await make(tmp_path / "oci", "x")
    index = json.loads((tmp_path / "oci/index.json").read_bytes())
    entry = index["manifests"][0] | {"annotations": None}
    index["manifests"] = [
        entry | {"platform": {"os": "linux", "architecture": "amd64"}},
        entry | {"platform": {"os": "linux", "architecture": "arm64"}, "digest": "sha256:" + "1" * 64},
    ]
    (tmp_path / "oci/index.json").write_text(json.dumps(index))
    async with opened(f"oci:{tmp_path}/oci") as source:
        parsed = documents.parse_manifest(*await source.manifest(""))
        assert isinstance(parsed, documents.ImageIndex)
        assert platforms.select_platform(parsed, "linux/amd64").digest == digest


async def test_hostile_layouts(tmp_path: Path) -> None:
    """FIFOs, directories, links and wrong content in the place of files: a clear error, no way out."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret".ljust(len(BLOB), b"!"))
    value = DIGEST.removeprefix("sha256:")

    async def damaged(change: object, message: str) -> None:
        directory = tmp_path / f"oci-{os.urandom(4).hex()}"
        await make(directory, "x")
        assert callable(change)
        change(directory)
        async with opened(f"oci:{directory}") as source:
            with pytest.raises(LazyfsError, match=message):
                await source.manifest("x")
                await source.blob(DIGEST, len(BLOB))

    def replace(name: str, make_new: object) -> object:
        def change(directory: Path) -> None:
            path = directory / name
            if path.is_dir():
                path.rename(tmp_path / os.urandom(4).hex())
            else:
                path.unlink()
            assert callable(make_new)
            make_new(path)

        return change

    blob = f"blobs/sha256/{value}"
    await damaged(replace(blob, lambda path: path.symlink_to(secret)), "digest")
    await damaged(replace(blob, lambda path: path.symlink_to("/dev/zero")), "regular file")
    await damaged(replace(blob, lambda path: path.symlink_to(path)), "cannot open")
    await damaged(replace(blob, os.mkfifo), "regular file")
    await damaged(replace(blob, os.mkdir), "regular file")
    await damaged(replace(blob, lambda path: path.write_bytes(BLOB[:-1] + b"x")), "digest")
    await damaged(replace(blob, lambda path: path.write_bytes(b"")), "digest")
    await damaged(replace("blobs/sha256", lambda path: path.symlink_to(tmp_path)), "missing")
    await damaged(replace("blobs", lambda path: path.symlink_to("/")), "missing")
    await damaged(replace("index.json", lambda path: path.symlink_to("/etc/passwd")), "is not valid JSON")
    await damaged(replace("index.json", lambda path: path.write_text("[")), "JSON")
    await damaged(replace("index.json", lambda path: path.write_bytes(b" " * (5 << 20))), "larger")
    await damaged(replace("oci-layout", lambda path: path.write_text("{}")), "1.0.0")
    await damaged(replace("oci-layout", lambda path: None), "missing")


async def test_links_are_followed(tmp_path: Path) -> None:
    """As debuerreotype and Bazel write layouts: blobs, or all files, are links to where they were built."""
    await make(tmp_path / "built", "x")
    layout = tmp_path / "layout"
    for path in [one for one in (tmp_path / "built").rglob("*") if one.is_file()]:
        link = layout / path.relative_to(tmp_path / "built")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    async with opened(f"oci:{layout}") as source:
        await check_image(source, "x")


async def test_attaching_adds_no_entry_beside_a_nameless_image(tmp_path: Path) -> None:
    """skopeo and others take `oci:DIR` only if index.json has one entry."""
    await make(tmp_path / "oci", "x")
    index = json.loads((tmp_path / "oci/index.json").read_bytes())
    del index["manifests"][0]["annotations"]
    (tmp_path / "oci/index.json").write_text(json.dumps(index))
    async with opened(f"oci:{tmp_path}/oci") as source:
        raw, media_type = await source.manifest("")
        subject = Descriptor(media_type, sha256_digest(raw), len(raw))
        await source.push_blob(b"{}")
        kinds = ("application/vnd.lazyfs.a", "application/vnd.lazyfs.b")
        attached = [
            await source.attach(subject, referrers.build_artifact(kind, [], subject, {})) for kind in kinds
        ]
        for kind, digest in zip(kinds, attached, strict=True):
            assert [one.digest for one in await source.referrers(subject.digest, kind)] == [digest]
            assert sha256_digest((await source.manifest(digest))[0]) == digest
        await check_image(source, "")
    assert json.loads((tmp_path / "oci/index.json").read_bytes()) == index
    await trio.run_process(["skopeo", "inspect", "--raw", f"oci:{tmp_path}/oci"], capture_stdout=True)


async def test_artifacts_that_are_listed_beside_the_image_are_found(tmp_path: Path) -> None:
    """As oras attaches and copies them: with their type, but no list of the image's referrers."""
    digest = await make(tmp_path / "oci", "x")
    async with opened(f"oci:{tmp_path}/oci") as source:
        raw, media_type = await source.manifest("x")
        subject = Descriptor(media_type, digest, len(raw))
        other = subject._replace(digest=Digest("sha256:" + "1" * 64))
        await source.push_blob(b"{}")
        artifacts = [referrers.build_artifact(TYPE, [], one, {"of": one.digest}) for one in (subject, other)]
        digests = [await source.push_manifest(one, documents.MEDIA_MANIFEST) for one in artifacts]
        index = json.loads((tmp_path / "oci/index.json").read_bytes())
        sizes = [*(len(one) for one in artifacts), 7]
        for one, size in zip([*digests, "sha256:" + "2" * 64], sizes, strict=True):  # the last one is missing
            entry = {"mediaType": documents.MEDIA_MANIFEST, "digest": one, "size": size, "artifactType": TYPE}
            index["manifests"].append(entry)
        (tmp_path / "oci/index.json").write_text(json.dumps(index))
        [found] = await source.referrers(digest, TYPE)
        assert (found.digest, found.annotations, found.artifact_type) == (digests[0], {"of": digest}, TYPE)
        assert await source.referrers(digest, "application/vnd.other") == []
        await check_image(source, "x")
        await source.attach(subject, artifacts[0])  # now it is listed in both ways
        assert [one.digest for one in await source.referrers(digest, TYPE)] == [digests[0]]
        await source.detach(subject, found)
        assert await source.referrers(digest, TYPE) == []
        assert digests[0] not in (tmp_path / "oci/index.json").read_text()
        await check_image(source, "x")


async def test_wrong_places(tmp_path: Path) -> None:
    """No directory, no image in it."""
    with pytest.raises(UserError, match="cannot open"):
        async with opened(f"oci:{tmp_path}/absent"):
            pass
    async with opened(f"oci:{tmp_path}") as source:
        with pytest.raises(NotFound, match="oci-layout is missing"):
            await source.manifest("")


async def test_write_errors_are_told(tmp_path: Path) -> None:
    """A blobs directory that is a file: the host's fault, nothing left behind."""
    (tmp_path / "blobs").write_text("")
    async with opened(f"oci:{tmp_path}") as source:
        with pytest.raises(HostError, match="cannot write"):
            await source.push_blob(b"x")
    assert os.listdir(tmp_path) == ["blobs"]


async def test_web_layout(pulled: Path, tmp_path: Path) -> None:
    """The same directory behind nginx, read by range through a proxy that counts."""
    with StaticServer(pulled.parent, tmp_path) as web, FaultProxy(web) as proxy:
        async with opened(f"oci+{proxy.url}/oci:one") as source:
            await check_image(source, "one")
            ranges = [request.range for request in proxy.matching("GET", DIGEST.removeprefix("sha256:"))]
            assert ranges[1] == "bytes=5-69999"
            proxy.rules = [Rule("truncate", path="/blobs/", after_bytes=100), Rule("status", path="/blobs/")]
            assert await source.blob_range(DIGEST, 100, 50_000) == BLOB[100:50_000]
            assert source.counters.retries == 2
        async with opened(f"oci+{web.url}/absent") as source:
            with pytest.raises(NotFound, match="answered 404"):
                await source.manifest("")


async def test_web_layout_tls(pulled: Path, tmp_path: Path) -> None:
    """https with a CA of one's own."""
    ca = trustme.CA()
    (tmp_path / "ca.pem").write_bytes(ca.cert_pem.bytes())
    with StaticServer(pulled, tmp_path, tls=ca) as web:
        async with opened(f"oci+{web.url}", (str(tmp_path / "ca.pem"),)) as source:
            await check_image(source, "one")
        async with opened(f"oci+{web.url}") as source:
            with pytest.raises(RemoteError, match="not trusted"):
                await source.manifest("one")


async def test_several_write_to_one_directory(tmp_path: Path) -> None:
    """As processes do, each with its own view of it: no name and no attachment is lost."""
    await make(tmp_path / "oci", "v1")
    text = f"oci:{tmp_path}/oci"
    async with opened(text) as first, opened(text) as second, opened(f"{text}:v1") as reader:
        raw, media_type = await reader.manifest("v1")
        subject = Descriptor(media_type, sha256_digest(raw), len(raw))

        async def write(source: Source, number: int) -> None:
            await source.attach(subject, referrers.build_artifact(TYPE, [], subject, {"n": str(number)}))
            await source.push_manifest(raw, media_type, f"name{number}")

        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(write, (first, second)[number % 2], number)
        assert len(await reader.referrers(subject.digest, TYPE)) == 12
        for number in range(12):
            assert await reader.manifest(f"name{number}") == (raw, media_type)


async def test_a_directory_that_others_go_on_changing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = await make(tmp_path / "oci", "v1")
    monkeypatch.setattr("lazyfs.sources.layout.LOCK_S", 0.1)
    fd = os.open(tmp_path / "oci", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    async with opened(f"oci:{tmp_path}/oci") as source:
        raw, media_type = await source.manifest(digest)
        with pytest.raises(HostError, match="being changed by others"):
            await source.push_manifest(raw, media_type, "v2")
        os.close(fd)
        await source.push_manifest(raw, media_type, "v2")
