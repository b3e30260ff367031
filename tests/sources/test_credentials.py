"""Credential files and helpers: which entry wins, and that nothing secret shows."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest
import trio

from lazyfs.errors import HostError, LazyfsError, UserError
from lazyfs.sources import credentials
from lazyfs.sources.credentials import Credentials, auth_files_of, find_credentials


def encoded(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def auth_file(path: Path, **document: object) -> str:
    path.write_text(json.dumps(document))
    return str(path)


def helper(directory: Path, name: str, script: str) -> dict[str, str]:
    """An environment whose PATH starts with a real helper program."""
    directory.mkdir(exist_ok=True)
    program = directory / f"docker-credential-{name}"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}", "HOME": str(directory)}


async def test_most_specific_key_first(tmp_path: Path) -> None:
    """host/a/b before host/a before host, whatever their order in the file."""
    auths = {
        "h:5000": encoded("host", "1"),
        "h:5000/a/b": encoded("repo", "2"),
        "h:5000/a": encoded("group", "3"),
    }
    files = [auth_file(tmp_path / "auth.json", auths=auths)]
    for repository, user in (
        ("a/b", "repo"),
        ("a/c", "group"),
        ("x", "host"),
        ("a/b/c", "repo"),
        ("ab", "host"),
    ):
        assert (await find_credentials("h:5000", repository, files) or Credentials()).username == user
    assert await find_credentials("other", "a/b", files) is None


async def test_first_file_with_an_entry_wins(tmp_path: Path) -> None:
    """A file without an entry, and a missing one, are passed over."""
    files = [
        str(tmp_path / "missing.json"),
        auth_file(tmp_path / "empty.json"),
        auth_file(tmp_path / "other.json", auths={"x": encoded("x", "x"), "h": {}}),
        auth_file(tmp_path / "one.json", auths={"h": encoded("one", "pass:word")}),
        auth_file(tmp_path / "two.json", auths={"h": encoded("two", "2")}),
    ]
    assert await find_credentials("h", "a", files) == Credentials("one", "pass:word")


@pytest.mark.parametrize(
    "key", ["https://index.docker.io/v1/", "docker.io", "index.docker.io", "registry-1.docker.io"]
)
async def test_docker_hub_keys(tmp_path: Path, key: str) -> None:
    """Docker Hub's entries carry old names."""
    files = [auth_file(tmp_path / "config.json", auths={key: encoded("hub", "1")})]
    assert (await find_credentials("docker.io", "library/debian", files)) == Credentials("hub", "1")


async def test_forms_of_entries(tmp_path: Path) -> None:
    """Plain user names, identity tokens, registry tokens, and the old file format."""
    files = [
        auth_file(
            tmp_path / "config.json",
            auths={
                "a": {"username": "u", "password": "p"},
                "b": {"identitytoken": "refresh"},
                "c": {"registrytoken": "bearer"},
                "https://d/v1/": encoded("d", "1"),
            },
        ),
        auth_file(tmp_path / ".dockercfg", e=encoded("e", "1")),
    ]
    assert await find_credentials("a", "x", files) == Credentials("u", "p")
    assert await find_credentials("b", "x", files) == Credentials(identity_token="refresh")
    assert await find_credentials("c", "x", files) == Credentials(registry_token="bearer")
    assert await find_credentials("d", "x", files) == Credentials("d", "1")
    assert await find_credentials("e", "x", files) == Credentials("e", "1")


async def test_helpers_before_stored_entries(tmp_path: Path) -> None:
    """credHelpers beats credsStore beats auths; the server's name goes to stdin, not into argv."""
    script = (
        'read -r server; printf \'{"ServerURL":"%s","Username":"%s","Secret":"s%s"}\' "$server" "$0" "$#"'
    )
    helper(tmp_path / "bin", "special", script)
    environ = helper(tmp_path / "bin", "store", script)
    auths = {"h": encoded("stored", "1")}
    files = [
        auth_file(tmp_path / "config.json", auths=auths, credHelpers={"h": "special"}, credsStore="store")
    ]
    found = await find_credentials("h", "a", files, environ=environ)
    assert found is not None and found.username.endswith("-special") and found.password == "s1"
    other = await find_credentials("other", "a", files, environ=environ)
    assert other is not None and other.username.endswith("-store")


