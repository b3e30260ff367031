"""Bundles by themselves, hostile images, ordinary users. With the real runc."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lazyfs.commands import containers
from lazyfs.commands.arguments import parser
from lazyfs.containers.bundle import BundleOptions, MountedImage, delete_bundle, make_bundle
from lazyfs.containers.imageroot import ImageRoot
from lazyfs.errors import HostError, ImageError, LazyfsError, UserError
from lazyfs.mounting.options import MountOptions
from tests.containers.lazyrun import DEADLINE_S, Runner, configure, make_template
from tests.containers.plainroots import PlainRoots, mounted_image, run_plainly

ORDINARY = 12345  # an id that no account has

# -- looking into a hostile image ------------------------------------------------------------------------


def test_account_files_are_read_inside_the_image_only(template: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("host:x:5:5::/:\n")
    etc = template / "root" / "etc"
    passwd = etc / "passwd"
    for target in (
        "/etc/passwd",
        "../../../../../../../../../../etc/passwd",
        str(secret),
        "/proc/self/environ",
        ".",
    ):
        passwd.unlink()
        passwd.symlink_to(target)
        with ImageRoot(str(template / "root")) as root:
            assert root.read_account_file("/etc/passwd") == b""
    passwd.unlink()
    passwd.symlink_to("/../lib/passwd")
    (template / "root" / "lib").mkdir()
    (template / "root" / "lib" / "passwd").write_text("inside")
    with ImageRoot(str(template / "root")) as root:
        assert root.read_account_file("/etc/passwd") == b"inside"
    shutil.rmtree(etc)
    etc.symlink_to("/etc")
    with ImageRoot(str(template / "root")) as root:
        assert root.read_account_file("/etc/passwd") == b""


def test_account_files_that_are_no_files_do_not_hold_us_up(template: Path) -> None:
    passwd = template / "root" / "etc" / "passwd"
    passwd.unlink()
    os.mkfifo(passwd)
    with ImageRoot(str(template / "root")) as root:
        assert root.read_account_file("/etc/passwd") == b""
    passwd.unlink()
    os.mknod(passwd, 0o020666, os.makedev(1, 5))  # /dev/zero has no end
    with ImageRoot(str(template / "root")) as root:
        assert root.read_account_file("/etc/passwd") == b""


def test_a_huge_account_file_is_refused(template: Path) -> None:
    os.truncate(template / "root" / "etc" / "group", 1 << 40)
    with ImageRoot(str(template / "root")) as root, pytest.raises(ImageError, match="larger"):
        root.read_account_file("/etc/group")


def test_paths_are_followed_inside_the_image(template: Path) -> None:
    root = template / "root"
    for name, target in (
        ("a", "/b/../c"),
        ("c", "d"),
        ("loop", "loop"),
        ("up", "../../etc"),
        ("p", "/proc/self"),
    ):
        (root / name).symlink_to(target)
    with ImageRoot(str(root)) as image:
        assert image.canonical("/a/x") == "/d/x"
        assert image.canonical("up/./passwd") == "/etc/passwd"
        assert image.canonical("/p/fd/8") == "/proc/self/fd/8"
        assert image.canonical("/..//") == "/"
        with pytest.raises(ImageError, match="symbolic links"):
            image.canonical("/loop/x")
        with pytest.raises(ImageError, match="too long"):
            image.canonical("/x" * 5000)


@pytest.mark.parametrize(
    ("config", "target"),
    [
        ({"WorkingDir": "/link/fd/8"}, "/proc/self"),
        ({"WorkingDir": "/link"}, "proc/1/cwd"),
        ({"Volumes": {"/etc/passwd": {}}}, "/"),
    ],
)
def test_links_to_forbidden_places_are_refused(run: Runner, config: dict[str, Any], target: str) -> None:
    """CVE-2024-21626 and CVE-2023-27561 by way of a symbolic link in the image."""
    (run.template / "root" / "link").symlink_to(target)
    configure(run.template, **config)
    with pytest.raises(ImageError):
        run.status("image")
    assert not any(run.state.iterdir())


# -- bundles by themselves -------------------------------------------------------------------------------


def test_a_bundle_stays_and_runs_under_plain_runc(template: Path, tmp_path: Path) -> None:
    configure(template, Cmd=["sh", "-c", "echo from the image > /written"], Labels={"run.oci.handler": "x"})
    roots = PlainRoots(template)
    directory = tmp_path / "bundle"
    bundle = make_bundle("image", str(directory), BundleOptions(mount=MountOptions(writable=True)), roots)
    try:
        assert "labels" in bundle.notes[0]
        command = ["runc", "run", "--bundle", str(directory), f"lazyfs-test-{os.getpid()}"]
        subprocess.run(command, check=True, timeout=DEADLINE_S)
        assert (directory / "upper" / "written").read_text() == "from the image\n"
        assert (directory / "config.json").stat().st_mode & 0o777 == 0o600
    finally:
        roots.detach(bundle.rootfs)


def test_the_bundle_command_says_what_to_do_next(
    template: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "bundle"
    roots = PlainRoots(template)
    words = ["bundle", "-e", "A=1", "--read-only", "image", str(directory), "sh", "-c", "exit 0"]
    try:
        assert containers.bundle(parser(words).parse_args(words), roots) == 0
        captured = capfd.readouterr()
        assert captured.out == f"{directory}\n"
        assert f"lazyfs umount {directory}/rootfs" in captured.err
        spec = json.loads((directory / "config.json").read_text())
        assert spec["process"]["args"] == ["sh", "-c", "exit 0"]
        assert spec["process"]["env"][0] == "A=1"
        assert spec["root"]["readonly"] is True
        with pytest.raises(HostError, match="still mounted"):
            delete_bundle(str(directory))
        assert (directory / "rootfs" / "bin" / "sh").exists()
    finally:
        roots.detach(str(directory / "rootfs"))
    delete_bundle(str(directory))
    assert not directory.exists()


def test_a_bundle_needs_an_empty_directory(template: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="not empty"):
        make_bundle("image", str(tmp_path / "full"), BundleOptions(), PlainRoots(template))
    with pytest.raises(UserError, match="cannot make"):
        make_bundle("image", str(tmp_path / "no" / "where"), BundleOptions(), PlainRoots(template))
    (tmp_path / "empty").mkdir(0o755)
    with pytest.raises(HostError, match="no such image"):
        make_bundle("missing", str(tmp_path / "empty"), BundleOptions(), PlainRoots(template))
    assert not any((tmp_path / "empty").iterdir())


# -- as an ordinary user ---------------------------------------------------------------------------------


class CopiedRoots:
    """A RootProvider that needs no rights."""

    def __init__(self, template: Path) -> None:
        self.template = template

    def attach(self, image: str, target: str, options: MountOptions) -> MountedImage:
        assert not (options.writable or options.dev or options.suid)
        shutil.copytree(self.template / "root", target, symlinks=True, dirs_exist_ok=True)
        return mounted_image(self.template)

    def detach(self, target: str) -> None:
        pass


def as_ordinary_user(home: Path, roots: CopiedRoots, *arguments: str) -> tuple[int, str]:
    """Status and output of `lazyfs run` under an ordinary user's ids, in a child process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.setgroups([])
            os.setresgid(ORDINARY, ORDINARY, ORDINARY)
            os.setresuid(ORDINARY, ORDINARY, ORDINARY)
            os.environ["HOME"] = str(home)
            os.environ.pop("XDG_RUNTIME_DIR", None)
            os.environ.pop("XDG_STATE_HOME", None)
            sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115  (this process ends here)
            status = run_plainly(list(arguments), home / "containers", roots)
        except LazyfsError as error:
            os.write(1, str(error).encode())
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader) as output:
        text = output.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def test_an_ordinary_user_runs_a_container(public: Path) -> None:
    roots = CopiedRoots(make_template(public / "template"))
    home = public / "home"
    home.mkdir()
    os.chown(home, ORDINARY, ORDINARY)
    status, output = as_ordinary_user(home, roots, "--rm", "image", "sh", "-c", "id -u; exit 5")
    assert (status, output) == (5, "0\n")
    status, output = as_ordinary_user(home, roots, "--rm", "-u", "bob", "image")
    assert status == 99
    assert "uid 1000" in output
    assert not any((home / "containers").iterdir())
