"""The control protocol: every line from outside is either understood or refused with ProtocolError."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.control import client, messages, replies, requests
from lazyfs.control.client import Connection, DaemonGone, DaemonSilent
from lazyfs.control.messages import LineBuffer, ProtocolError
from lazyfs.control.requests import Attached, FuseMount, Hold, Mount, Ping, Release, Stats
from lazyfs.errors import HostError, ImageError, LazyfsError, NotFound, RemoteError, Unsupported, UserError
from lazyfs.sources.access import Access, from_json
from lazyfs.system import sockets

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    ours, theirs = socket.socketpair()
    with Connection(ours) as connection, theirs:
        yield connection, theirs


def test_a_mount_request_survives_the_wire() -> None:
    message = {
        "op": "lease",
        "image": "debian:12",
        "access": {
            "offline": True,
            "insecure": False,
            "platform": "linux/amd64",
            "ca_files": ["/ca"],
            "auth_files": None,
            "environ": {"HOME": "/root"},
        },
        "timeout_s": 5,
    }
    assert requests.parse_request(messages.encode(message)) == Mount(
        image="debian:12",
        access=Access(pull="never", platform="linux/amd64", ca_files=("/ca",), environ={"HOME": "/root"}),
        timeout_s=5.0,
    )


def test_access_travels_as_it_is() -> None:
    """All fields, so that a new one cannot be forgotten."""
    access = Access("linux/arm64", "never", True, ("/ca",), ("/a", "/b"), {"HOME": "/h"}, ("a/i", "oci:/i"), "push")
    assert all(value != default for value, default in zip(access, Access(), strict=True))
    message = {"op": "lease", "image": "a", "access": access.to_json()}
    assert requests.parse_request(messages.encode(message)) == Mount("a", access)
    assert from_json(Access().to_json()) == Access()


def test_a_lease_for_a_trace() -> None:
    line = messages.encode({"op": "lease", "image": "a", "traced": True})
    assert requests.parse_request(line) == Mount("a", traced=True)
    with pytest.raises(ProtocolError, match="traced"):
        requests.parse_request(messages.encode({"op": "lease", "image": "a", "traced": 1}))


def test_a_fuse_mount_request() -> None:
    line = messages.encode(
        {"op": "fuse_mount", "image": "a", "target": "/t", "allow_other": True, "exec": False}
    )
    assert requests.parse_request(line) == FuseMount(
        Mount("a"), target="/t", allow_other=True, executable=False
    )


def test_the_other_requests() -> None:
    place = {"dev": "0:41", "target": "/t", "ephemeral_upper": "/c/uppers/x", "image_dev": "0:40"}
    attached = requests.parse_request(messages.encode({"op": "attached", "attached": place}))
    assert attached == Attached((0, 41), "/t", "/c/uppers/x", (0, 40)) and attached.to_json() == place
    assert requests.parse_request(b'{"op":"stats","dev":"0:41"}') == Stats((0, 41))
    assert requests.parse_request(b'{"op":"hold","name":"n","dev":"0:41"}') == Hold("n", (0, 41))
    assert requests.parse_request(b'{"op":"release","name":"n"}') == Release("n")
    assert requests.parse_request(b'{"op":"ping","later":1}') == Ping()


def test_each_operation_has_a_record_and_a_reply() -> None:
    assert set(replies.REPLIES) == set(requests.OPERATIONS)
    assert len({kind for kind, _ in requests.OPERATIONS.values()}) == len(requests.OPERATIONS)


def test_names_that_are_not_utf_8_survive() -> None:
    name = os.fsdecode(b"/t/\xff")
    line = messages.encode({"op": "attached", "attached": {"dev": "1:2", "target": name}})
    attached = requests.parse_request(line)
    assert isinstance(attached, Attached) and os.fsencode(attached.target) == b"/t/\xff"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"nonsense",
        b"\xff",
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"op":"lease"}',
        b'{"op":"format"}',
        b'{"op":["lease"]}',
        b'{"op":"lease","image":""}',
        b'{"op":"lease","image":"a\\u0000b"}',
        b'{"op":"mount","image":"a"}',
        b'{"op":"lease","image":"a","access":[]}',
        b'{"op":"lease","image":"a","options":{"platform":"linux/arm64"}}',
        b'{"op":"lease","image":"a","access":{"ofline":true}}',
        b'{"op":"lease","image":"a","access":{"offline":1}}',
        b'{"op":"lease","image":"a","access":{"learn":"all"}}',
        b'{"op":"lease","image":"a","timeout_s":0}',
        b'{"op":"lease","image":"a","timeout_s":true}',
        b'{"op":"lease","image":"a","timeout_s":NaN}',
        b'{"op":"lease","image":"a","timeout_s":' + b"9" * 1000 + b"}",
        b'{"op":"lease","image":"a","timeout_s":' + b"9" * 10000 + b"}",
        b'{"op":"lease","image":"a","access":{"ca_files":["relative"]}}',
        b'{"op":"lease","image":"a","access":{"ca_files":"/a"}}',
        b'{"op":"lease","image":"a","access":{"environ":{"LD_PRELOAD":"/x"}}}',
        b'{"op":"lease","image":"a","access":{"environ":{"HOME":1}}}',
        b'{"op":"fuse_mount","image":"a"}',
        b'{"op":"fuse_mount","image":"a","target":"t"}',
        b'{"op":"fuse_mount","image":"a","target":"/t","home":{}}',
        b'{"op":"stats"}',
        b'{"op":"stats","dev":"1"}',
        b'{"op":"stats","dev":"-1:2"}',
        b'{"op":"stats","dev":"1:99999999999"}',
        b'{"op":"hold","name":"","dev":"1:2"}',
        b'{"op":"hold","name":"n"}',
        b'{"op":"release"}',
        b'{"attached":{"dev":"1:2","target":"/t"}}',
        b'{"op":"attached","attached":{"dev":"1:2"}}',
        b'{"op":"attached","attached":{"dev":"1:2","target":"t"}}',
        b'{"op":"attached","attached":{"dev":"1:2","target":"/t","ephemeral_upper":"x"}}',
    ],
)
def test_a_wrong_request_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        requests.parse_request(line)


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_line_is_parsed_or_refused(line: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        requests.parse_request(line)


@given(
    st.fixed_dictionaries(
        {"op": st.sampled_from(list(requests.OPERATIONS))},
        optional={
            name: JSON
            for name in "image access timeout_s push_index traced dev attached target allow_other exec name".split()  # noqa: SIM905
        },
    )
)
def test_any_field_is_parsed_or_refused(message: dict[str, object]) -> None:
    with contextlib.suppress(ProtocolError):
        requests.parse_request(json.dumps(message).encode())


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_lines_are_cut_whatever_the_pieces(size: int) -> None:
    data = b"first\n\nthird\nrest"
    lines = LineBuffer(100)
    found = []
    for start in range(0, len(data), size):
        lines.feed(data[start : start + size])
        while (line := lines.next_line()) is not None:
            found.append(line)
    assert found == [b"first", b"", b"third"]


def test_a_line_without_end_is_refused_at_the_limit() -> None:
    lines = LineBuffer(10)
    lines.feed(b"123456789\n")
    assert lines.next_line() == b"123456789"
    lines.feed(b"1234567890")
    with pytest.raises(ProtocolError):
        lines.next_line()


def test_a_message_over_the_limit_is_not_sent() -> None:
    with pytest.raises(ProtocolError):
        messages.encode({"x": "y" * 100}, 50)


@pytest.mark.parametrize(
    "error",
    [UserError("m", "h"), RemoteError("m"), ImageError("m", "h"), HostError("m"), NotFound("m", "h"), Unsupported("m")],
)
def test_errors_keep_their_fault_and_hint(error: LazyfsError) -> None:
    back = client.error_from(messages.decode(replies.failure(error)))
    assert type(back) is type(error) and str(back) == str(error) and back.exit_code == error.exit_code


def test_the_codes_never_change() -> None:
    """Daemons and clients of other versions know them."""
    assert list(messages.KINDS) == ["user", "remote", "image", "host", "not_found", "unsupported"]


@pytest.mark.parametrize("code", [None, "of the future", 7], ids=str)
def test_without_a_known_code_the_kind_counts(code: object) -> None:
    """A daemon from before there were codes, and one of a later version."""
    reply = {"error": {"kind": "remote", "message": "m", "hint": "h"} | ({} if code is None else {"code": code})}
    assert type(client.error_from(reply)) is RemoteError


def test_an_older_client_finds_the_kind_it_knows() -> None:
    """It reads kind, message and hint."""
    for error, kind in ((NotFound("m"), "image"), (Unsupported("m"), "host")):
        assert messages.decode(replies.failure(error))["error"].items() >= {"kind": kind, "message": "m"}.items()


@given(JSON)
def test_a_malformed_error_is_a_protocol_error(value: object) -> None:
    assert isinstance(client.error_from({"error": value}), LazyfsError)


def test_progress_then_the_answer(pair: tuple[Connection, socket.socket]) -> None:
    connection, theirs = pair
    theirs.sendall(replies.progress("one") + replies.progress("two") + replies.ok(x=1))
    seen: list[str] = []
    assert connection.ask({"op": "ping"}, 5, seen.append) == {"ok": True, "x": 1}
    assert seen == ["one", "two"]
    assert requests.parse_request(theirs.recv(1000)) == Ping()


def test_a_descriptor_comes_with_the_reply(pair: tuple[Connection, socket.socket], tmp_path: Path) -> None:
    connection, theirs = pair
    with open(tmp_path / "f", "w+b") as file:
        file.write(b"content")
        file.flush()
        socket.send_fds(theirs, [replies.ok()], [file.fileno()])
    connection.ask({"op": "lease"}, 5)
    fd = connection.take_fd()
    try:
        assert os.pread(fd, 100, 0) == b"content" and not os.get_inheritable(fd)
    finally:
        os.close(fd)
    with pytest.raises(ProtocolError):
        connection.take_fd()


def test_descriptors_nobody_took_are_closed() -> None:
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()
    with theirs, Connection(ours) as connection:
        socket.send_fds(theirs, [replies.ok()], [writing])
        os.close(writing)
        connection.ask({"op": "lease"}, 5)
    try:
        assert os.read(reading, 1) == b""  # end of file: the last writing end has gone
    finally:
        os.close(reading)


def test_too_many_descriptors_are_refused(pair: tuple[Connection, socket.socket]) -> None:
    connection, theirs = pair
    socket.send_fds(theirs, [replies.ok()], [0, 1, 2])
    with pytest.raises(ProtocolError):
        connection.ask({"op": "lease"}, 5)


@pytest.mark.parametrize("sent", [b"", b'{"ok":'])
def test_the_end_of_the_daemon(pair: tuple[Connection, socket.socket], sent: bytes) -> None:
    connection, theirs = pair
    theirs.sendall(sent)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(DaemonGone):
        connection.ask({"op": "ping"}, 5)


def test_a_silent_daemon_is_given_up(pair: tuple[Connection, socket.socket]) -> None:
    with pytest.raises(DaemonSilent):
        pair[0].ask({"op": "ping"}, 0.05)


@pytest.mark.parametrize("answer", [b"{}\n", b'{"ok":false}\n', b"[]\n", b"\xff\n", b'{"error":3}\n'])
def test_an_unknown_answer(pair: tuple[Connection, socket.socket], answer: bytes) -> None:
    connection, theirs = pair
    theirs.sendall(answer)
    with pytest.raises(ProtocolError):
        connection.ask({"op": "ping"}, 5)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(DaemonGone):
        Connection.open(str(tmp_path / "none.sock"))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    with pytest.raises(DaemonGone):
        Connection.open(str(tmp_path / "dead.sock"))


def test_the_peer_is_known(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def answer() -> None:
            accepted, _ = listener.accept()
            with accepted:
                assert sockets.peer_uid(accepted) == os.geteuid()
                accepted.recv(1000)
                accepted.sendall(replies.ok())

        thread = threading.Thread(target=answer)
        thread.start()
        with Connection.open(path) as connection:
            assert connection.peer_pid() == os.getpid()
            assert connection.ask({"op": "ping"}, 5) == {"ok": True}
        thread.join()


def test_only_what_leads_to_credentials_is_sent() -> None:
    environment = {"HOME": "/h", "DOCKER_CONFIG": "", "AWS_SECRET_ACCESS_KEY": "x"}
    assert Access().for_user_of(environment).environ == {"HOME": "/h"}
