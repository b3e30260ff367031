"""What `Source` promises, over all that implement it: docker-registry, a directory, and a layout behind nginx."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from lazyfs.core.oci import documents
from lazyfs.core.oci.digests import DiffId, Digest
from lazyfs.core.oci.documents import Descriptor, Manifest
from lazyfs.core.oci.reference import RegistryReference, parse_reference
from lazyfs.core.oci.referrers import build_artifact
from lazyfs.errors import ImageError, NotFound, RemoteError, UserError
from lazyfs.sources.access import Access
from lazyfs.sources.source import Source, open_source
from tests.servers import FaultProxy, RegistryServer, Rule, StaticServer, sha256_digest
from tests.sources.repositories import BLOB, DEADLINE_S, read_stream

TYPE = "application/vnd.lazyfs.test.v1"
DIGEST = sha256_digest(BLOB)
ABSENT = Digest("sha256:" + "0" * 64)
STREAM_PIECE_BYTES = 1 << 20


@dataclass
class Place:
    """Where a source reads. `writer`: the reference of what may write there. `proxy`: what stands before it, if any."""

    reference: str
    writer: str
    blobs: Path
    proxy: FaultProxy | None = None

    @property
    def read_only(self) -> bool:
        return self.writer != self.reference

    def change(self, digest: str, data: bytes) -> None:
        """Puts other bytes in the place of a blob."""
        value = digest.removeprefix("sha256:")
        path = self.blobs / value if (self.blobs / value).exists() else self.blobs / value[:2] / value / "data"
        path.write_bytes(data)


@pytest.fixture(params=["registry", "directory", "web"])
def place(request: pytest.FixtureRequest, registry: RegistryServer, tmp_path: Path) -> Iterator[Place]:
    directory = tmp_path / "oci"
    directory.mkdir()
    local = f"oci:{directory}"
    blobs = directory / "blobs/sha256"
    if request.param == "directory":
        yield Place(local, local, blobs)
    elif request.param == "registry":
        with FaultProxy(registry) as proxy:
            name = f"{proxy.host}/contract/{os.urandom(4).hex()}"
            yield Place(name, name, registry.blobs_dir / "sha256", proxy)
    else:
        with StaticServer(directory, tmp_path) as server, FaultProxy(server) as proxy:
            yield Place(f"oci+{proxy.url}", local, blobs, proxy)


@asynccontextmanager
async def opened(reference: str) -> AsyncIterator[Source]:
    source = open_source(parse_reference(reference), Access(auth_files=()))
    with trio.fail_after(DEADLINE_S):
        try:
            yield source
        finally:
            await source.aclose()


async def store(place: Place, layer: bytes = BLOB) -> tuple[bytes, Descriptor]:
    """An image "v1" of one layer; returns its manifest and how to refer to it."""
    async with opened(place.writer) as source:
        digest = await source.push_blob(layer)
        config = json.dumps({"rootfs": {"type": "layers", "diff_ids": [digest]}}).encode()
        layers = [Descriptor("application/x.layer", digest, len(layer)).to_json()]
        document = {
            "schemaVersion": 2,
            "mediaType": documents.MEDIA_MANIFEST,
            "config": Descriptor(documents.MEDIA_CONFIG, await source.push_blob(config), len(config)).to_json(),
            "layers": layers,
        }
        raw = json.dumps(document).encode()
        await source.push_blob(b"{}")
        digest = await source.push_manifest(raw, documents.MEDIA_MANIFEST, "v1")
    return raw, Descriptor(documents.MEDIA_MANIFEST, digest, len(raw))


def artifact(subject: Descriptor, number: int = 0, artifact_type: str = TYPE) -> bytes:
    return build_artifact(artifact_type, [], subject, {"n": str(number)})


async def test_documents(place: Place) -> None:
    """By tag and by digest: the bytes as stored, and their media type."""
    raw, image = await store(place)
    assert image.digest == sha256_digest(raw)
    async with opened(place.reference) as source:
        assert await source.manifest("v1") == (raw, documents.MEDIA_MANIFEST) == await source.manifest(image.digest)
        manifest = documents.parse_manifest(raw, documents.MEDIA_MANIFEST)
        assert isinstance(manifest, Manifest)
        config = await source.blob(manifest.config.digest, manifest.config.size_bytes)
        assert documents.parse_config(config).diff_ids == (DiffId(DIGEST),)


@pytest.mark.parametrize(
    ("start", "end"), [(0, 1), (5, 70_000), (len(BLOB) - 1, len(BLOB)), (0, len(BLOB)), (9, 9), (len(BLOB), len(BLOB))]
)
async def test_ranges_are_exact(place: Place, start: int, end: int) -> None:
    await store(place)
    async with opened(place.reference) as source:
        assert await source.blob_range(DIGEST, start, end) == BLOB[start:end]
        taken = bytearray()

        async def take(piece: bytes) -> None:
            taken.extend(piece)

        assert await source.blob_range(DIGEST, start, end, take) == b"" and taken == BLOB[start:end]


async def test_bounds_of_ranges(place: Place) -> None:
    """Beyond the end the blob is not what it should be; a range that is none is a mistake of the caller."""
    await store(place)
    async with opened(place.reference) as source:
        for start in (0, len(BLOB) - 1, len(BLOB)):
            with pytest.raises(ImageError):
                await source.blob_range(DIGEST, start, len(BLOB) + 1)
        for start, end in ((-1, 5), (6, 5)):
            with pytest.raises(ValueError, match="bad range"):
                await source.blob_range(DIGEST, start, end)
        assert source.counters.retries == 0


async def test_streams(place: Place) -> None:
    """In order, in small pieces; one that is left early does no harm."""
    await store(place)
    async with opened(place.reference) as source:
        async with source.blob_stream(DIGEST, len(BLOB)) as stream:
            pieces = [piece async for piece in stream]
        assert b"".join(pieces) == BLOB and all(0 < len(piece) <= STREAM_PIECE_BYTES for piece in pieces)
        for _ in range(20):
            async with source.blob_stream(DIGEST, len(BLOB)) as stream:
                async for piece in stream:
                    assert BLOB.startswith(piece)
                    break
        assert await source.blob_range(DIGEST, 0, 10) == BLOB[:10]


async def test_what_is_missing(place: Place) -> None:
    """NotFound, at once, whatever is asked for."""
    await store(place)
    async with opened(place.reference) as source:
        for name in ("absent", ABSENT):
            with pytest.raises(NotFound):
                await source.manifest(name)
        with pytest.raises(NotFound):
            await source.blob(ABSENT, 1)
        with pytest.raises(NotFound):
            await source.blob_range(ABSENT, 0, 1)
        with pytest.raises(NotFound):
            await read_stream(source, ABSENT, 1)
        assert await source.referrers(ABSENT, TYPE) == []
        assert source.counters.retries == 0


async def test_no_image_at_all(place: Place) -> None:
    async with opened(place.reference) as source:
        with pytest.raises(NotFound):
            await source.manifest("v1")


@pytest.mark.parametrize("text", ["sha256:../../../etc/passwd", "sha256:" + "A" * 64, "md5:" + "0" * 32, ""])
async def test_what_is_no_digest(place: Place, text: str) -> None:
    """Digests become parts of paths: others do not get that far."""
    await store(place)
    digest = Digest(text)
    async with opened(place.reference) as source:
        with pytest.raises(ImageError):
            await source.blob(digest, 1)
        with pytest.raises(ImageError):
            await source.blob_range(digest, 0, 1)
        with pytest.raises(ImageError):
            await read_stream(source, digest, 1)
        with pytest.raises(ImageError):
            await source.referrers(digest, TYPE)


async def test_content_is_verified(place: Place) -> None:
    """A whole blob and a manifest by digest before they are given out, a stream after its last piece."""
    layer = BLOB + os.urandom(8)  # not what other tests read: docker-registry keeps a blob once
    digest = sha256_digest(layer)
    raw, image = await store(place, layer)
    other = b"x" + layer[1:]
    place.change(digest, other)
    place.change(image.digest, raw.replace(b"x.layer", b"y.layer"))
    async with opened(place.reference) as source:
        with pytest.raises(ImageError, match="digest"):
            await source.blob(digest, len(layer))
        pieces = []
        async with source.blob_stream(digest, len(layer)) as stream:
            with pytest.raises(ImageError, match="digest"):
                async for piece in stream:
                    pieces.append(piece)
        assert b"".join(pieces) == other
        assert await source.blob_range(digest, 0, 9) == other[:9]  # not verified: the caller knows its blocks
        with pytest.raises((ImageError, RemoteError)):  # docker-registry finds it out itself
            await source.manifest(image.digest)


@pytest.mark.parametrize("size_bytes", [len(BLOB) - 1, len(BLOB) + 1, 1, 2 * len(BLOB)])
async def test_sizes_are_verified(place: Place, size_bytes: int) -> None:
    await store(place)
    async with opened(place.reference) as source:
        with pytest.raises(ImageError):
            await source.blob(DIGEST, size_bytes)
        with pytest.raises(ImageError):
            await read_stream(source, DIGEST, size_bytes)


async def test_pushing(place: Place) -> None:
    """Blobs and manifests, again and again; or a clear refusal that changes nothing."""
    raw, image = await store(place)
    async with opened(place.reference) as source:
        if place.read_only:
            for push in (
                source.push_blob(b"x"),
                source.push_manifest(raw, image.media_type, "v2"),
                source.attach(image, artifact(image)),
                source.detach(image, image),
            ):
                with pytest.raises(UserError, match="cannot be written"):
                    await push
            assert source.counters.requests == 0
            return
        for _ in range(2):
            assert await source.push_blob(b"more") == sha256_digest(b"more")
            assert await source.push_manifest(raw, image.media_type) == image.digest
            assert await source.push_manifest(raw, image.media_type, "v2") == image.digest
        assert await source.blob(sha256_digest(b"more"), 4) == b"more"
        assert (await source.manifest("v2"))[0] == raw == (await source.manifest("v1"))[0]


async def test_attaching(place: Place) -> None:
    """What is attached is found by its type, once, old and new; also what was attached at the same time."""
    _, image = await store(place)
    async with opened(place.reference) as source, opened(place.writer) as writer:
        assert await source.referrers(image.digest, TYPE) == []
        digests = [await writer.attach(image, artifact(image, number)) for number in (0, 1, 1)]
        found = await source.referrers(image.digest, TYPE)
        assert [one.digest for one in found] == digests[:2]
        assert [(one.annotations, one.artifact_type) for one in found] == [({"n": str(n)}, TYPE) for n in range(2)]
        assert await source.referrers(image.digest, "application/other") == []
        assert (await source.manifest(digests[0]))[0] == artifact(image)
        with pytest.raises(ImageError, match="does not refer"):
            await writer.attach(image._replace(digest=DIGEST), artifact(image))
        async with trio.open_nursery() as nursery:
            for number in (2, 3):
                nursery.start_soon(writer.attach, image, artifact(image, number))
        assert len(await source.referrers(image.digest, TYPE)) == 4
        assert (await source.manifest("v1"))[1] == documents.MEDIA_MANIFEST


async def test_several_types_are_one_question(place: Place) -> None:
    _, image = await store(place)
    async with opened(place.reference) as source, opened(place.writer) as writer:
        digests = [await writer.attach(image, artifact(image, n, kind)) for n, kind in enumerate((TYPE, "a/b", "c/d"))]
        await source.manifest("v1")
        before = source.counters.requests
        assert [one.digest for one in await source.referrers(image.digest, TYPE, "a/b")] == digests[:2]
        asked = source.counters.requests - before
        await source.referrers(image.digest, TYPE)
        assert source.counters.requests - before == 2 * asked


async def test_detaching(place: Place) -> None:
    """The artifact is listed no longer; where it is a file, it is gone, with what only it has. Others stay."""
    _, image = await store(place)
    async with opened(place.reference) as source, opened(place.writer) as writer:
        blob = await writer.push_blob(os.urandom(30))
        for number in range(3):
            await writer.attach(image, artifact(image, number))
        first, second, third = await source.referrers(image.digest, TYPE)
        for _ in range(2):
            await writer.detach(image, second, [blob])
            assert await source.referrers(image.digest, TYPE) == [first, third]
        if not isinstance(parse_reference(place.writer), RegistryReference):
            for read in (source.manifest(second.digest), source.blob(blob, 30)):
                with pytest.raises(NotFound):
                    await read
        assert (await source.manifest(third.digest))[0] == artifact(image, 2)
        await writer.detach(image._replace(digest=ABSENT), first)
        await writer.attach(image, artifact(image, 1))
        assert await source.referrers(image.digest, TYPE) == [first, third, second]


OPERATIONS: dict[str, Callable[[Source, Descriptor], Awaitable[object]]] = {
    "manifest": lambda source, image: source.manifest("v1"),
    "blob": lambda source, image: source.blob(DIGEST, len(BLOB)),
    "blob_range": lambda source, image: source.blob_range(DIGEST, 0, 100_000),
    "blob_stream": lambda source, image: read_stream(source, DIGEST, len(BLOB)),
    "referrers": lambda source, image: source.referrers(image.digest, TYPE),
    "push_blob": lambda source, image: source.push_blob(b"new"),
    "push_manifest": lambda source, image: source.push_manifest(b'{"schemaVersion": 2}', image.media_type, "v1"),
    "attach": lambda source, image: source.attach(image, artifact(image)),
    "detach": lambda source, image: source.detach(image, image),
}
READING = ("manifest", "blob", "blob_range", "blob_stream", "referrers")


@pytest.mark.parametrize("name", OPERATIONS)
async def test_cancelling(place: Place, name: str) -> None:
    """Before it begins, and while the server is silent: it ends, and the source works on."""
    if place.read_only and name not in READING:
        return
    raw, image = await store(place)
    async with opened(place.reference) as source:
        with trio.CancelScope() as scope:
            scope.cancel()
            await OPERATIONS[name](source, image)
        assert scope.cancelled_caught
        if place.proxy is not None:
            place.proxy.rules = [Rule("stall", times=None)]
            for deadline_s in (0.05, 0.2):
                with trio.move_on_after(deadline_s) as scope:
                    await OPERATIONS[name](source, image)
                assert scope.cancelled_caught
            place.proxy.rules = []
        assert await source.manifest("v1") == (raw, image.media_type)
        assert await source.blob_range(DIGEST, 7, 8) == BLOB[7:8]


async def test_many_tasks(place: Place) -> None:
    """One source serves them all at once."""
    await store(place)
    right = []
    async with opened(place.reference) as source:

        async def read(start: int) -> None:
            right.append(await source.blob_range(DIGEST, start, start + 1000) == BLOB[start : start + 1000])

        async def stream() -> None:
            right.append(await read_stream(source, DIGEST, len(BLOB)) == BLOB)

        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(read, 1000 * number)
                if number % 4 == 0:
                    nursery.start_soon(stream)
    assert right == 50 * [True]


async def test_counting(place: Place) -> None:
    """Requests and bytes of what was read, in one object for the life of the source."""
    await store(place)
    async with opened(place.reference) as source, opened(place.reference) as other:
        counters = source.counters
        await source.blob(DIGEST, len(BLOB))
        requests = counters.requests
        assert requests >= 1 and len(BLOB) <= counters.bytes_fetched < len(BLOB) + 10_000
        await source.blob_range(DIGEST, 0, 50_000)
        assert counters.requests == requests + 1 and counters.bytes_fetched >= len(BLOB) + 50_000
        await source.blob_range(DIGEST, 5, 5)  # nothing to ask for
        assert counters.requests == requests + 1 and counters.retries == 0
        assert source.counters is counters and other.counters.requests == 0


async def test_closing_twice(place: Place) -> None:
    await store(place)
    async with opened(place.reference) as source:
        await source.manifest("v1")
        await source.aclose()
        await source.aclose()
