"""The usual words of a command line mean what argparse says they mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.commands import arguments, usual

WORDS = ["-o", "ro", "rw,upperdir=/u", "-v", "--verbose", "-s", "--sloppy", "--push-index", "-l", "--lazy", "--wait"]
ODD = ["-", "--", "-orw", "-o=rw", "-sv", "--push", "-h", "-x", "", "a b", "-1", "debian:12", "/mnt"]


@given(st.sampled_from(["mount", "umount"]), st.lists(st.sampled_from([*WORDS, *ODD]), max_size=7))
def test_as_argparse_or_not_at_all(command: str, words: list[str]) -> None:
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
    ],
)
def test_the_usual_is_known(line: list[str]) -> None:
    assert usual.parse(line) is not None


@pytest.mark.parametrize(
    "line", [[], ["ls"], ["mount"], ["mount", "-h"], ["mount", "a", "/t", "-o"], ["umount", "a", "b"]]
)
def test_the_rest_is_left_to_argparse(line: list[str]) -> None:
    assert usual.parse(line) is None
