"""The images that other tests stand on: what they hold, and that skopeo and the registry take them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import leaks, realimages
from tests.layout import Layout, push
from tests.servers import RegistryServer


def test_debian_image_unpacks_with_every_kind_of_change(tmp_path: Path) -> None:
    root = realimages.unpack(realimages.debian(), "gzip", tmp_path / "bundle")
    assert not (root / "etc/issue").exists()
    assert os.listdir(root / "etc/apt") == ["only.conf"]
    assert (root / "etc/logrotate.d").is_file()
    assert (root / "etc/debian_version/inner").is_file()
    assert (root / "opt/bash").stat().st_ino == (root / "usr/bin/bash").stat().st_ino
    assert os.getxattr(root / "opt/ping", "security.capability")
    assert (root / "opt/inserted/link").read_text() == "inserted by umoci\n"
    assert (root / "opt/sparse/holes").stat().st_size == 20 << 20


@pytest.mark.parametrize("tag", [*realimages.TAGS, "platforms"])
def test_registry_takes_every_variant_unchanged(registry: RegistryServer, tag: str) -> None:
    layout = realimages.busybox()
    push(layout, tag, f"{registry.host}/images/{tag}:latest")
    accept = {"Accept": "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json"}
    status, headers, _ = registry.request("GET", f"/v2/images/{tag}/manifests/latest", headers=accept)
    assert status == 200
    assert headers["docker-content-digest"] == Layout(layout).resolve(tag)["digest"]


def test_registry_takes_docker_schema_2(registry: RegistryServer) -> None:
    push(realimages.busybox(), "gzip", f"{registry.host}/images/docker:latest", docker=True)
    accept = {"Accept": "application/vnd.docker.distribution.manifest.v2+json"}
    _, headers, _ = registry.request("GET", "/v2/images/docker/manifests/latest", headers=accept)
    assert headers["content-type"] == accept["Accept"]


def test_leak_check_sees_a_mount_and_waits_for_it_to_go(tmp_path: Path) -> None:
    before = leaks.traces(tmp_path)
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    command = ["mount", "-t", "overlay", "overlay", "-o", options, str(tmp_path / "merged")]
    assert os.spawnvp(os.P_WAIT, command[0], command) == 0
    left = leaks.wait_until_gone(tmp_path, before, deadline_s=0)
    assert left.describe() == f"mount overlay {tmp_path}/merged"
    leaks.remove(left)
    assert not leaks.wait_until_gone(tmp_path, before)
