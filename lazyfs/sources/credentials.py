"""Credentials from the files of docker, podman and skopeo, and from their credential helpers.

Formats: containers-auth.json(5), docker's config.json, and the docker-credential-helpers protocol (server URL
on stdin, JSON on stdout). Secrets are never put into argv, messages, logs or reprs.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from lazyfs.errors import HostError, UserError

HELPER_DEADLINE_S = 30.0  # a helper may ask a key ring or a cloud; one that takes longer hangs
MAX_AUTH_FILE_BYTES = 1 << 20
MAX_HELPER_ANSWER_BYTES = 1 << 20
DOCKER_HUB_KEY = "https://index.docker.io/v1/"
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# docker-credential-helpers, credentials/error.go: not an error, just nothing stored.
_NOT_FOUND = b"credentials not found in native keychain"


@dataclass(frozen=True)
class Credentials:
    """For one registry namespace: user and password, an OAuth2 identity token, or a bearer token."""

    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)


def auth_files_of(environ: Mapping[str, str], uid: int | None = None) -> tuple[str, ...]:
    """The files that docker, podman and skopeo would read for a user, in order of preference.

    `environ` is the user's environment, which is not this process's when a daemon acts for him; `uid` None
    means this process's.
    """
    if explicit := environ.get("REGISTRY_AUTH_FILE"):
        return (explicit,)
    home = environ.get("HOME", "")
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    config = environ.get("XDG_CONFIG_HOME") or (f"{home}/.config" if home else "")
    docker = environ.get("DOCKER_CONFIG") or (f"{home}/.docker" if home else "")
    places = (
        (runtime, "containers/auth.json"),
        (f"/run/containers/{os.getuid() if uid is None else uid}", "auth.json"),
        (config, "containers/auth.json"),
        (docker, "config.json"),
        (home, ".dockercfg"),
    )
    return tuple(f"{base}/{name}" for base, name in places if base)


async def find_credentials(
    registry: str,
    repository: str,
    auth_files: Sequence[str] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
) -> Credentials | None:
    """The credentials for `registry`/`repository`, from the first file that has some; None = anonymous.

    Per file: credHelpers, then credsStore, then auths (as docker does), the most specific namespace first.
    `auth_files` None means the usual places of `environ` (default: this process's). Helpers get `environ`, too.
    Raises UserError (malformed file, failing helper) or HostError (unreadable file).
    """
    environ = os.environ if environ is None else environ
    if auth_files is None:
        auth_files = auth_files_of(environ)
    keys = _keys(registry, repository)
    for path in auth_files:
        document = await trio.to_thread.run_sync(_load, path)
        if document is None:
            continue
        found = await _from_document(document, path, keys, environ)
        if found is not None:
            return found
    return None


def _keys(registry: str, repository: str) -> list[str]:
    """Keys to look for, the most specific first: host/a/b, host/a, host (containers-auth.json(5))."""
    parts = [registry, *repository.split("/")]
    return ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _load(path: str) -> dict[str, Any] | None:
    """Blocking. The file's JSON object, None if there is no such file."""
    try:
        # Non-blocking, so that a FIFO in the place of the file is an error and no endless wait.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            raw = file.read(MAX_AUTH_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise HostError(f"{path}: cannot read credentials: {error.strerror}") from None
    try:
        if len(raw) > MAX_AUTH_FILE_BYTES:
            raise ValueError
        document = json.loads(raw or b"{}")
        if not isinstance(document, dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not a file of registry credentials", "repair it or log in again") from None
    return {"auths": document} if os.path.basename(path) == ".dockercfg" else document


def _section(document: dict[str, Any], key: str, path: str) -> dict[str, Any]:
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key!r} is not an object", "repair it or log in again")
    return value


async def _from_document(
    document: dict[str, Any], path: str, keys: list[str], environ: Mapping[str, str]
) -> Credentials | None:
    helpers = {_normal_key(key): value for key, value in _section(document, "credHelpers", path).items()}
    for key in keys:
        if key in helpers:
            return await _ask_helper(helpers[key], key, path, environ)
    if document.get("credsStore"):
        found = await _ask_helper(document["credsStore"], keys[-1], path, environ)
        if found is not None:
            return found
    entries = {_normal_key(key): value for key, value in _section(document, "auths", path).items()}
    for key in keys:
        if (entry := entries.get(key)) and (found := _parse_entry(entry, key, path)) is not None:
            return found
    return None


def _normal_key(key: str) -> str:
    """Old files have URLs as keys (https://index.docker.io/v1/): keep the host. Docker Hub has aliases."""
    if "://" in key:
        key = key.partition("://")[2].partition("/")[0]
    key = key.rstrip("/").removesuffix("/v1").removesuffix("/v2")
    host, slash, rest = key.partition("/")
    if host in ("index.docker.io", "registry-1.docker.io"):
        host = "docker.io"
    return host + slash + rest


def _parse_entry(entry: object, key: str, path: str) -> Credentials | None:
    bad = UserError(f"{path}: the entry for {key} is malformed", "log in again")
    if not isinstance(entry, dict):
        raise bad
    values = {
        name: entry.get(name) or ""
        for name in ("auth", "username", "password", "identitytoken", "registrytoken")
    }
    if not all(isinstance(value, str) for value in values.values()):
        raise bad
    username, password = values["username"], values["password"]
    if values["auth"]:
        try:
            text = base64.b64decode(values["auth"], validate=True).decode()
        except (binascii.Error, ValueError):
            raise bad from None
        username, colon, password = text.partition(":")
        if not colon:
            raise bad
        password = password.rstrip("\0")  # docker's own files have had trailing NULs
    found = Credentials(username, password, values["identitytoken"], values["registrytoken"])
    return found if found != Credentials() else None


async def _ask_helper(name: object, key: str, path: str, environ: Mapping[str, str]) -> Credentials | None:
    if not isinstance(name, str) or not _HELPER_NAME.fullmatch(name):
        raise UserError(f"{path}: bad name of a credential helper for {key}")
    program = f"docker-credential-{name}"
    server = DOCKER_HUB_KEY if key == "docker.io" else key
    try:
        with trio.fail_after(HELPER_DEADLINE_S):
            done = await trio.run_process(
                [program, "get"], stdin=server.encode(), capture_stdout=True, stderr=subprocess.DEVNULL,
                check=False, env=dict(environ),
            )  # fmt: skip
    except trio.TooSlowError:
        raise UserError(
            f"{program} did not answer within {HELPER_DEADLINE_S:.0f} s", f"named in {path}"
        ) from None
    except OSError as error:
        hint = f"install it, or remove it from {path}"
        raise UserError(f"cannot run the credential helper {program}: {error.strerror}", hint) from None
    if done.returncode != 0:
        if _NOT_FOUND in done.stdout:
            return None
        # Its output may hold secrets or anything else: not quoted.
        raise UserError(
            f"{program} failed with exit code {done.returncode}", f"try: echo {server} | {program} get"
        )
    try:
        if len(done.stdout) > MAX_HELPER_ANSWER_BYTES:
            raise ValueError
        answer = json.loads(done.stdout)
        username, secret = answer["Username"], answer["Secret"]
        if not isinstance(username, str) or not isinstance(secret, str):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{program} gave an answer that is not understood") from None
    if username == "<token>":  # docker's mark for an identity token
        return Credentials(identity_token=secret)
    return Credentials(username, secret)
