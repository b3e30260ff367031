"""References: what is accepted, how it is completed, and that everything else is a clear error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.core.oci.digests import is_digest
from lazyfs.core.oci.reference import DirectoryReference, RegistryReference, WebReference, parse_reference
from lazyfs.errors import UserError

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("debian", "docker.io/library/debian:latest"),
        ("debian:12", "docker.io/library/debian:12"),
        ("grafana/grafana", "docker.io/grafana/grafana:latest"),
        ("docker://debian", "docker.io/library/debian:latest"),
        ("index.docker.io/debian", "docker.io/library/debian:latest"),
        ("docker.io/debian", "docker.io/library/debian:latest"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x/y:1.2_3-4", "localhost:5000/x/y:1.2_3-4"),
        ("127.0.0.1:5000/demo", "127.0.0.1:5000/demo:latest"),
        ("[::1]:5000/demo", "[::1]:5000/demo:latest"),
        ("ghcr.io/a/b/c__d", "ghcr.io/a/b/c__d:latest"),
        (f"ghcr.io/a@{DIGEST}", f"ghcr.io/a@{DIGEST}"),
        (f"ghcr.io/a:tag@{DIGEST}", f"ghcr.io/a:tag@{DIGEST}"),
        ("oci:some/dir", "oci:some/dir"),
        ("oci:/dir:tag", "oci:/dir:tag"),
        (f"oci:/dir@{DIGEST}", f"oci:/dir@{DIGEST}"),
        ("oci+https://host/path/", "oci+https://host/path"),
        ("oci+http://127.0.0.1:80/a/b:v1", "oci+http://127.0.0.1:80/a/b:v1"),
        (f"oci+https://host/a@{DIGEST}", f"oci+https://host/a@{DIGEST}"),
        ("oci+https://host:8443", "oci+https://host:8443"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    """str() gives the canonical text, and parsing that changes nothing more."""
    reference = parse_reference(text)
    assert str(reference) == canonical
    assert parse_reference(canonical) == reference


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "UPPER",
        "a/UPPER",
        "a:",
        "a:bad tag",
        "a@sha256:12",
        "a@md5:" + "0" * 32,
        "a//b",
        "/a",
        "a/",
        "host.example/",
        "host.example:port/a",
        "a:" + "t" * 129,
        "x" * 300,
        "a\n",
        "a\0b",
        "..",
        "host/../x",
        "oci:",
        "oci::tag",
        "oci:a:-tag",
        "oci+ftp://x/y",
        "oci+https://",
        "oci+https://user@host/x",
        "oci+https://host/a?query",
        "oci+https://host/a#b",
        "oci+https://host/../x",
        "oci+https://host/a:b::c",
        "oci-archive:x.tar",
        "docker-archive:x.tar",
        "dir:x",
        "docker://",
        "-a",
        "a_/b",
    ],
)
def test_bad_references(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(UserError):
        parse_reference(text)


def test_kinds_and_selectors() -> None:
    """A digest wins over a tag; a layout without a name selects its only image."""
    both = parse_reference(f"ghcr.io/a:tag@{DIGEST}")
    assert isinstance(both, RegistryReference)
    assert (both.tag, both.digest, both.selector) == ("tag", DIGEST, DIGEST)
    directory = parse_reference("oci:x/../y:t")
    assert isinstance(directory, DirectoryReference)
    assert directory.selector == "t"
    web = parse_reference("oci+https://h/p")
    assert isinstance(web, WebReference)
    assert web.selector == "" and web.ref is None


@given(st.one_of(st.text(max_size=80), st.text(alphabet="ab.:/@-_[]0oci+htps", max_size=60)))
def test_any_text(text: str) -> None:
    """Any text is a reference whose canonical text means the same, or a UserError."""
    try:
        reference = parse_reference(text)
    except UserError:
        return
    assert parse_reference(str(reference)) == reference
    if isinstance(reference, RegistryReference):
        assert "/" in str(reference) and ".." not in reference.repository


def test_digests() -> None:
    """Only what is verified counts as a digest."""
    assert is_digest(DIGEST) and is_digest("sha512:" + "0" * 128)
    assert not is_digest(DIGEST.upper()) and not is_digest(DIGEST + "\n") and not is_digest("sha256:../../x")
