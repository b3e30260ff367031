"""Watching the start of a container: each kind of readiness, early ends, time-outs, signals. With the real runc."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lazyfs.commands.arguments import parser
from lazyfs.commands.containers import run_request
from lazyfs.containers import readiness
from lazyfs.containers.readiness import Exit, Http, Line, Port, Seconds, StartWatch, Until
from lazyfs.containers.run import run
from lazyfs.containers.store import ContainerStore
from lazyfs.errors import HostError, ImageError, UserError
from tests.containers.plainroots import PlainRoots

DEADLINE_S = 30.0
FOREVER = "sleep 1000"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


class Recorded:
    """A start of a shell script in a container, and what came of it."""

    def __init__(self, template: Path, state: Path) -> None:
        self.roots = PlainRoots(template)
        self.store = ContainerStore(str(state))
        self.ready_calls = 0
        self.on_ready: Callable[[], None] = lambda: None

    def __call__(self, script: str, until: Until, timeout_s: float = DEADLINE_S) -> StartWatch:
        self.roots.detached = 0
        self.watch = StartWatch(until, timeout_s, self._ready, 2)
        args = parser(["run"]).parse_args(["run", "--rm", "--stop-timeout", "0.2", "image", "sh", "-c", script])
        self.status = run(run_request(args), self.store, self.roots, print, self.watch)
        assert self.store.listing() == []
        return self.watch

    def _ready(self) -> None:
        self.ready_calls += 1
        assert self.roots.detached == 0, "the root is unmounted already"
        self.on_ready()


@pytest.fixture
def start(template: Path, tmp_path: Path) -> Recorded:
    for applet in ("nc", "httpd", "true", "head", "kill"):
        (template / "root" / "bin" / applet).symlink_to("busybox")
    return Recorded(template, tmp_path / "state")


def test_until_exit(start: Recorded) -> None:
    watch = start("exit 0", Exit())
    assert watch.failure is None and watch.ready_s is not None and 0 < watch.ready_s < DEADLINE_S
    assert (start.status, start.ready_calls) == (0, 1)


def test_an_end_that_fails_is_no_readiness(start: Recorded) -> None:
    watch = start("exit 3", Exit())
    assert watch.ready_s is None and start.ready_calls == 0
    assert isinstance(watch.failure, ImageError) and "status 3" in watch.failure.message


@pytest.mark.parametrize("stream", [1, 2])
def test_until_line(start: Recorded, capfd: pytest.CaptureFixture[str], stream: int) -> None:
    watch = start(f"echo not yet; echo 'now it is up and running' >&{stream}; {FOREVER}", Line("up and"))
    assert watch.failure is None and watch.ready_s is not None
    assert start.ready_calls == 1
    assert capfd.readouterr().err.count("now it is up and running\n") == 1  # is shown, wherever it was written


def test_a_line_in_pieces_is_found(start: Recorded) -> None:
    script = f"for part in a b cd e; do echo -n $part; sleep 0.05; done; {FOREVER}"
    assert start(script, Line("bcd")).ready_s is not None


def test_two_streams_do_not_make_a_line(start: Recorded) -> None:
    watch = start("echo -n ab; echo -n cd >&2", Line("bc"))
    assert watch.ready_s is None and isinstance(watch.failure, ImageError)


def test_a_line_counts_though_the_container_has_ended(start: Recorded) -> None:
    watch = start("echo up; exit 1", Line("up"))
    assert watch.failure is None and watch.ready_s is not None and start.ready_calls == 1


def test_a_container_that_writes_much_is_not_held_up(start: Recorded, capfd: pytest.CaptureFixture[str]) -> None:
    watch = start("head -c 3000000 /dev/zero; echo up", Line("up"))
    assert watch.ready_s is not None
    assert len(capfd.readouterr().err) == 3_000_003


def test_until_port(start: Recorded) -> None:
    port = free_port()
    watch = start(f"sleep 0.3; nc -l -p {port} -e sleep 1000", Port(port))
    assert watch.failure is None and watch.ready_s is not None and watch.ready_s >= 0.3


def test_until_http(start: Recorded) -> None:
    port = free_port()
    script = f"mkdir /www; httpd -p {port} -h /www; sleep 0.3; echo page > /www/index.html; {FOREVER}"
    watch = start(script, Http(f"http://127.0.0.1:{port}/"))
    assert watch.failure is None and watch.ready_s is not None and watch.ready_s >= 0.3, "404 is no readiness"


def test_after_some_seconds(start: Recorded) -> None:
    watch = start(FOREVER, Seconds(0.2), timeout_s=0.1)
    assert watch.failure is None and watch.ready_s is not None and watch.ready_s >= 0.2
    assert start("exit 0", Seconds(DEADLINE_S)).ready_s is not None, "a start that ends well before is one, too"


@pytest.mark.parametrize("until", [Line("up"), Port(1), Http("http://127.0.0.1:1/"), Seconds(DEADLINE_S)])
def test_a_container_that_ends_early(start: Recorded, until: Until) -> None:
    watch = start("exit 5", until)
    assert watch.ready_s is None and start.ready_calls == 0
    assert isinstance(watch.failure, ImageError) and "ended with status 5 before" in watch.failure.message


@pytest.mark.parametrize("until", [Exit(), Line("up"), Port(1), Http("http://127.0.0.1:1/")])
def test_a_container_that_does_not_become_ready(start: Recorded, until: Until) -> None:
    watch = start(FOREVER, until, timeout_s=0.3)
    assert watch.ready_s is None and start.ready_calls == 0
    assert isinstance(watch.failure, ImageError) and "0.3 s" in watch.failure.message


def test_a_silent_server_does_not_hold_up_the_watch(start: Recorded) -> None:
    port = free_port()
    watch = start(f"nc -l -p {port} -e {FOREVER}", Http(f"http://127.0.0.1:{port}/"), timeout_s=1.0)
    assert isinstance(watch.failure, ImageError)


def test_an_answer_from_elsewhere_is_refused_before_the_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(UserError, match="something else"):
        StartWatch(Port(server.getsockname()[1]), 1.0, lambda: None, 2)


def test_a_failure_to_record_is_the_outcome(start: Recorded) -> None:
    def fail() -> None:
        raise HostError("the daemon has no profile")

    start.on_ready = fail
    watch = start(FOREVER, Seconds(0.1))
    assert watch.ready_s is None and isinstance(watch.failure, HostError)


def test_a_signal_is_no_readiness(start: Recorded) -> None:
    """An interrupted start is neither ready nor failed; the command says so by its exit status."""
    main = threading.get_ident()
    interrupt = threading.Timer(0.5, lambda: signal.pthread_kill(main, signal.SIGINT))
    interrupt.start()
    watch = start(f"echo up; {FOREVER}", Line("never"))
    interrupt.join()
    assert watch.ready_s is None and watch.failure is None and start.ready_calls == 0
    assert start.status > 128


def test_what_cannot_be_executed_is_neither(start: Recorded) -> None:
    watch = StartWatch(Exit(), DEADLINE_S, lambda: None, 2)
    args = parser(["run"]).parse_args(["run", "--rm", "image", "/no/such/program"])
    assert run(run_request(args), start.store, start.roots, print, watch) == 127
    assert watch.ready_s is None and watch.failure is None


def test_nothing_is_left_open(start: Recorded) -> None:
    start("exit 0", Exit())
    before, threads = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    start("exit 0", Exit())
    start(FOREVER, Seconds(0.1))
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert threading.active_count() == threads


@pytest.mark.parametrize("text", ["", "ftp://h/", "http://", "http://h:x/", "127.0.0.1:80", "http://h/ b", "http://[::/"])
def test_what_is_not_a_url_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        readiness.checked_url(text)


def test_other_values_are_checked() -> None:
    for number in (0, 65536, -1):
        with pytest.raises(UserError):
            readiness.checked_port(number)
    for text in ("", "a\nb"):
        with pytest.raises(UserError):
            readiness.checked_line(text)
    assert readiness.checked_url("https://[::1]:8443/a?b=c").url == "https://[::1]:8443/a?b=c"