async def test_helper_without_an_entry(tmp_path: Path) -> None:
    """ "Not found" is no error; the identity token mark is understood."""
    environ = helper(tmp_path / "bin", "none", "echo credentials not found in native keychain; exit 1")
    files = [auth_file(tmp_path / "a.json", auths={"h": encoded("stored", "1")}, credsStore="none")]
    assert await find_credentials("h", "a", files, environ=environ) == Credentials("stored", "1")
    environ = helper(tmp_path / "bin", "token", 'echo \'{"Username":"<token>","Secret":"refresh"}\'')
    files = [auth_file(tmp_path / "b.json", credsStore="token")]
    found = await find_credentials("h", "a", files, environ=environ)
    assert found == Credentials(identity_token="refresh")


@pytest.mark.parametrize(
    "script", ["echo SECRET; exit 3", "echo SECRET", 'echo \'{"Username":1,"Secret":"SECRET"}\'']
)
async def test_failing_helper(tmp_path: Path, script: str) -> None:
    """A clear error that quotes nothing of the helper's output."""
    environ = helper(tmp_path / "bin", "bad", script)
    files = [auth_file(tmp_path / "a.json", credsStore="bad")]
    with pytest.raises(UserError, match="docker-credential-bad") as caught:
        await find_credentials("h", "a", files, environ=environ)
    assert "SECRET" not in str(caught.value)


async def test_missing_and_hostile_helper(tmp_path: Path) -> None:
    """A helper that is not installed is named; a path instead of a name is refused."""
    for name in ("absent", "../../bin/sh", "", 7, "a b"):
        files = [auth_file(tmp_path / "a.json", credHelpers={"h": name})]
        with pytest.raises(UserError):
            await find_credentials("h", "a", files)


async def test_hanging_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper that waits for ever is ended at the deadline."""
    monkeypatch.setattr(credentials, "HELPER_DEADLINE_S", 0.05)
    environ = helper(tmp_path / "bin", "slow", "exec sleep 1000")
    files = [auth_file(tmp_path / "a.json", credsStore="slow")]
    with trio.fail_after(20), pytest.raises(UserError, match="did not answer"):
        await find_credentials("h", "a", files, environ=environ)


@pytest.mark.parametrize(
    "content",
    [
        "SECRET",
        "[]",
        '{"auths":[]}',
        '{"auths":{"h":"SECRET"}}',
        '{"auths":{"h":{"auth":"SECRET!"}}}',
        '{"auths":{"h":{"auth":"/w=="}}}',
        '{"auths":{"h":{"username":["SECRET"]}}}',
        '{"credHelpers":7}',
        "[" * 99999,
    ],
    ids=range(9),
)
async def test_malformed_files(tmp_path: Path, content: str) -> None:
    """The file is named, its content is not shown."""
    path = tmp_path / "auth.json"
    path.write_text(content)
    with pytest.raises(LazyfsError, match=r"auth\.json") as caught:
        await find_credentials("h", "a", [str(path)])
    assert "SECRET" not in str(caught.value)


async def test_unreadable_places(tmp_path: Path) -> None:
    """A directory is an error, a FIFO does not hang."""
    with pytest.raises(HostError):
        await find_credentials("h", "a", [str(tmp_path)])
    os.mkfifo(tmp_path / "fifo")
    with trio.fail_after(20):
        assert await find_credentials("h", "a", [str(tmp_path / "fifo")]) is None


def test_usual_places() -> None:
    """The order of skopeo(1) and docker; another environment than ours can be given."""
    environ = {"HOME": "/h", "XDG_RUNTIME_DIR": "/run/user/7"}
    assert auth_files_of(environ, 7) == (
        "/run/user/7/containers/auth.json",
        "/run/containers/7/auth.json",
        "/h/.config/containers/auth.json",
        "/h/.docker/config.json",
        "/h/.dockercfg",
    )
    assert auth_files_of(environ | {"REGISTRY_AUTH_FILE": "/x"}, 7) == ("/x",)
    assert "/d/config.json" in auth_files_of(environ | {"DOCKER_CONFIG": "/d"}, 7)
    assert auth_files_of({}, 7) == ("/run/containers/7/auth.json",)


def test_no_secret_in_repr() -> None:
    """Credentials can end up in a debugger or a log: they show nothing."""
    assert "SECRET" not in repr(Credentials("SECRET", "SECRET", "SECRET", "SECRET"))
