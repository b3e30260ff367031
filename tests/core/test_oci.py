"""Manifests, indexes, configs and challenges: good ones read right, damaged ones give ImageError."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.oci import digests, documents, referrers
from lazyfs.core.oci.digests import DiffId, Digest
from lazyfs.core.oci.documents import Descriptor, ImageIndex, Manifest, Platform
from lazyfs.errors import ImageError
from lazyfs.sources import challenges

DIGEST = Digest("sha256:" + "0" * 64)
OTHER = Digest("sha256:" + "1" * 64)
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def descriptor(
    media_type: str = LAYER, digest: str = DIGEST, size: object = 5, **more: object
) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest, "size": size, **more}


def manifest(**changes: Any) -> dict[str, Any]:
    document = {
        "schemaVersion": 2,
        "mediaType": documents.MEDIA_MANIFEST,
        "config": descriptor(documents.MEDIA_CONFIG),
        "layers": [descriptor(), descriptor(digest=OTHER)],
    }
    return {key: value for key, value in (document | changes).items() if value != "absent"}


def parse(document: object, media_type: str = documents.MEDIA_MANIFEST) -> Manifest | ImageIndex:
    return documents.parse_manifest(json.dumps(document).encode(), media_type)


def test_manifest() -> None:
    """All fields arrive."""
    extra = descriptor(
        annotations={"k": "v"}, platform={"os": "linux", "architecture": "arm", "variant": "v7"}
    )
    parsed = parse(manifest(layers=[extra], subject=descriptor(), artifactType="a/b", annotations={"x": "y"}))
    assert isinstance(parsed, Manifest)
    assert parsed.layers == (Descriptor(LAYER, DIGEST, 5, {"k": "v"}, Platform("linux", "arm", "v7")),)
    assert parsed.subject == Descriptor(LAYER, DIGEST, 5)
    assert (parsed.artifact_type, parsed.annotations, parsed.media_type) == (
        "a/b",
        {"x": "y"},
        documents.MEDIA_MANIFEST,
    )
    assert parsed.config.media_type == documents.MEDIA_CONFIG


@pytest.mark.parametrize("served", ["", "application/json", "application/octet-stream; charset=utf-8"])
def test_media_type_from_the_document(served: str) -> None:
    """Plain web servers know no media types: the document's own counts."""
    assert isinstance(parse(manifest(), served), Manifest)
    assert isinstance(parse(manifest(mediaType="absent"), served), Manifest)


def test_docker_types() -> None:
    """Docker's documents have the same shape."""
    assert isinstance(parse(manifest(mediaType=documents.DOCKER_MANIFEST), documents.DOCKER_MANIFEST), Manifest)
    listed = {"schemaVersion": 2, "mediaType": documents.DOCKER_LIST, "manifests": []}
    assert isinstance(parse(listed, documents.DOCKER_LIST), ImageIndex)


@pytest.mark.parametrize(
    "changes",
    [
        {"mediaType": documents.MEDIA_INDEX},
        {"manifests": []},
        {"schemaVersion": 1},
        {"schemaVersion": True},
        {"schemaVersion": "2"},
        {"layers": {}},
        {"layers": [1]},
        {"config": "absent"},
        {"config": []},
        {"layers": [descriptor(size=-1)]},
        {"layers": [descriptor(size=True)]},
        {"layers": [descriptor(size=2**63)]},
        {"layers": [descriptor(size=1.5)]},
        {"layers": [descriptor(size="5")]},
        {"layers": [descriptor(digest="sha256:../../../etc/passwd")]},
        {"layers": [descriptor(digest=DIGEST[:-1])]},
        {"layers": [descriptor(digest="md5:" + "0" * 32)]},
        {"layers": [descriptor(media_type="no type")]},
        {"layers": [descriptor(annotations=[])]},
        {"layers": [descriptor(annotations={"a": 1})]},
        {"layers": [descriptor()] * (documents.MAX_LAYERS + 1)},
        {"subject": "x"},
        {"annotations": []},
        {"artifactType": 3},
        {"annotations": {"a": ["b"]}},
        {"layers": [descriptor(platform="linux")]},
    ],
)
def test_bad_manifests(changes: dict[str, Any]) -> None:
    """Wrong types, sizes, digests and ambiguous documents are refused."""
    with pytest.raises(ImageError):
        parse(manifest(**changes))


@pytest.mark.parametrize("layers", ["absent", None, []])
def test_an_image_without_layers(layers: object) -> None:
    """Go writes null for a list without items."""
    parsed = parse(manifest(layers=layers))
    assert isinstance(parsed, Manifest) and parsed.layers == ()


