"""Packs are found by the question that finds the index, at once, and nothing about them can fail or hold up a mount."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from lazyfs.cache.directory import CacheDirectory
from lazyfs.cache.images import LACKING_S, forget_packs
from lazyfs.core.oci.digests import Digest, sha256_digest
from lazyfs.core.oci.documents import Descriptor
from lazyfs.core.oci.referrers import build_artifact
from lazyfs.core.starts.pack import PACK_ARTIFACT_TYPE, PACK_MEDIA_TYPE, build_pack
from lazyfs.errors import ImageError
from lazyfs.images.attached import Attached
from lazyfs.images.documents import Found, find_index
from lazyfs.images.elsewhere import ANSWER_S
from lazyfs.images.packs import FoundPack, find_packs, load_head
from lazyfs.images.resolve import close_source
from lazyfs.indexing.packs import make_pack
from lazyfs.indexing.publish import push_index
from lazyfs.sources.source import Source
from tests.indexing.localimages import OPTIONS, big_layer, indexed, resolved, small_layer, write_image
from tests.indexing.somestarts import push_pack, some_starts
from tests.layout import push
from tests.servers import FaultProxy, RegistryServer, Rule

SLACK_S = 1.5  # of a loaded machine


class Case(NamedTuple):
    """An image in a registry behind a proxy, with an index and a pack that a host made; they are not attached yet."""

    proxy: FaultProxy
    name: str
    maker: CacheDirectory
    tmp: Path

    @property
    def image(self) -> str:
        return f"{self.proxy.host}/{self.name}:latest"

    async def push(self, *, index: str | None = None, pack: str | None = None, blocks: range = range(64)) -> bytes:
        """Attaches index and pack at places: "" is the image's own repository, None nowhere. Returns the pack."""
        built, _ = await indexed(self.maker, self.image, fill=True)
        async with resolved(self.maker, self.image) as it:
            if index is not None:
                await push_index(self.maker, it, built, index)
            made = await make_pack(self.maker, it.manifest_digest, some_starts(built, blocks))
            if pack is not None:
                await push_pack(it, made, pack)
        self.proxy.clear()
        return made

    def host(self, name: str = "user") -> CacheDirectory:
        return CacheDirectory(str(self.tmp / name))


@pytest.fixture
def case(registry: RegistryServer, tmp_path: Path) -> Iterator[Case]:
    name = f"found/{os.urandom(4).hex()}"
    write_image(tmp_path / "image", [big_layer(), small_layer()])
    push(tmp_path / "image", "latest", f"{registry.host}/{name}:latest")
    with FaultProxy(registry) as proxy:
        yield Case(proxy, name, CacheDirectory(str(tmp_path / "maker")), tmp_path)


@asynccontextmanager
async def what_is_attached(cache: CacheDirectory, case: Case, *repositories: str) -> AsyncIterator[Attached]:
    async with resolved(cache, case.image, OPTIONS._replace(index_repositories=repositories)) as it:
        attached = Attached(cache, it)
        try:
            yield attached
        finally:
            await attached.aclose()


async def packs(cache: CacheDirectory, case: Case, *repositories: str) -> list[FoundPack]:
    async with what_is_attached(cache, case, *repositories) as attached:
        return await find_packs(attached)


async def test_one_question_finds_index_and_pack(case: Case) -> None:
    """And nothing but the pack itself is fetched for the pack."""
    made = await case.push(index="", pack="")
    async with what_is_attached(case.host(), case) as attached:
        results: list[object] = []

        async def index() -> None:
            results.append(await find_index(attached.cache, attached.resolved, attached=attached))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(index)
            (pack,) = await find_packs(attached)
        assert isinstance(results[0], Found)
        head = await load_head(pack)
    assert (pack.size_bytes, pack.starts, pack.revision, pack.place) == (len(made), 1, 1, "")
    assert sum(len(frame.blocks) for frame in head.frames) == len(head.block_numbers) > 10
    for path in ("/referrers/", "/manifests/sha256-"):
        assert len(case.proxy.matching("GET", path)) == 1
    assert not case.proxy.matching("GET", "/manifests/sha256:")  # the list says which blobs they are
    (asked,) = case.proxy.matching("GET", f"/blobs/{pack.digest}")
    assert asked.bytes <= 64 << 10


