"""Platforms: their names, which image of an index is chosen for one, and which runs on which."""

from __future__ import annotations

import json

import pytest

from lazyfs.core.oci import documents, platforms
from lazyfs.core.oci.documents import ImageIndex, Platform
from lazyfs.core.oci.platforms import select_platform
from lazyfs.errors import ImageError, UserError
from tests.core.test_oci import DIGEST, OTHER, descriptor, parse


def index(*platforms: str | None) -> ImageIndex:
    entries = []
    for number, platform in enumerate(platforms):
        entry = descriptor(documents.MEDIA_MANIFEST, f"sha256:{number:064x}")
        if platform is not None:
            os, architecture, *variant = platform.split("/")
            entry["platform"] = {"os": os, "architecture": architecture, "variant": "".join(variant)}
        entries.append(entry)
    raw = json.dumps({"schemaVersion": 2, "mediaType": documents.MEDIA_INDEX, "manifests": entries}).encode()
    parsed = documents.parse_manifest(raw, documents.MEDIA_INDEX)
    assert isinstance(parsed, ImageIndex)
    return parsed


@pytest.mark.parametrize(
    ("platforms", "wanted", "number"),
    [
        (["linux/amd64", "linux/arm64"], "linux/arm64", 1),
        (["linux/arm64/v8", "linux/arm64"], "linux/arm64", 0),
        (["linux/arm/v5", "linux/arm/v6", "linux/arm/v7"], "linux/arm", 2),
        (["linux/arm/v5", "linux/arm/v6", "linux/arm/v7"], "linux/arm/v6", 1),
        (["linux/arm/v5", "linux/arm/v8"], "linux/arm/v7", 0),
        (["linux/amd64/v3", "linux/amd64"], "linux/amd64", 1),
        (["linux/amd64/v2", "linux/amd64"], "linux/amd64/v3", 0),
        (["unknown/unknown", "linux/amd64"], "linux/amd64", 1),
        (["windows/amd64", None], "linux/amd64", 1),
    ],
)
def test_select_platform(platforms: list[str | None], wanted: str, number: int) -> None:
    """The exact variant, else the best lower one; attestations are never chosen."""
    assert select_platform(index(*platforms), wanted).digest == f"sha256:{number:064x}"


@pytest.mark.parametrize(
    ("platforms", "wanted"),
    [
        ([], "linux/amd64"),
        (["linux/amd64/v3"], "linux/amd64"),
        (["unknown/unknown"], "linux/amd64"),
        ([None, None], "linux/arm"),
    ],
)
def test_no_platform(platforms: list[str | None], wanted: str) -> None:
    """Nothing that would not run is chosen."""
    with pytest.raises(ImageError):
        select_platform(index(*platforms), wanted)


def test_an_artifact_is_no_image_of_its_platform() -> None:
    """Attestations may stand before the image; go-containerregistry gives an image the type of its config."""
    amd64 = {"os": "linux", "architecture": "amd64"}
    entries = [
        descriptor(documents.MEDIA_MANIFEST, DIGEST, platform=amd64, artifactType="application/vnd.x"),
        descriptor("application/vnd.x", DIGEST, platform=amd64),
        descriptor(documents.MEDIA_MANIFEST, OTHER, platform=amd64, artifactType=documents.MEDIA_CONFIG),
    ]
    listed = {"schemaVersion": 2, "mediaType": documents.MEDIA_INDEX, "manifests": entries}
    parsed = parse(listed, documents.MEDIA_INDEX)
    assert isinstance(parsed, ImageIndex)
    assert select_platform(parsed, "linux/amd64").digest == OTHER


@pytest.mark.parametrize(
    ("text", "platform"),
    [
        ("linux/x86_64", "linux/amd64"),
        ("Linux/AMD64", "linux/amd64"),
        ("linux/amd64/v1", "linux/amd64"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/arm64/8", "linux/arm64"),
        ("linux/arm/7", "linux/arm/v7"),
        ("linux/armhf", "linux/arm/v7"),
        ("linux/armel", "linux/arm/v6"),
        ("linux/i386", "linux/386"),
        ("macos/arm64", "darwin/arm64"),
        ("arm64", "linux/arm64"),
        ("x86-64", "linux/amd64"),
        ("s390x", "linux/s390x"),
    ],
)
def test_platforms_as_others_write_them(text: str, platform: str) -> None:
    assert str(platforms.parse_platform(text)) == platform
    assert select_platform(index("windows/amd64", text if "/" in text else platform), platform).digest[-1] == "1"


@pytest.mark.parametrize(
    ("have", "wanted", "runs"),
    [
        ("linux/arm64", "linux/amd64", False),
        ("linux/aarch64", "linux/arm64", True),
        ("linux/arm/v6", "linux/arm/v7", True),
        ("linux/amd64/v3", "linux/amd64", False),
        ("windows/amd64", "linux/amd64", False),
        ("//", "linux/amd64", True),
    ],
)
def test_what_runs_on_what(have: str, wanted: str, runs: bool) -> None:
    assert platforms.runs_on(Platform(*have.split("/")), platforms.parse_platform(wanted)) is runs


def test_platform_names() -> None:
    """Machines become platforms; what is unknown is the user's to name."""
    assert platforms.host_platform("x86_64") == "linux/amd64"
    assert platforms.host_platform("aarch64") == "linux/arm64"
    for call, text in (
        (platforms.host_platform, "pdp11"),
        (platforms.parse_platform, "linux"),
        (platforms.parse_platform, "a/b/c/d"),
    ):
        with pytest.raises(UserError):
            call(text)