def test_null_in_a_map_is_an_empty_text() -> None:
    """As Go reads it."""
    parsed = parse(manifest(annotations={"a": None, "b": "c"}))
    assert parsed.annotations == {"a": "", "b": "c"}
    labels = {"rootfs": {"type": "layers"}, "config": {"Labels": {"a": None}}}
    assert documents.parse_config(json.dumps(labels).encode()).labels == {"a": ""}


@pytest.mark.parametrize(
    "odd",
    [
        {"artifactType": "sbom"},
        {"artifactType": "application/json; charset=utf-8"},
        {"annotations": {"k": None}},
        {"annotations": ["k"]},
        {"digest": "md5:" + "0" * 32},
        {"size": -1},
        {"mediaType": "no type"},
        {"platform": "linux"},
    ],
)
def test_an_odd_entry_hides_no_other(odd: dict[str, Any]) -> None:
    own = descriptor(documents.MEDIA_MANIFEST, OTHER, artifactType="x/y")
    entries = [descriptor(documents.MEDIA_MANIFEST) | odd, own, "nothing", None]
    raw = json.dumps({"schemaVersion": 2, "mediaType": documents.MEDIA_INDEX, "manifests": entries}).encode()
    parsed = documents.parse_manifest(raw, documents.MEDIA_INDEX)
    assert isinstance(parsed, ImageIndex)
    assert [one.digest for one in parsed.manifests if one.artifact_type == "x/y"] == [OTHER]
    again = referrers.add_to_index(raw, Descriptor(documents.MEDIA_MANIFEST, Digest("sha256:" + "2" * 64), 1))
    assert json.loads(again)["manifests"][:4] == entries
    assert referrers.add_to_index(raw, parsed.manifests[-1]) == raw


@pytest.mark.parametrize("manifests", ["absent", None])
def test_an_empty_index(manifests: object) -> None:
    """As umoci init makes it."""
    listed = {"schemaVersion": 2, "mediaType": documents.MEDIA_INDEX, "manifests": manifests}
    document = {key: value for key, value in listed.items() if value != "absent"}
    parsed = parse(document, documents.MEDIA_INDEX)
    assert isinstance(parsed, ImageIndex) and parsed.manifests == ()
    own = Descriptor(documents.MEDIA_MANIFEST, OTHER, 7)
    added = documents.parse_manifest(referrers.add_to_index(json.dumps(document).encode(), own), documents.MEDIA_INDEX)
    assert isinstance(added, ImageIndex) and added.manifests == (own,)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff",
        b"[]",
        b"nul",
        b"NaN",
        b'{"a":NaN}',
        b'{"a":1,"a":2}',
        b"[" * 100000,
        b'{"a":' * 100000,
        b'{"a":"\\ud800"}',
        b"1" * 5000,
        b" " * (documents.MAX_MANIFEST_BYTES + 1),
    ],
    ids=range(12),
)
def test_bad_json(raw: bytes) -> None:
    """Whatever the JSON parser can meet is an ImageError."""
    with pytest.raises(ImageError):
        documents.load_json(raw, "the document")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PATHS = [
    ("schemaVersion",),
    ("mediaType",),
    ("config",),
    ("layers",),
    ("subject",),
    ("layers", 0),
    ("annotations",),
    ("layers", 0, "size"),
    ("layers", 0, "digest"),
    ("layers", 1, "annotations"),
    ("layers", 1, "platform"),
]


@given(st.sampled_from(PATHS), JSON, st.sampled_from([documents.MEDIA_MANIFEST, documents.MEDIA_INDEX, "", "x"]))
def test_any_manifest(path: tuple[Any, ...], value: object, media_type: str) -> None:
    """Any value in any place is accepted or an ImageError."""
    document = manifest(subject=descriptor(), annotations={})
    place: Any = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with contextlib.suppress(ImageError):
        parse(document, media_type)


@given(st.binary(max_size=200), st.integers(0, 400))
def test_damaged_bytes(noise: bytes, at: int) -> None:
    """Noise in the bytes of a manifest or config is accepted or an ImageError."""
    raw = json.dumps(manifest()).encode()
    for parser in (lambda data: documents.parse_manifest(data, ""), documents.parse_config):
        with contextlib.suppress(ImageError):
            parser(raw[:at] + noise + raw[at + len(noise) :])