async def test_a_pack_is_found_while_the_index_does_not_come(case: Case) -> None:
    pack_digest = sha256_digest(await case.push(index="", pack=""))
    async with what_is_attached(case.host(), case) as attached, trio.open_nursery() as nursery:
        case.proxy.rules[:] = [Rule("stall", f"/blobs/(?!{pack_digest})", times=None)]
        nursery.start_soon(functools.partial(find_index, attached.cache, attached.resolved, attached=attached))
        (pack,) = await find_packs(attached)
        assert (await load_head(pack)).frames
        nursery.cancel_scope.cancel()


async def test_a_list_without_annotations_leads_to_the_manifest(case: Case) -> None:
    made = await case.push(pack="")
    (listed,) = await packs(case.host(), case)
    plain = listed.artifact._replace(annotations={})
    async with what_is_attached(case.host("second"), case) as attached:
        attached._own = [plain, plain._replace(digest=Digest("sha256:" + "0" * 64))]
        (found,) = await find_packs(attached)
        assert (found.digest, found.size_bytes, found.starts, found.revision) == (listed.digest, len(made), 1, 1)
        assert (await load_head(found)).manifest_digest == attached.resolved.manifest_digest


async def test_the_own_repository_goes_first_then_in_order(case: Case) -> None:
    first, second = (f"oci:{case.tmp}/{name}" for name in ("first", "second"))
    own, other = await case.push(pack=second, index=first), await case.push(pack=None, blocks=range(2))
    assert own != other
    (found,) = await packs(case.host("a"), case, first, second)
    assert found.place == second and found.size_bytes == len(own)
    await case.push(pack="", blocks=range(2))
    (found,) = await packs(case.host("b"), case, first, second)
    assert found.place == "" and found.size_bytes == len(other)


async def test_a_pack_in_an_index_repository_can_be_read(case: Case) -> None:
    """Also by a host whose index comes from the image's own repository, and which looks for it by itself."""
    repository = f"{case.proxy.host}/{case.name}/indexes"
    await case.push(index="", pack=repository)
    async with what_is_attached(case.host(), case, repository) as attached:
        found = await find_index(attached.cache, attached.resolved, attached=attached)
        (pack,) = await find_packs(attached)
        assert isinstance(found, Found) and found.place == "" and pack.place == repository
        assert (await load_head(pack)).frames
        await close_source(found.source)
    async with what_is_attached(case.host(), case, repository) as attached:  # by what is remembered
        (pack,) = await find_packs(attached)
        assert (await load_head(pack)).frames


def notes(cache: CacheDirectory) -> list[Path]:
    return list(Path(cache.path).glob("indexes/*/packs"))


async def test_answers_are_remembered_for_some_minutes(case: Case) -> None:
    cache = case.host()
    assert await packs(cache, case) == []
    await case.push(pack="", index="")
    assert await packs(cache, case) == [] and not case.proxy.matching("GET", "/referrers/")
    (noted,) = notes(cache)
    for text in (f"{int(time.time() - LACKING_S)}\n[]", f"{int(time.time()) + 1000}\n[]", "", "rubbish"):
        noted.write_text(text)
        assert len(await packs(cache, case)) == 1, text
    now = int(time.time())
    for note in (b"rubbish", b"[1]", b'[{"place": ""}]', b"[" * 5000, b'{"a": 1}'):
        noted.write_bytes(b"%d\n%b" % (now, note))
        assert len(await packs(cache, case)) == 1, note
    case.proxy.clear()
    assert len(await packs(cache, case)) == 1 and not case.proxy.matching("GET", "/referrers/")
    async with resolved(cache, case.image) as it:
        forget_packs(cache, it.manifest_digest)
    assert len(await packs(cache, case)) == 1 and case.proxy.matching("GET", "/referrers/")


