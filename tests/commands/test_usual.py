"""The usual words of a command line mean what argparse says they mean."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lazyfs.commands import arguments, usual

WORDS = ["-o", "ro", "rw,upperdir=/u", "-v", "--verbose", "-s", "--sloppy", "--push-index", "-l", "--lazy", "--wait"]
WORDS += ["--push", "--json", "--push-to", "--output"]
OF_CONTAINERS = ["-t", "--tty", "-e", "A=1", "--env", "-v", "/a:/b:ro", "--volume", "--tmpfs", "/t", "--read-only"]
OF_CONTAINERS += ["-o", "rw", "--options", "-w", "/w", "--workdir", "-u", "1:2", "--user", "--entrypoint", ""]
OF_CONTAINERS += ["--hostname", "--rm", "--name", "n", "-i", "--interactive", "--stop-timeout", "3", "sh", "-c", "a b"]
ODD = ["-", "--", "-orw", "-o=rw", "-sv", "--pus", "-h", "-x", "", "a b", "-1", "debian:12", "/mnt"]


@given(st.sampled_from(["mount", "umount", "index"]), st.lists(st.sampled_from([*WORDS, *ODD]), max_size=7))
def test_as_argparse_or_not_at_all(command: str, words: list[str]) -> None:
    line = [command, *words]
    found = usual.parse(line)
    if found is not None:
        assert vars(found) == vars(arguments.parser(line).parse_args(line))


@given(st.sampled_from(["run", "bundle"]), st.lists(st.sampled_from([*OF_CONTAINERS, *ODD]), max_size=9))
@example("run", ["--rm", "debian:12", "sh", "--rm", "-e", "A=1"])
@example("bundle", ["-w", "/w", "debian:12", "/b"])
def test_containers_as_argparse_or_not_at_all(command: str, words: list[str]) -> None:
    line = [command, *words]
    found = usual.parse(line)
    if found is not None:
        assert vars(found) == vars(arguments.parser(line).parse_args(line))


@pytest.mark.parametrize(
    "line",
    [
        ["mount", "a", "/t"],
        ["mount", "-o", "rw", "-o", "timeout=3", "-v", "a", "/t", "--push-index"],
        ["mount", "a", "-s", "/t"],
        ["umount", "/t"],
        ["umount", "--wait", "-l", "/t"],
        ["run", "a"],
        ["run", "--rm", "-o", "rw,cache=/c", "-e", "A=1", "--name", "n", "-w", "/w", "a", "sh", "-c", "exit 3"],
        ["bundle", "--read-only", "-v", "/a:/b", "a", "/t", "sh"],
        ["index", "--push", "-o", "cache=/c", "a", "--json"],
    ],
)
def test_the_usual_is_known(line: list[str]) -> None:
    assert usual.parse(line) is not None


@pytest.mark.parametrize(
    "line", [[], ["ls"], ["mount"], ["mount", "-h"], ["mount", "a", "/t", "-o"], ["run", "-it", "a"], ["bundle", "a"]]
)
def test_the_rest_is_left_to_argparse(line: list[str]) -> None:
    assert usual.parse(line) is None