def test_config() -> None:
    """The fields that matter for running, with Go's nulls."""
    run: dict[str, Any] = {
        "Env": ["A=b"],
        "Entrypoint": ["/x"],
        "Cmd": None,
        "User": "1:2",
        "WorkingDir": "/w",
        "Labels": {"l": "1"},
        "Volumes": {"/v": {}},
        "ExposedPorts": {"80/tcp": {}},
        "StopSignal": "SIGINT",
    }
    document = {
        "os": "linux",
        "architecture": "amd64",
        "config": run,
        "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
    }
    config = documents.parse_config(json.dumps(document).encode())
    assert (config.os, config.architecture, config.diff_ids) == ("linux", "amd64", (DiffId(DIGEST),))
    assert (config.env, config.entrypoint, config.cmd) == (("A=b",), ("/x",), ())
    assert (config.user, config.working_dir, config.stop_signal) == ("1:2", "/w", "SIGINT")
    assert (config.labels, config.volumes, config.exposed_ports) == ({"l": "1"}, ("/v",), ("80/tcp",))
    bare = documents.parse_config(b'{"rootfs":{"type":"layers","diff_ids":null},"config":null}')
    assert bare.env == () and bare.diff_ids == ()


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"rootfs": {"type": "x"}},
        {"rootfs": {"type": "layers", "diff_ids": ["x"]}},
        {"rootfs": {"type": "layers"}, "config": []},
        {"rootfs": {"type": "layers"}, "config": {"Env": "A"}},
        {"rootfs": {"type": "layers"}, "config": {"Cmd": ["a\0b"]}},
        {"rootfs": {"type": "layers"}, "os": 3},
        {"rootfs": {"type": "layers"}, "config": {"Labels": {"a": 1}}},
    ],
)
def test_bad_configs(document: dict[str, Any]) -> None:
    """Wrong types, and NUL in what becomes argv, are refused."""
    with pytest.raises(ImageError):
        documents.parse_config(json.dumps(document).encode())


def test_add_to_index() -> None:
    """Appending keeps what others wrote, and is idempotent."""
    own = Descriptor(documents.MEDIA_MANIFEST, OTHER, 7, {"a": "b"}, artifact_type="x/y")
    first = referrers.add_to_index(None, own)
    assert referrers.add_to_index(first, own) == first
    theirs = json.loads(first) | {"unknown": [1]}
    again = json.loads(
        referrers.add_to_index(json.dumps(theirs).encode(), Descriptor(documents.MEDIA_MANIFEST, DIGEST, 1))
    )
    assert again["unknown"] == [1] and [item["digest"] for item in again["manifests"]] == [OTHER, DIGEST]
    parsed = documents.parse_manifest(json.dumps(again).encode(), documents.MEDIA_INDEX)
    assert isinstance(parsed, ImageIndex) and parsed.manifests[0] == own


def test_build_artifact() -> None:
    """What we attach is read back by our own parser."""
    subject = Descriptor(documents.MEDIA_MANIFEST, DIGEST, 3)
    layer = Descriptor("a/b", OTHER, 9)
    artifact = referrers.build_artifact("x/y", [layer], subject, {"k": "v"})
    parsed = documents.parse_manifest(artifact, documents.MEDIA_MANIFEST)
    assert isinstance(parsed, Manifest)
    assert (parsed.artifact_type, parsed.subject, parsed.layers) == ("x/y", subject, (layer,))
    assert parsed.config.digest == digests.sha256_digest(b"{}")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (
            'Bearer realm="https://a/t",service="s",scope="repository:x:pull,push"',
            ("bearer", {"realm": "https://a/t", "service": "s", "scope": "repository:x:pull,push"}),
        ),
        ('Basic realm="x"', ("basic", {"realm": "x"})),
        ('Basic realm="x", Bearer realm="y", service=z', ("bearer", {"realm": "y", "service": "z"})),
        ('Negotiate, Basic realm="a \\"quoted\\" b"', ("basic", {"realm": 'a "quoted" b'})),
        ("bearer", ("bearer", {})),
        ("", ("", {})),
        ("Digest x=1", ("", {})),
        ('Bearer realm="open', ("bearer", {})),
    ],
)
def test_challenges(header: str, expected: tuple[str, dict[str, str]]) -> None:
    """Bearer before Basic; commas inside quotes do not separate."""
    assert challenges.parse_challenge(header) == expected


@given(st.one_of(st.text(), st.text(alphabet='Bearbasic ="\\,;', max_size=60)))
def test_any_challenge(header: str) -> None:
    """No header raises."""
    scheme, parameters = challenges.parse_challenge(header)
    assert scheme in ("bearer", "basic", "") and (scheme or not parameters)


def test_digest_check() -> None:
    """Pieces count as a whole, for both algorithms."""
    check = digests.DigestCheck(digests.sha256_digest(b"abc"))
    check.update(b"a")
    assert not check.matches()
    check.update(memoryview(b"bc"))
    assert check.matches()
    empty_sha512 = (
        "sha512:"
        "cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce"
        "47d0d13c5d85f2b0ff8318d2877eec2f63b931bd47417a81a538327af927da3e"
    )
    assert digests.digest_matches(b"", empty_sha512) and not digests.digest_matches(b"x", empty_sha512)
    with pytest.raises(ImageError):
        digests.parse_digest(7)
