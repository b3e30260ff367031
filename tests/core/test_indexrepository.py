"""Index repositories: what a text with placeholders means for an image."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.oci.indexrepository import index_repository, place_of
from lazyfs.core.oci.reference import DirectoryReference, parse_reference
from lazyfs.errors import UserError

HUB = "python:3"
PORT = "127.0.0.1:5000/team/app@sha256:" + 64 * "1"


@pytest.mark.parametrize(
    ("template", "image", "place"),
    [
        ("registry.example/indexes", HUB, "registry.example/indexes"),
        ("registry.example/indexes", PORT, "registry.example/indexes"),
        ("indexes", HUB, "docker.io/library/indexes"),
        ("docker://a.example:5/i", HUB, "a.example:5/i"),
        ("a.example/{registry}/{repository}", HUB, "a.example/docker.io/library/python"),
        ("a.example:5/i/{registry}/{repository}", PORT, "a.example:5/i/127.0.0.1-5000/team/app"),
        ("{registry}/indexes", PORT, "127.0.0.1:5000/indexes"),
        ("{registry}/{repository}-index", HUB, "docker.io/library/python-index"),
        ("a.example/{repository}-index", HUB, "a.example/library/python-index"),
        ("oci:/srv/{registry}/{repository}", HUB, "oci:/srv/docker.io/library/python"),
        ("oci+https://a.example/{repository}/", HUB, "oci+https://a.example/library/python"),
        ("a.example/{registry}/{repository}", "oci:/srv/My Images/../app:1", "a.example/oci/srv/my-images/app"),
        ("a.example/{registry}/{repository}", "oci+https://b.example:8/x/y", "a.example/b.example-8/x/y"),
        ("a.example/{registry}/{repository}", "oci+https://[::1]", "a.example/1/unnamed"),
    ],
)
def test_what_a_template_means(template: str, image: str, place: str) -> None:
    found = index_repository(template, parse_reference(image))
    assert place_of(found) == place
    assert place_of(parse_reference(place)) == place


@pytest.mark.parametrize(
    "template",
    [
        "", "a.example/i:1", "a.example/i@sha256:" + 64 * "1", "127.0.0.1:5000", "oci:/srv:1", "oci+https://a/b:1",
        "a.example/{tag}", "a.example/I", "oci:", "/srv", "docker-archive:x", "a.example/" + 300 * "x",
    ],
)  # fmt: skip
def test_what_is_none(template: str) -> None:
    with pytest.raises(UserError):
        index_repository(template, parse_reference(HUB))


@given(st.text(max_size=200))
def test_any_directory_has_a_name(path: str) -> None:
    found = index_repository("a.example/{registry}/{repository}", DirectoryReference(path))
    assert place_of(found).startswith("a.example/oci/")