@pytest.mark.parametrize("rule", [Rule("stall", times=None), Rule("status", times=None), Rule("reset", times=None)])
async def test_a_failure_is_not_remembered(case: Case, rule: Rule) -> None:
    """A dead index repository, and an own one that fails."""
    await case.push(pack="")
    repository = f"{case.proxy.host}/{case.name}/indexes"
    cache = case.host()
    async with what_is_attached(cache, case) as attached:  # the manifest is here
        attached.resolved.patience_s = 1.0
        case.proxy.rules[:] = [rule]
        begun_s = time.monotonic()
        assert await find_packs(attached) == []
        assert time.monotonic() - begun_s < 1.0 + SLACK_S
        case.proxy.clear()
        case.proxy.break_connections()
    assert len(await packs(cache, case)) == 1
    async with what_is_attached(case.host("second"), case, repository) as attached:
        attached._own = []
        rule.path = "indexes"
        rule.hits = 0
        case.proxy.rules[:] = [rule]
        begun_s = time.monotonic()
        assert await find_packs(attached) == []
        assert time.monotonic() - begun_s < ANSWER_S + SLACK_S
        assert not notes(attached.cache)


async def test_offline_nobody_is_asked(case: Case) -> None:
    await case.push(pack="")
    cache = case.host()
    async with resolved(cache, case.image):
        pass
    case.proxy.clear()
    async with resolved(cache, case.image, OPTIONS._replace(pull="never")) as it:
        assert await find_packs(Attached(cache, it)) == []
    assert not case.proxy.requests


async def attach(
    source: Source, subject: Descriptor, blob: bytes, media_type: str, annotations: dict[str, str]
) -> None:
    """What somebody else may have put there as a pack."""
    await source.push_blob(b"{}")
    layers = [Descriptor(media_type, await source.push_blob(blob), len(blob))]
    await source.attach(subject, build_artifact(PACK_ARTIFACT_TYPE, layers, subject, annotations))


async def test_packs_of_other_images_and_rubbish_are_refused(case: Case) -> None:
    """What is attached here, but is of another image, by its head; of another kind; and numbers that are none."""
    made = await case.push()
    foreign = build_pack(Digest("sha256:" + "9" * 64), ["a" * 64], [(0, 0)], lambda root, block: b"x", b"")  # type: ignore[list-item]
    async with resolved(case.maker, case.image) as it:
        subject = Descriptor(it.manifest.media_type, Digest(it.manifest_digest), len(it.manifest_bytes))
        for blob, media_type, revision in (
            (made, PACK_MEDIA_TYPE, "1"),
            (foreign, PACK_MEDIA_TYPE, "9"),
            (b"rubbish and more of it", PACK_MEDIA_TYPE, "8"),
            (made, "text/plain", "7"),
            (b"short", PACK_MEDIA_TYPE, "6"),
            (made[:-1], PACK_MEDIA_TYPE, "-5"),
        ):
            await attach(it.source, subject, blob, media_type, {"vnd.lazyfs.pack.revision": revision})
    async with what_is_attached(case.host(), case) as attached:
        found = await find_packs(attached)
        assert [pack.revision for pack in found] == [9, 8, 1, 0]
        for pack, problem in zip(found, ("another image", "no version", "", "add up"), strict=True):
            if problem:
                with pytest.raises(ImageError, match=problem):
                    await load_head(pack)
        head = await load_head(found[2])
        assert head.manifest_digest == attached.resolved.manifest_digest


async def test_a_head_larger_than_the_guess_is_read_whole(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    await case.push(pack="")
    monkeypatch.setattr("lazyfs.images.packs.HEAD_GUESS_BYTES", 100)
    async with what_is_attached(case.host(), case) as attached:
        (pack,) = await find_packs(attached)
        assert (await load_head(pack)).block_numbers


async def test_an_image_to_which_nothing_is_attached_costs_two_requests(case: Case) -> None:
    """For indexes of both versions and packs together: the referrers API and the tag."""
    async with what_is_attached(case.host(), case) as attached:
        case.proxy.clear()
        await find_index(attached.cache, attached.resolved, attached=attached)
        await find_packs(attached)
        assert len(case.proxy.requests) == 2
