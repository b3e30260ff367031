"""Users by the image's own files. Pure."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.containers.accounts import MAX_ACCOUNT_FILE_BYTES, Account, resolve_user
from lazyfs.containers.runc import checked_stop_signal
from lazyfs.containers.spec import SpecOptions, build_spec
from lazyfs.containers.specmounts import (
    image_volumes,
)
from lazyfs.core.oci.documents import ImageConfig
from lazyfs.errors import ImageError, LazyfsError

PLAIN = ImageConfig("linux", "amd64", "", (), (), (), ("sh",), "", "", {}, (), "", ())
PASSWD = b"root:x:0:0:root:/root:/bin/sh\nbob:x:1000:1001:Bob:/home/bob:/bin/sh\n#no:x:5:5::/:\nodd\n"
GROUP = b"root:x:0:\nbob:x:1001:\nwheel:x:10:alice,bob\naudio:x:29:bob\nother:x:30:bobby\n"

# -- users -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "account"),
    [
        ("", Account(0, 0, (), "/root")),
        ("bob", Account(1000, 1001, (10, 29), "/home/bob")),
        ("bob:wheel", Account(1000, 10, (), "/home/bob")),
        ("bob:7", Account(1000, 7, (), "/home/bob")),
        ("1000", Account(1000, 1001, (10, 29), "/home/bob")),
        ("1000:0", Account(1000, 0, (), "/home/bob")),
        ("4711", Account(4711, 0, (), "/")),
        ("4711:wheel", Account(4711, 10, (), "/")),
        (":wheel", Account(0, 10, (), "/root")),
        ("bob:", Account(1000, 1001, (10, 29), "/home/bob")),
        ("2147483647:2147483647", Account(2**31 - 1, 2**31 - 1, (), "/")),
        ("000000000000000000000000", Account(0, 0, (), "/root")),
    ],
)
def test_users(user: str, account: Account) -> None:
    assert resolve_user(user, PASSWD, GROUP) == account


def test_the_user_that_is_not_named_has_roots_groups() -> None:
    """As containerd and Docker have it, whatever passwd calls uid 0."""
    passwd, group = b"toor:x:0:3::/toor:/bin/sh\n", b"bin:x:1:toor,bob\nroot:x:3:\nwheel:x:10:root\n"
    for user in ("", "0", "toor"):
        assert resolve_user(user, passwd, group) == Account(0, 3, (1,), "/toor")
    assert resolve_user(":wheel", passwd, group) == resolve_user("0:10", passwd, group) == Account(0, 10, (), "/toor")


def test_without_account_files_only_numbers_work() -> None:
    assert resolve_user("", b"", b"") == Account()
    assert resolve_user("5:6", b"", b"") == Account(5, 6)
    with pytest.raises(ImageError, match="no user 'root'"):
        resolve_user("root", b"", b"")


@pytest.mark.parametrize(
    "user",
    [
        "nobody",
        "no",
        "odd",
        "bob:nogroup",
        "bob:wheel:x",
        "2147483648",  # CVE-2024-40635
        "4294967295",
        "4294967296",
        "18446744073709551616:0",
        "0:2147483648",
        "9" * 5000,
        "-1",
        "+1",
        "0x0",
        " 0",
        "bob\n",
        "bo\0b",
        "\u0661",  # a decimal digit to Python, a name to everybody else
        "\ud800",
        "x" * 100_000,
    ],
)
def test_bad_users_are_refused(user: str) -> None:
    with pytest.raises(ImageError):
        resolve_user(user, PASSWD, GROUP)


@pytest.mark.parametrize(
    "ids", [b"4294967296:0", b"0:2147483648", b"-1:0", b"x:0", b":0", b"9" * 5000 + b":0"]
)
def test_bad_numbers_in_passwd_never_become_ids(ids: bytes) -> None:
    with pytest.raises(ImageError):
        resolve_user("evil", b"evil:x:" + ids + b"::/:/bin/sh\n", b"")


def test_a_bad_number_in_group_is_refused() -> None:
    with pytest.raises(ImageError):
        resolve_user("0:evil", b"", b"evil:x:4294967296:\n")


def test_oversized_account_files_are_refused() -> None:
    for passwd, group in (
        (b"x" * (MAX_ACCOUNT_FILE_BYTES + 1), b""),
        (b"", b"x" * (MAX_ACCOUNT_FILE_BYTES + 1)),
    ):
        with pytest.raises(ImageError, match="larger"):
            resolve_user("0", passwd, group)


def test_too_many_groups_are_refused() -> None:
    group = b"".join(b"::%d:b\n" % number for number in range(2, 70_000))
    with pytest.raises(ImageError, match="groups"):
        resolve_user("b", b"b:x:1:1::/:\n", group)


def test_a_home_that_is_no_path_is_the_root() -> None:
    for home in (b"rel", b"", b"/\xff", b"/a\0"):
        assert resolve_user("e", b"e:x:1:1::" + home + b":/bin/sh\n", b"").home == "/"


@given(st.text(max_size=20), st.binary(max_size=200), st.binary(max_size=200))
def test_any_account_files_give_ids_in_range_or_the_clear_error(
    user: str, passwd: bytes, group: bytes
) -> None:
    try:
        account = resolve_user(user, PASSWD + passwd, GROUP + group)
    except ImageError:
        return
    assert all(0 <= number < 2**31 for number in (account.uid, account.gid, *account.additional_gids))
    assert account.home.startswith("/")


texts = st.text(st.characters(codec=None), max_size=12) | st.sampled_from(["/proc/self", "..", "A=1", "/v"])


@given(
    st.lists(texts, max_size=3),
    st.lists(texts, max_size=3),
    texts,
    st.dictionaries(texts, texts, max_size=3),
    st.lists(texts, max_size=3),
    texts,
)
def test_any_configuration_gives_json_or_the_clear_error(
    env: list[str], args: list[str], cwd: str, labels: dict[str, str], volumes: list[str], signal: str
) -> None:
    config = PLAIN._replace(
        env=tuple(env),
        entrypoint=tuple(args),
        working_dir=cwd,
        labels=labels,
        volumes=tuple(volumes),
        stop_signal=signal,
    )
    try:
        image_volumes(config)
        spec, _ = build_spec(config, Account(), SpecOptions())
    except LazyfsError:
        return
    assert json.loads(json.dumps(spec)) == spec
    json.dumps(spec, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("text", "signal"),
    [
        ("", "TERM"),
        ("SIGQUIT", "QUIT"),
        ("quit", "QUIT"),
        ("3", "3"),
        ("SIGRTMIN+3", "37"),
        ("RTMIN", "34"),
        ("0", "TERM"),
        ("65", "TERM"),
        ("SIGRTMIN+99", "TERM"),
        ("--all", "TERM"),
        ("SIGTERM+1", "TERM"),
        ("\u0663", "TERM"),
    ],
)
def test_stop_signals(text: str, signal: str) -> None:
    assert checked_stop_signal(text) == signal
