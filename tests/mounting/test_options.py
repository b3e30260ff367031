"""Mount options: what mount(8) hands over, what users write, and everything else."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.commands import arguments, mounthelper
from lazyfs.errors import UserError
from lazyfs.mounting import options
from lazyfs.mounting.options import MountOptions, parse, quote, split
from lazyfs.sources.access import Access

ROOT = Path(__file__).parents[2]


def test_defaults_are_read_only_and_safe() -> None:
    assert parse([]) == MountOptions()
    assert parse(["", "defaults", ",,"]) == MountOptions()
    wanted = MountOptions()
    assert not wanted.writable and not wanted.dev and not wanted.suid and wanted.executable


def test_every_option() -> None:
    text = (
        "rw,upperdir=/u,workdir=/w,backend=fuse,offline,cache=/c,dev,suid,noexec,allow_other,insecure,"
        "foreground,timeout=2.5,platform=linux/arm64/v8,authfile=/a,ca=/1,ca=/2,index_repository=a.example/i,"
        "index_repository=oci:/i,learn=push"
    )
    assert parse([text]) == MountOptions(
        writable=True,
        upperdir="/u",
        workdir="/w",
        backend="fuse",
        cache="/c",
        dev=True,
        suid=True,
        executable=False,
        allow_other=True,
        foreground=True,
        timeout_s=2.5,
        access=Access(
            pull="never",
            insecure=True,
            platform="linux/arm64",  # v8 goes without saying
            auth_files=("/a",),
            ca_files=("/1", "/2"),
            index_repositories=("a.example/i", "oci:/i"),
            learn="push",
        ),
    )


def test_when_a_registry_is_asked() -> None:
    texts = ("", "pull=missing", "pull=never", "offline", "offline,pull=always")
    wanted = ["always", "missing", "never", "never", "always"]
    assert [parse([text]).access.pull for text in texts] == wanted
    assert parse(["offline"]).access.offline and not parse(["pull=missing"]).access.offline
    for text in ("pull", "pull=", "pull=newer"):
        with pytest.raises(UserError, match="pull"):
            parse([text])


@pytest.mark.parametrize(
    "text", ["rw,ro", "dev,nodev", "suid,nosuid", "noexec,exec", "timeout=1,timeout=30s"]
)
def test_the_last_one_wins(text: str) -> None:
    assert parse([text]) == MountOptions()
    assert parse(text.split(",")) == MountOptions()  # also over several -o


def test_user_mounts_imply_what_mount_8_says() -> None:
    assert parse(["dev,suid,user"]) == MountOptions(executable=False)
    assert parse(["users,exec,dev"]) == MountOptions(dev=True)
    assert parse(["suid,owner"]) == MountOptions()


def test_options_for_others_are_ignored() -> None:
    text = (
        "_netdev,nofail,auto,noauto,async,sync,atime,noatime,relatime,x-systemd.automount,"
        "x-systemd.mount-timeout=60,X-mount.mkdir=0755,comment=x,uhelper=udisks2,nouser,user=anna,exec"
    )
    assert parse([text]) == MountOptions()


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('cache="/a,b"', [("cache", "/a,b")]),
        (r"cache=/a\,b,ro", [("cache", "/a,b"), ("ro", None)]),
        (r"cache=/a\b", [("cache", r"/a\b")]),
        ('a="x=y",b=', [("a", "x=y"), ("b", "")]),
        (" rw , ro ", [("rw", None), ("ro", None)]),
    ],
)
def test_commas_in_values(text: str, values: list[tuple[str, str | None]]) -> None:
    assert list(split(text)) == values


@given(st.text(st.characters(exclude_characters="\0")), st.text(st.characters(exclude_characters="\0")))
def test_quoted_values_come_back(first: str, second: str) -> None:
    names = [("a", first), ("b", second)]
    pairs = list(split(",".join(f"{name}={quote(value)}" for name, value in names)))
    assert [(name, (value or "").strip(" \t")) for name, value in pairs] == [
        (name, value.strip(" \t")) for name, value in names
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bakend=fuse", "did you mean backend"),
        ("sizelimit", "unknown mount option sizelimit"),
        ("backend=nfs", "backend=auto, kernel or fuse"),
        ("backend", "backend"),
        ("timeout=soon", "timeout=30"),
        ("timeout=nan", "timeout=30"),
        ("timeout=inf", "timeout=30"),
        ("timeout=-1", "timeout=30"),
        ("timeout=0", "timeout=30"),
        ("platform=linux", "platform=linux/arm64/v8"),
        ("platform=linux//v8", "platform=linux/arm64/v8"),
        ("platform=linux/../x", ""),
        ("cache=", "needs a path"),
        ("cache", "needs a path"),
        ("cache=/a\0b", "needs a path"),
        ("ro=1", "takes no value"),
        ("noatime=1", "unknown mount option noatime"),
        ("upperdir=/u", "rw"),
        ("rw,workdir=/w", "upperdir="),
        ("remount,rw", "remounted"),
        ('cache="/a', "unclosed quote"),
        ("=x", "without a name"),
    ],
)
def test_refusals_name_the_option_and_the_remedy(text: str, message: str) -> None:
    if text == "platform=linux/../x":  # dots are allowed inside a part; it is looked up, never used as a path
        assert parse([text]).access.platform == "linux/../x"
        return
    with pytest.raises(UserError) as caught:
        parse([text])
    assert message in str(caught.value)


def test_sloppy_passes_over_the_unknown_but_not_over_wrong_values() -> None:
    assert parse(["sizelimit=3,rw"], sloppy=True).writable
    with pytest.raises(UserError):
        parse(["timeout=soon"], sloppy=True)


def test_paths_become_absolute() -> None:
    assert parse(["cache=sub/../c"], directory="/d").cache == "/d/c"
    assert parse(["cache=c"]).cache == os.path.join(os.getcwd(), "c")
    assert parse(["ca=~/ca.pem"]).access.ca_files == (os.path.expanduser("~/ca.pem"),)


@given(
    st.lists(
        st.lists(st.sampled_from([*"=,\\\"' /~.0", *options.KNOWN]), max_size=12).map("".join), max_size=3
    )
)
def test_any_text_gives_options_or_the_clear_error(texts: list[str]) -> None:
    try:
        parse(texts)
    except UserError as error:
        assert error.hint


def test_mount_says_rw_for_everybody() -> None:
    def writable(text: str) -> bool:
        return mounthelper.parse(["image", "/mnt", "-o", text]).options.writable

    assert not writable("rw")
    assert writable("rw,ephemeral")
    assert writable("rw,upperdir=/u,workdir=/w")
    assert not writable("rw,ephemeral,ro")


# -- index repositories ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("a.example/i", "a.example/i"),
        ("indexes", "indexes"),
        ("docker://a.example:5/i/{registry}/{repository}", "docker://a.example:5/i/{registry}/{repository}"),
        ("oci:i/../{repository}", "oci:/here/{repository}"),
        ("oci+https://a.example:8", "oci+https://a.example:8"),
    ],
)
def test_index_repositories(text: str, read: str) -> None:
    assert parse([f"index_repository={text}"], directory="/here").access.index_repositories == (read,)


@pytest.mark.parametrize(
    "text",
    ["", "a.example/i:1", "a.example:5", "a.example/i@sha256:1", "oci:", "oci:/i:1", "oci+https://a/i:1", "/srv/i",
     "a.example/{tag}", "a/{registry", "https://a.example/i", "a b"],
)  # fmt: skip
def test_what_is_no_index_repository(text: str) -> None:
    with pytest.raises(UserError, match="index_repository"):
        parse([f"index_repository={text}"])


def test_index_repositories_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """They count where no option names one."""
    monkeypatch.setenv("LAZYFS_INDEX_REPOSITORY", "a.example/i, oci:i  b.example/{repository},")
    found = parse(["ro"], directory="/here").access.index_repositories
    assert found == ("a.example/i", "oci:/here/i", "b.example/{repository}")
    assert parse(["index_repository=c.example/i"]).access.index_repositories == ("c.example/i",)
    monkeypatch.setenv("LAZYFS_INDEX_REPOSITORY", "a.example/i:1")
    with pytest.raises(UserError, match="LAZYFS_INDEX_REPOSITORY"):
        parse([])


def test_what_is_learned_may_be_said_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse([]).access.learns and parse(["learn=push"]).access.learns
    assert not parse(["learn=off"]).access.learns
    monkeypatch.setenv("LAZYFS_LEARN", "off")
    assert not parse([]).access.learns
    assert parse(["learn=local"]).access.learns
    monkeypatch.setenv("LAZYFS_LEARN", "all")
    with pytest.raises(UserError, match="LAZYFS_LEARN=all"):
        parse([])
    for text in ("learn", "learn=", "learn=all"):
        with pytest.raises(UserError, match="learn"):
            parse([text])


# -- one table -------------------------------------------------------------------------------------------


def test_every_option_of_the_table_is_parsed_and_explained() -> None:
    examples = {"backend": "fuse", "timeout": "5", "platform": "linux/arm64", "upperdir": "/u,rw"}
    examples |= {"index_repository": "a.example/indexes", "learn": "push", "pull": "missing"}
    shown = _subcommand_help("mount")
    for option in options.OPTIONS:
        text = option.name if option.read is None else f"{option.name}={examples.get(option.name, '/x')}"
        assert parse([f"rw,upperdir=/u,{text}" if option.name == "workdir" else text])
        if option.text:
            assert option.form.split("=")[0] in shown and option.text.split("\n")[0] in shown


def _subcommand_help(name: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
        arguments.parser([name]).parse_args([name, "--help"])
    return shown.getvalue()


def test_a_new_option_is_written_at_two_places(tmp_path: Path) -> None:
    """A field and a line of the table: options, help, wire and state follow."""
    shutil.copytree(ROOT / "lazyfs", tmp_path / "lazyfs", ignore=shutil.ignore_patterns("__pycache__"))
    _insert(tmp_path / "lazyfs/sources/access.py", "    insecure: bool = False", "    made_up: bool = False")
    line = '    _flag("made_up", "what was made up", made_up=True),'
    _insert(tmp_path / "lazyfs/mounting/options.py", '    _flag("offline", ', line)
    code = (
        "from lazyfs.control import messages, requests; from lazyfs.daemon import state\n"
        "from lazyfs.mounting import options\n"
        "access = options.parse(['made_up,timeout=3']).access\n"
        "line = messages.encode({'op': 'lease', 'image': 'a', 'access': access.to_json()})\n"
        "assert requests.parse_request(line).access.made_up is True\n"
        "assert requests.parse_access(access.to_json()) == access  # the state file's form\n"
        "assert 'what was made up' in options.help_text()\n"
    )
    command = [sys.executable, "-P", "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr


def _insert(path: Path, before: str, line: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, f"{line}\n{before}"))
